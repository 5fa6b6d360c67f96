"""What the plan's command says of a 7B."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from bench.trainer.architectures import config_of
from repo_fast.config import TrainConfig, parse
from repo_fast.plan.__main__ import USABLE, largest_micro_batch, main
from repo_fast.plan.memory import memory
from repo_fast.plan.networks import networks
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
