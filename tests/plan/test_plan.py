"""What the plan's command says of a 7B."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.trainer.architectures import config_of
from repo_fast.config import TrainConfig, parse
from repo_fast.plan.__main__ import main
from repo_fast.plan.memory import Memory, memory, vllm_cache_tokens
from repo_fast.plan.networks import Network, networks
from repo_fast.plan.remedies import USABLE, Plan, largest_micro_batch
from repo_fast.plan.speed import DEVICES, Workload, step_seconds
from tests.plan.folders import ADAPTER_A_LAYER, save_adapters, save_models, words_of


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a policy and a score model of 7B, which are configurations alone."""
    return save_models(tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="module")
def large(models: Path) -> list[str]:
    """Options of Alpaca-7B."""
    score = str(models / "score")
    return words_of("alpaca-7b", {"policy": str(models / "policy"), "reward": score, "cost": score})


def test_the_paper_s_setting_fits_eight_large_gpus(large: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpus", "8", *large]) == 0
    said = capsys.readouterr().out
    assert "It fits" in said and "update.micro_batch_tokens" in said
    for row in ("policy", "reference", "reward critic", "cost critic", "+ generate", "+ update", "at most"):
        assert f"| {row} " in said


def test_what_does_not_fit_says_what_to_switch_on(large: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpus", "2", *large]) == 0
    said = capsys.readouterr().out
    assert "It does not fit" in said and "engine.offload_optimizer true" in said
    advised = [line for line in said.splitlines() if line.startswith("  ")]
    assert advised[0].startswith("  with ") and advised[-1].endswith(", fits")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "argument --gpus: 0, expected a whole number of at least 1"),
        (["--gpus", "many"], "argument --gpus: many, expected a whole number of at least 1"),
        (["--gpus", "1", "--response_tokens", "0"], "argument --response_tokens: 0, expected a whole number"),
        (["--gpus", "8", "--device", "abacus"], "abacus"),
        (["--gpus", "8", "--policy.pth", "x"], "policy.path"),
        ([], "--gpus"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert message in said.err and len(said.err.strip().splitlines()) == 1 and not said.out


def test_the_help_says_what_can_follow(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "[--config NAME]" in said and "Any option of the main job can follow" in said


def test_the_largest_micro_batch_is_the_largest(large: list[str]) -> None:
    device = DEVICES["h100"]
    plan = Plan(parse(large, TrainConfig), 8, device, torch.bfloat16)

    def peak(tokens: int) -> float:
        config = replace(plan.config, update=replace(plan.config.update, micro_batch_tokens=tokens))
        return memory(config, plan.models, 8, torch.bfloat16, torch.device("cuda")).peak

    largest, is_most = largest_micro_batch(plan)
    assert is_most and peak(largest) <= USABLE * device.memory < peak(largest + 256)
    # Whatever the plan has, what it has fits; no power of two is between the two.
    assert 2 ** (largest.bit_length() - 1) < largest - 100
    near = plan.changed({"update.micro_batch_tokens": largest - 100})
    assert largest - 100 <= largest_micro_batch(near)[0] <= largest + 256
    # The search ends somewhere, and says so.
    roomy = replace(plan, device=replace(device, memory=1e15))
    least, is_most = largest_micro_batch(roomy)
    assert least > 2**24 and not is_most


def test_a_long_demonstration_is_a_micro_batch_of_its_own(large: list[str]) -> None:
    """For the policy alone: critics do not see any."""

    def update(chosen: list[Network], *words: str) -> float:
        config = parse([*large, *words], TrainConfig)
        return memory(config, chosen, 8, torch.bfloat16, torch.device("cuda")).phases["update"]

    found = networks(parse(large, TrainConfig), torch.bfloat16)
    critic = next(model for model in found if model.role == "cost critic")
    long, rows = ("--data.ptx_max_tokens", "30000"), ("--update.micro_batch_tokens", "30000")
    assert update(found[:1], *long) == update(found[:1], *rows) > 1.5 * update(found[:1])
    assert update([found[0], critic], *long) == update(found[:1], *long)
    none = ("--data.ptx", "null", "--algorithm.ptx_coefficient", "0")
    assert update(found[:1], *long, *none) == update(found[:1], *none)


def test_what_is_offloaded_comes_back_to_run(large: list[str]) -> None:
    """Also to a single GPU, whose shards are whole."""
    config = parse([*large, "--engine.offload_parameters", "true"], TrainConfig)
    found = networks(config, torch.bfloat16)
    held = memory(config, found, 1, torch.bfloat16, torch.device("cuda"))
    here = memory(parse(large, TrainConfig), found, 1, torch.bfloat16, torch.device("cuda"))
    assert held.resident["policy"]["weights"] == 0
    assert held.phases["generate"] - here.phases["generate"] == found[0].weight_bytes(2)
    # At most 10⁹ parameters at once, and the largest module.
    assert held.phases["update"] > here.phases["update"] + 2e9


@pytest.mark.parametrize(
    ("option", "bytes_of"),
    [
        ("offload_optimizer", lambda model: 20 * model.trained / 4),
        ("offload_parameters", lambda model: model.weight_bytes(2, 4)),
        ("offload_frozen", lambda model: 0 if model.trained else model.weight_bytes(2, 4)),
    ],
)
def test_what_is_offloaded_is_in_host_memory(option, bytes_of, large: list[str], capsys) -> None:
    words = [*large, f"--engine.{option}", "true"]
    found = networks(parse(words, TrainConfig), torch.bfloat16)
    size = sum(map(bytes_of, found)) / 1e9
    assert size > 1 and main(["--gpus", "4", *words]) == 0
    said = capsys.readouterr().out
    assert f"Offloaded: {size:.1f} GB of host memory a rank, {4 * size:.1f} GB of all ranks." in said
    assert main(["--gpus", "4", *large]) == 0 and "Offloaded" not in capsys.readouterr().out


def test_vllm_takes_its_share_while_it_draws_or_all_the_time(large: list[str]) -> None:
    def phases(*words: str) -> dict[str, float]:
        config = parse([*large, "--rollout.engine", "vllm", *words], TrainConfig)
        models = networks(config, torch.bfloat16)
        return memory(config, models, 8, torch.bfloat16, torch.device("cuda"), 80e9).phases

    asleep, awake = phases(), phases("--rollout.vllm.sleep", "false")
    share = 0.35 * 80e9
    assert asleep["generate"] == awake["generate"] == share
    for phase in ("score", "experience", "update"):
        assert awake[phase] == asleep[phase] + share


def test_time_follows_the_work(large: list[str]) -> None:
    config, device = parse(large, TrainConfig), DEVICES["h100"]
    models = networks(config, torch.bfloat16)

    def seconds(ranks: int = 8, changed: TrainConfig = config, mean: float | None = None) -> dict[str, float]:
        return step_seconds(changed, models, ranks, torch.bfloat16, device, Workload.of(changed, ranks, mean))

    usual = seconds()
    assert list(usual) == ["generate", "score", "experience", "update"]
    fewer = seconds(ranks=4)
    assert all(fewer[phase] > usual[phase] for phase in ("score", "experience", "update"))
    assert all(seconds(mean=40)[phase] < usual[phase] for phase in ("generate", "experience", "update"))
    kept = replace(config, engine=replace(config.engine, activation_checkpointing=False))
    assert seconds(changed=kept)["update"] < usual["update"]
    without = replace(
        config, algorithm=replace(config.algorithm, ptx_coefficient=0.0), data=replace(config.data, ptx=None)
    )
    assert seconds(changed=without)["update"] < usual["update"]
    quick = replace(config, rollout=replace(config.rollout, engine="vllm"))
    assert seconds(changed=quick)["generate"] < usual["generate"]


def test_a_workload_has_the_lengths_asked_for(large: list[str]) -> None:
    config = parse(large, TrainConfig)
    work = Workload.of(config, 8)
    assert len(work.lengths) == 16 and work.responses / 16 == pytest.approx(385 / 2, abs=1)
    assert Workload.of(config, 8, mean_response=50).responses / 16 == pytest.approx(50, abs=1)


@pytest.mark.parametrize(
    ("architecture", "words", "message"),
    [
        ("stablelm", [], "policy: not packed (packed: StableLmAttention does not take part in packed attention)"),
        ("gpt_neo", [], "policy: not packed (packed: the architecture has no such attention; sdpa: "),
        ("mixtral", [], "Time: not known for a mixture of experts, or a recurrent trunk."),
        (
            "gemma2",
            [],
            "policy: not packed (packed: Gemma2Attention needs softcap, which packed attention and SDPA lack",
        ),
        ("bloom", ["--update.share_prompts", "true"], "update.share_prompts is true, expected false"),
        ("bloom", ["--policy.attention", "packed"], "cannot be built with any attention that was asked for: packed"),
    ],
)
def test_what_is_not_a_llama(
    architecture: str, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is planned, or refused as the run would refuse it."""
    config = config_of(architecture)
    config.save_pretrained(tmp_path)
    scorers = ["--reward.path", "tests.scorers:reward", "--cost.path", "tests.scorers:cost"]
    options = ["--policy.path", str(tmp_path), "--algorithm.advantage", "rloo", *scorers, *words]
    status = main(["--gpus", "1", *options])
    said = capsys.readouterr()
    assert message in said.out + said.err
    assert status == (2 if "expected" in message or "cannot" in message else 0)


# ---------------------------------------------------------------------------------------------------- on a single GPU


@pytest.fixture(scope="module")
def adapted(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a 7B and of two score models that are adapters on it, all without weights."""
    return save_adapters(tmp_path_factory.mktemp("adapted"), models / "policy")


def held_by(recipe: str, folders: dict[str, str], *more: str) -> tuple[Memory, list[Network]]:
    config = parse(words_of(recipe, folders, *more), TrainConfig)
    models = networks(config, torch.bfloat16)
    return memory(config, models, 1, torch.bfloat16, torch.device("cuda"), 80e9), models


def test_models_on_one_base_hold_it_once(adapted: dict[str, str]) -> None:
    recipe = "alpaca-7b-24gb"
    together, models = held_by(recipe, adapted)
    assert [model.role for model in models] == ["policy", "reward", "cost", "reward critic", "cost critic"]
    reward = next(model for model in models if model.role == "reward")
    # What stays of a score model is its adapters, and its critic has them from it.
    adapters = 2 * 32 * ADAPTER_A_LAYER
    assert together.resident["reward"]["weights"] == together.resident["cost"]["weights"] == adapters
    assert together.resident["cost critic"]["weights"] == 2 * models[-1].trained
    spared = 4 * (reward.weight_bytes(2) - adapters) + 2 * adapters
    assert together.spared == pytest.approx(spared)
    for options in (["--engine.share_base", "false"], ["--engine.zero_stage", "3"]):
        apart, _ = held_by(recipe, adapted, *options)
        assert apart.spared == 0
        weights = [sum(parts["weights"] for parts in held.resident.values()) for held in (together, apart)]
        assert weights[1] - weights[0] == pytest.approx(spared)
    # What is left of five models, adapters and all: the goal is a third.
    assert together.resident_total < 0.35 * apart.resident_total


def test_a_base_of_its_own_is_not_shared(adapted: dict[str, str], large: list[str], tmp_path: Path) -> None:
    """A critic shares with the score model that it starts from; without adapters in the policy, score models merge."""
    score = large[large.index("--cost.path") + 1]
    held, models = held_by("alpaca-7b-lora", adapted | {"cost": score})
    trunk = next(model for model in models if model.role == "cost").weight_bytes(2)
    assert held.resident["cost"]["weights"] == trunk and held.resident["cost critic"]["weights"] < 0.02 * trunk
    # What docs/start/one-gpu.md says of the two recipes: three bases, and one.
    published, _ = held_by(
        "alpaca-7b-lora", adapted | {"cost": score, "reward": str(shutil.copytree(score, tmp_path / "reward"))}
    )
    assert published.peak == pytest.approx(69.6e9, abs=0.05e9)
    assert held_by("alpaca-7b-24gb", adapted)[0].peak == pytest.approx(10.4e9, abs=0.05e9)
    whole, _ = held_by("alpaca-7b-lora", adapted, "--policy.lora.rank", "0", "--policy.lora.alpha", "16")
    assert whole.resident["reward"]["weights"] == trunk


@pytest.mark.parametrize(
    ("recipe", "device", "fits"),
    [("alpaca-7b-24gb", "rtx4090", True), ("alpaca-7b-lora", "rtx4090", False), ("alpaca-7b-lora", "l40s", True)],
)
def test_what_fits_on_one(
    adapted: dict[str, str], capsys: pytest.CaptureFixture[str], recipe: str, device: str, fits: bool
) -> None:
    assert main(["--gpus", "1", "--device", device, *words_of(recipe, adapted)]) == 0
    said = capsys.readouterr().out
    assert ("does not fit" not in said) == ("The largest micro-batch that fits" in said) == fits
    assert fits or said.count(", fits") == 1
    assert "kept once (not in the sum)" in said
    # Sharding would part what is shared.
    assert "engine.zero_stage 3" not in said


def test_vllm_needs_room_for_its_own_copy(adapted: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of a policy in 4 bits too, in full. Without it nothing is said to fit."""
    words = words_of("alpaca-7b-24gb", adapted, "--rollout.engine", "vllm")
    assert main(["--gpus", "1", "--device", "rtx4090", *words]) == 0
    said = capsys.readouterr().out
    assert "It fits" not in said and "It does not fit: vLLM's 8.4 GB" in said
    assert "with rollout.engine hf and rollout.batch_size 16: 10.4 GB, fits" in said
    config = parse(words, TrainConfig)
    policy = networks(config, torch.bfloat16)[0]
    assert vllm_cache_tokens(config, policy, torch.bfloat16, 24e9) < 0
    tokens = vllm_cache_tokens(config, policy, torch.bfloat16, 80e9)
    # 0.5 MB a token of 32 layers with 4096 keys and values each.
    assert tokens == pytest.approx((0.35 * 80e9 - 2 * 6.738e9) / (2 * 2 * 32 * 4096), rel=0.01)
