"""The trainer's benchmark: that it runs, and that what it says follows from what it measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the benchmark measures beside TRL")

from bench import rollout_phase, training_phase  # noqa: E402
from bench.job_folder import make_policy, make_tokenizer  # noqa: E402
from bench.step_phase import summarize  # noqa: E402
from bench.trainer import __main__ as trainer  # noqa: E402
from bench.trainer import on_paper  # noqa: E402
from bench.training_phase import BASELINE, GEOMETRIES, IN_PARTS, OURS  # noqa: E402
from repo_fast.speed.throughput import PHASES  # noqa: E402

TINY = GEOMETRIES["tiny"]


def step(seconds: float, response_length: float = 10.0) -> dict[str, Any]:
    metrics = {f"{phase}_seconds": seconds for phase in PHASES}
    return {
        "seconds": {"step": 4 * seconds, "optimizer": seconds / 10},
        "overhead_share": 0.06,
        "metrics": metrics | {"tokens_per_second": 5.0, "response_length": response_length},
    }


@pytest.mark.slow
def test_the_parts_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer.main(["--tiny", "--out", str(tmp_path), "--parts", "update", "rollout"]) == 0
    said = json.loads((tmp_path / "trainer.json").read_text())
    assert set(said["ratios"]) >= {
        "update_vs_padded",
        "update_vs_padded_flops",
        "update_vs_trl",
        "rollout_vs_zero3_generate",
    }
    assert not said["failures"] and not said["wrong_losses"]
    assert (tmp_path / "beside.png").stat().st_size > 5000
    assert all(ratio > 0 for ratio in said["ratios"].values())
    tables = (tmp_path / "tables.md").read_text()
    assert tables.strip() in capsys.readouterr().out
    assert trainer.main(["--tiny", "--out", str(tmp_path), "--again"]) == 0
    assert json.loads((tmp_path / "trainer.json").read_text()) == said
    assert (tmp_path / "tables.md").read_text() == tables


@pytest.mark.slow
def test_a_step_is_taken_apart() -> None:
    row = trainer.take_steps(TINY, 1, 4)
    assert all(row["seconds"][name] > 0 for name in ("forward", "backward", "optimizer", "generate", "score"))
    assert 0 < row["overhead_share"] < 1  # of each step by itself: medians over steps do not add up
    assert row["metrics"]["update_seconds"] > 0 and row["steps"] == trainer.STEPS - 1


def test_overhead_is_what_is_left() -> None:
    record = {
        f"{phase}_{what}": 1.0 for phase in PHASES for what in ("seconds", "tokens", "tokens_per_second", "peak_gb")
    }
    record |= {"padding_share": 0.0, "tokens_per_second": 1.0, "response_length": 1.0}
    watched = {"forward": 1.0, "backward": 2.0, "optimizer": 1.0, "step": 8.0}
    first = {name: 100.0 for name in watched}
    assert summarize([first, watched, watched], [record] * 3)["overhead_share"] == pytest.approx(2 / 8)


def test_ratios_and_targets() -> None:
    paths = {
        BASELINE: {"speedup": 1.0, "loss": 0.5},
        IN_PARTS: {"speedup": 1.5, "loss": 0.5},
        OURS: {"speedup": 2.4, "loss": 0.5 + 2e-6},
    }
    results = {
        "update": {"paths": {"paths": paths, "speedup_by_flop": 2.5}, trainer.TRL: {"ratio": 1.9}},
        "rollout": {
            "two": {
                rollout_phase.OURS: {"tokens_per_s": 300.0},
                rollout_phase.HOOKS_ON: {"tokens_per_s": 100.0},
            }
        },
        "step": {"1 rank": step(1.0)},
    }
    assert trainer.ratios(results) == pytest.approx(
        {
            "update_vs_padded": 2.4,
            "update_vs_padded_in_parts": 1.6,
            "update_vs_padded_flops": 0.96,
            "update_vs_trl": 1.9,
            "rollout_vs_zero3_generate": 3.0,
            "overhead_share": 0.06,
            "overhead_share_with_log_probs": 0.31,
        }
    )
    met = {name: target(trainer.ratios(results)[name])["met"] for name, target in trainer.TARGETS.items()}
    assert met == {
        "update_vs_padded": True,
        "update_vs_padded_flops": True,
        "update_vs_trl": False,
        "rollout_vs_zero3_generate": True,
        "overhead_share": False,
    }
    assert trainer.wrong_losses(results["update"]) == {}
    paths[OURS]["loss"] = 0.5002
    assert list(trainer.wrong_losses(results["update"])) == [OURS]
    paths[OURS]["loss"] = float("nan")
    assert list(trainer.wrong_losses(results["update"])) == [OURS]
    assert trainer.ratios({}) == {} and trainer.wrong_losses({}) == {}


def test_what_grows_is_drawn_and_compared_with_the_plan(tmp_path: Path) -> None:
    settings = trainer.growth_settings(TINY)
    machine = step(0.5)
    growth = {name: machine for name in settings}
    trainer.plot_growth(growth, TINY, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000
    compared = trainer.plan_beside(growth, TINY)
    assert set(compared) == set(settings) - {trainer.UNCHANGED}
    # The same geometry as the reference under another name is predicted as it was measured.
    metrics = machine["metrics"] | {"optimizer_seconds": 0.05}
    again = {"unchanged": (*settings["unchanged"], metrics), "again": (TINY, 4, metrics)}
    same = on_paper.check_plan(again, trainer.UNCHANGED)["again"]
    for phase in ("generate", "update"):
        assert same[phase]["predicted"] == pytest.approx(0.5, rel=1e-6)
    wider = compared[f"width {2 * TINY.width}"]
    assert wider["update"]["predicted"] > 1.5 * 0.5
    assert "predicted" in on_paper.check_table(compared)
    half = {phase: {"measured": 2.0, "predicted": 1.0} for phase in on_paper.CHECKED}
    exact = {phase: {"measured": 2.0, "predicted": 2.0} for phase in on_paper.CHECKED}
    errors = on_paper.plan_errors({"a": half, "b": exact})
    assert errors["update"] == {"median": 0.25, "largest": 0.5}
    assert trainer.plan_beside({}, TINY) == {}


def test_the_simulation_gets_no_cheaper_with_more_gpus() -> None:
    simulated = on_paper.simulate()
    rows = simulated["steps"]
    assert len(rows) == 2 * len(on_paper.GPUS)
    for engine in ("hf", "vllm"):
        efficiency = [rows[f"{engine}, {gpus} GPUs"]["efficiency"] for gpus in on_paper.GPUS]
        assert efficiency[0] == 1 and all(a >= b for a, b in zip(efficiency, efficiency[1:], strict=False))
    said = on_paper.scale_table(simulated)
    assert "1024 GPUs" in said and "no GPU has confirmed any of it" in said
    for words in simulated["breaks_first"].values():
        assert words in said


def test_what_breaks_first_is_what_is_short_first() -> None:
    device, fine = on_paper.DEVICES["h100"], {"waiting": 0.01, "waits_most": "update", "peak_gb": 60.0}
    steps = {f"hf, {gpus} GPUs": fine for gpus in on_paper.GPUS}
    assert on_paper._breaks_first(steps, "hf", device) == "nothing up to 1024 GPUs"
    steps["hf, 64 GPUs"] = fine | {"waiting": 0.25}
    said = on_paper._breaks_first(steps, "hf", device)
    assert said.startswith("links between machines, at 64 GPUs: 25%") and said.endswith("in update")
    steps["hf, 8 GPUs"] = fine | {"peak_gb": 81.0}
    assert on_paper._breaks_first(steps, "hf", device) == "memory, at 8 GPUs: 81 GB a rank"


def test_responses_end_by_chance_after_half_of_the_longest() -> None:
    policy = make_policy(TINY)
    # Or every way of generating would be measured without.
    assert policy.generation_config.use_cache
    torch.manual_seed(1)
    prompts = torch.randint(2, TINY.vocabulary, (400, 6))
    drawn = policy.generate(prompts, do_sample=True, top_k=0, max_new_tokens=200)[:, 6:]
    lengths = ((drawn == 1).cumsum(1) == 0).sum(1) + 1
    assert lengths.float().mean() == pytest.approx(TINY.responses[1] / 2, rel=0.25)
    tokenizer = make_tokenizer(TINY.vocabulary)
    assert len(tokenizer) == TINY.vocabulary and tokenizer("w0 w5").input_ids == [2, 7]


def test_padded_parts_hold_every_token_once() -> None:
    update = training_phase.Update(TINY, 1, torch.device("cpu"), False)
    for parts in update.padded.values():
        assert sum(int(part.response_mask.sum()) for part in parts) == int(update.experience.cu_seqlens[-1])
    rows = training_phase._in_order([3, 3, 3, 9, 1], 7)
    assert rows == [[0, 1], [2], [3], [4]]
