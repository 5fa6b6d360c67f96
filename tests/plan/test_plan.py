"""What the plan's command says of a 7B."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from bench.trainer.architectures import config_of
from repo_fast.config import TrainConfig, parse
from repo_fast.models.lora import ADAPTER_FILE, BASE_FINGERPRINT
from repo_fast.plan.__main__ import USABLE, largest_micro_batch, main
from repo_fast.plan.memory import Memory, memory, vllm_cache_tokens
from repo_fast.plan.networks import Network, networks
from repo_fast.plan.speed import DEVICES, Workload, step_seconds

LARGE = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_attention_heads=32,
    num_hidden_layers=32,
    vocab_size=32001,
    architectures=["LlamaForCausalLM"],
)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of Alpaca-7B with models that are configurations alone."""
    folder = tmp_path_factory.mktemp("large")
    LARGE.save_pretrained(folder / "policy")
    replaced = LlamaConfig(**{**LARGE.to_dict(), "architectures": ["LlamaForScore"]})
    replaced.save_pretrained(folder / "score")
    paths = {"policy": "policy", "reward": "score", "cost": "score"}
    words = [word for section, name in paths.items() for word in (f"--{section}.path", str(folder / name))]
    return ["--config", "alpaca-7b", *words]


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
    assert [line for line in said.splitlines() if line.startswith("  with ")][-1].endswith(", fits")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "8", "--device", "abacus"], "abacus"),
        (["--gpus", "8", "--policy.pth", "x"], "policy.path"),
        ([], "--gpus"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert message in said.err and len(said.err.strip().splitlines()) == 1 and not said.out


def test_the_largest_micro_batch_is_the_largest(large: list[str]) -> None:
    config, device = parse(large, TrainConfig), DEVICES["h100"]
    models = networks(config, torch.bfloat16)
    largest = largest_micro_batch(config, models, 8, device, torch.bfloat16)

    def peak(tokens: int) -> float:
        changed = replace(config, update=replace(config.update, micro_batch_tokens=tokens))
        return memory(changed, models, 8, torch.bfloat16, torch.device("cuda")).peak

    assert peak(largest) <= USABLE * device.memory < peak(2 * largest)


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
def adapted(large: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a 7B and of two score models that are adapters on it, all without weights."""
    folder, policy = tmp_path_factory.mktemp("adapted"), large[large.index("--policy.path") + 1]
    found = {"policy": policy}
    for name in ("reward", "cost"):
        LlamaConfig(**{**LARGE.to_dict(), "architectures": ["LlamaForScore"]}).save_pretrained(folder / name)
        settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": policy}
        (folder / name / "adapter_config.json").write_text(json.dumps(settings))
        layer = "base_model.model.layers.0.self_attn.q_proj"
        pair = {f"{layer}.lora_A.weight": torch.zeros(1, 4096), f"{layer}.lora_B.weight": torch.zeros(4096, 1)}
        noted = {BASE_FINGERPRINT: "0" * 64, "format": "pt"}
        save_file(pair, folder / name / ADAPTER_FILE, metadata=noted)
        found[name] = str(folder / name)
    return found


def words_of(recipe: str, folders: dict[str, str], *more: str) -> list[str]:
    return ["--config", recipe, *(word for name, path in folders.items() for word in (f"--{name}.path", path)), *more]


def held_by(recipe: str, folders: dict[str, str], *more: str) -> tuple[Memory, list[Network]]:
    config = parse(words_of(recipe, folders, *more), TrainConfig)
    models = networks(config, torch.bfloat16)
    return memory(config, models, 1, torch.bfloat16, torch.device("cuda"), 80e9), models


def test_models_on_one_base_hold_it_once(adapted: dict[str, str]) -> None:
    recipe = "alpaca-7b-24gb"
    together, models = held_by(recipe, adapted)
    assert [model.role for model in models] == ["policy", "reward", "cost", "reward critic", "cost critic"]
    trunk = next(model for model in models if model.role == "reward").weight_bytes(2)
    assert together.spared == pytest.approx(4 * trunk)
    for options in (["--engine.share_base", "false"], ["--engine.zero_stage", "3"]):
        apart, _ = held_by(recipe, adapted, *options)
        assert apart.spared == 0
        weights = [sum(parts["weights"] for parts in held.resident.values()) for held in (together, apart)]
        assert weights[1] - weights[0] == pytest.approx(4 * trunk, rel=1e-3)
    # What is left of five models, adapters and all: the goal is a third.
    assert together.resident_total < 0.35 * apart.resident_total


def test_a_base_of_its_own_is_not_shared(adapted: dict[str, str], large: list[str], tmp_path: Path) -> None:
    """A critic shares with the score model that it starts from; without adapters in the policy, score models merge."""
    score = large[large.index("--cost.path") + 1]
    held, models = held_by("alpaca-7b-lora", adapted | {"cost": score})
    trunk = next(model for model in models if model.role == "cost").weight_bytes(2)
    assert held.resident["cost"]["weights"] == trunk and held.resident["cost critic"]["weights"] < 0.02 * trunk
    # What the README says of the two recipes: three bases, and one.
    published, _ = held_by(
        "alpaca-7b-lora", adapted | {"cost": score, "reward": str(shutil.copytree(score, tmp_path / "reward"))}
    )
    assert published.peak == pytest.approx(69.6e9, abs=0.1e9)
    assert held_by("alpaca-7b-24gb", adapted)[0].peak == pytest.approx(10.2e9, abs=0.1e9)
    whole, _ = held_by("alpaca-7b-lora", adapted, "--policy.lora.rank", "0")
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
    assert "kept once (not in the sum)" in said
    # Sharding would part what is shared.
    assert "engine.zero_stage 3" not in said


def test_vllm_needs_room_for_its_own_copy(adapted: dict[str, str]) -> None:
    """Of a policy in 4 bits too, in full."""
    config = parse(words_of("alpaca-7b-24gb", adapted, "--rollout.engine", "vllm"), TrainConfig)
    policy = networks(config, torch.bfloat16)[0]
    assert vllm_cache_tokens(config, policy, torch.bfloat16, 24e9) < 0
    tokens = vllm_cache_tokens(config, policy, torch.bfloat16, 80e9)
    # 0.5 MB a token of 32 layers with 4096 keys and values each.
    assert tokens == pytest.approx((0.35 * 80e9 - 2 * 6.738e9) / (2 * 2 * 32 * 4096), rel=0.01)
