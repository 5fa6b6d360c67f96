"""The metrics of a step's phases: what they count, by hand, and the table at the end of a run."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from repo_fast.collectives import Ranks
from repo_fast.rollout import Rollout
from repo_fast.speed.flops import Shape
from repo_fast.speed.throughput import PHASES, Measured, Throughput, peak_memory, reset_peak_memory, speed_table
from tests.tiny import tiny_llama_config

CPU = torch.device("cpu")
SHAPE = Shape.of(AutoModelForCausalLM.from_config(tiny_llama_config()))
ROLLOUT = Rollout(
    prompt_ids=torch.tensor([0, 1]),
    prompts=["a", "b"],
    responses=["c", "d"],
    prompt_tokens=[torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)],
    response_tokens=[torch.zeros(2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)],
    finished=torch.tensor([True, True]),
    # Two rows of three prompt and four response positions.
    computed_positions=14,
)
PHASE_TIMES = {name: Measured(seconds=2.0**i, peak_memory=10**9 * i) for i, name in enumerate(PHASES)}


def test_a_steps_metrics_by_hand() -> None:
    critic = Shape(**{**vars(SHAPE), "head": 0})
    throughput = Throughput(SHAPE, [critic, critic], epochs=2, ranks=Ranks(0, 1, CPU, None), peak=1e9)
    record = throughput.metrics(ROLLOUT, PHASE_TIMES)
    # Ten tokens, six of them drawn. Policy, reference and two critics read them; all but the reference learn, twice.
    assert [record[f"{phase}_tokens"] for phase in PHASES] == [6, 20, 40, 60]
    assert [record[f"{phase}_tokens_per_second"] for phase in PHASES] == [6.0, 10.0, 10.0, 7.5]
    assert [record[f"{phase}_peak_gb"] for phase in PHASES] == [0.0, 1.0, 2.0, 3.0]
    assert record["padding_share"] == pytest.approx(4 / 14)
    forward, trunk = SHAPE.forward([5, 5], 6), SHAPE.forward([5, 5], 0)
    assert record["generate_tflops"] == pytest.approx(forward / 1e12)
    assert record["experience_tflops"] == pytest.approx((2 * forward + 2 * trunk) / 4 / 1e12)
    assert record["update_tflops"] == pytest.approx(2 * 3 * (forward + 2 * trunk) / 8 / 1e12)
    assert record["update_mfu"] == pytest.approx(record["update_tflops"] * 1e12 / 1e9)
    assert "score_tflops" not in record


def test_what_cannot_be_counted_is_left_out() -> None:
    throughput = Throughput(None, [], epochs=1, ranks=Ranks(0, 1, CPU, None))
    record = throughput.metrics(ROLLOUT, PHASE_TIMES)
    assert not [name for name in record if name.endswith(("_tflops", "_mfu"))]
    assert record["update_tokens"] == 10


def test_peak_memory_is_that_since_it_was_reset() -> None:
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    if before == 0:
        pytest.skip("this system does not say")
    block = torch.ones(50_000_000)
    assert peak_memory(CPU) > before + 150e6
    del block
    reset_peak_memory(CPU)
    assert peak_memory(CPU) < before + 100e6


def test_the_table_at_the_end() -> None:
    throughput = Throughput(SHAPE, [], epochs=1, ranks=Ranks(0, 1, CPU, None), peak=None)
    text = speed_table([throughput.metrics(ROLLOUT, PHASE_TIMES)] * 3, ranks=2)
    assert [cell.strip() for cell in text.splitlines()[3].split("|")[1:6]] == ["generate", "1.00", "6", "6", "3"]
    assert "Medians of 3 steps" in text and "28.6%" in text
