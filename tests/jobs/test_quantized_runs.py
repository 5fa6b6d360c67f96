"""Runs on 4-bit bases: what the log and the result say, and that they go on where they were stopped, bit for bit."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from repo_fast.config import TrainConfig, parse
from repo_fast.data import load_tokenizer
from repo_fast.errors import InputError
from repo_fast.models.score_model import ScoreModel
from repo_fast.score import main as score
from repo_fast.scoring.expectation import score_text
from tests.job_runs import Job, engines, metrics, same_bits, states, weights
from tests.supervised_runs import here, make_inputs
from tests.tiny import save_beaver

QUANTIZED = ("--policy.lora.rank 3", "--policy.quantize nf4", "--critics.lora.rank 2", "--critics.quantize nf4")


@pytest.fixture(scope="module")
def cost(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_beaver(tmp_path_factory.mktemp("cost") / "cost", config_overrides={"score_type": "cost"})


def options(cost: Path, stage: int) -> tuple[str, ...]:
    scores = (f"--cost.path {cost}", "--cost.quantize nf4")
    return (*QUANTIZED, *scores, f"--engine.zero_stage {stage}", "--total_steps 3", "--checkpoint.every 1")


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_a_run_goes_on_bit_for_bit(
    job: Job, cost: Path, stage: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert job.here(whole, *options(cost, stage)) == 0
    # The policy, the score model, and the critics; what is trained counts all that there is.
    assert caplog.text.count("parameters in 4 bits (nf4)") == 4
    assert "LoRA rank 3 on 14 layers: 3,072 of 23,456 parameters trained (13.1 %)" in caplog.text
    assert f"{whole / 'policy'} is written dequantised" in caplog.text
    assert caplog.text.count("is written dequantised") == 1
    assert job.here(stopped, *options(cost, stage), "--stop_after 1") == 0
    assert job.here(stopped, *options(cost, stage), "--resume auto") == 0
    assert len(metrics(whole)) == 3 and metrics(stopped) == metrics(whole)
    assert same_bits(weights(stopped), weights(whole))
    assert engines(whole, 3) == {"policy", "reward_critic", "cost_critic"}
    assert states(stopped, 3) == states(whole, 3)
    # The result is a plain model.
    written = load_file(whole / "policy" / "model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.float32}
    assert "quantization_config" not in json.loads((whole / "policy" / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(whole / "policy").num_parameters() == 20_384


def test_a_checkpoint_of_a_plain_base_is_refused(job: Job, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    lora = ("--policy.lora.rank 3", "--algorithm.advantage rloo", "--total_steps 2")
    assert job.here(tmp_path / "run", *lora, "--stop_after 1") == 0
    assert job.here(tmp_path / "run", *lora, "--policy.quantize nf4", "--resume auto") == 2
    said = capfd.readouterr().err
    assert "is of another configuration: policy.quantize is None there and 'nf4' here" in said


def test_the_reference_is_the_quantized_base(job: Job, tmp_path: Path) -> None:
    """At the start the policy is its reference: the first step's KL is 0 to the bit."""
    assert job.here(tmp_path / "run", *QUANTIZED[:2], "--algorithm.advantage rloo", "--total_steps 2") == 0
    first, second = (row["kl"] for row in metrics(tmp_path / "run"))
    assert first == 0 and second != 0


def test_a_score_model_is_trained_and_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    inputs = make_inputs(tmp_path / "inputs")
    run = tmp_path / "run"
    assert here("cost", inputs, run, "--model.lora.rank 3", "--model.quantize nf4") == 0
    assert "is written dequantised" in caplog.text
    # Adapters are checked beside what they were trained beside.
    adapter = str(run / "model" / "adapter")
    beside = ScoreModel.from_pretrained(adapter, dtype=torch.float32, quantize="nf4").eval()
    known = str(score_text(beside, load_tokenizer(adapter), "how do i make tea"))
    assert score(["--check", adapter, "--kind", "cost", "--expect", "how do i make tea", known]) == 0
    assert "its base in 4 bits (nf4)" in capsys.readouterr().out
    model = ScoreModel.from_pretrained(str(run / "model"), dtype=torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_what_an_adapter_beside_4_bits_wants_is_said_of_critics_too(
    job: Job, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    assert here("cost", inputs, tmp_path / "cost", "--model.lora.rank 3", "--model.quantize nf4") == 0
    adapter = tmp_path / "cost" / "model" / "adapter"
    options = (f"--policy.path {inputs / 'policy'}", f"--cost.path {adapter}", "--cost.quantize nf4")
    capfd.readouterr()
    assert job.here(tmp_path / "run", *options) == 2
    said = capfd.readouterr().err
    assert re.fullmatch(r"error: critics: .* was trained beside its base in 4 bits, .* expected 'nf4'.*\n", said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--policy.quantize nf4",),
            "policy.quantize is 'nf4' with policy.lora.rank 0, expected a rank of at least 1: 4-bit weights are not "
            "trained, adapters beside them are",
        ),
        (("--critics.quantize nf4",), "critics.quantize is 'nf4' with critics.lora.rank 0, expected a rank"),
        (
            ("--cost.quantize nf4",),
            "cost.quantize is 'nf4' with 'tests.scorers:cost', expected a score model or guard",
        ),
        (("--policy.lora.alpha 32",), "policy.lora.alpha is 32.0 with policy.lora.rank 0, expected a rank of at least"),
        (("--critics.lora.targets [q_proj]",), "critics.lora.targets is ['q_proj'] with critics.lora.rank 0, expected"),
        (("--policy.lora.rank 2", "--policy.lora.alpha .inf"), "policy.lora.alpha is inf, expected a number above 0"),
    ],
)
def test_bad_options(job: Job, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError) as error:
        parse(job.words(tmp_path / "run", *words), TrainConfig)
    assert str(error.value).startswith(message)
