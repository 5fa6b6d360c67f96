"""The GPU suite on the CPU: it runs whole, its checks can fail, and a run that is cut off leaves what it measured."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import gpu_suite, training_phase
from bench.gpu import kernels, utilisation
from bench.gpu_suite import PARTS, Part
from bench.loss_head.chunks import chunks_of
from bench.measuring import measure, suite
from bench.measuring.measure import Task
from repo_fast.models.attention import run_packed
from repo_fast.ops import sweep
from tests.job_runs import REPOSITORY

CPU = torch.device("cpu")
# A machine with a GPU need not have DeepSpeed.
LEFT_OUT = () if importlib.util.find_spec("deepspeed") else ("rollout",)
TINY = training_phase.GEOMETRIES["tiny"]


def results_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_runs_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    results = results_in(tmp_path)
    assert list(results["parts"]) == list(PARTS)
    for name, record in results["parts"].items():
        assert record["status"] == "done" and not record["failures"]
        assert bool(record["results"]) == (name not in LEFT_OUT)
    assert results["summary"]["checks_passed"] > 150 and results["summary"]["checks_failed"] == []
    assert (tmp_path / "tables.md").read_text() in printed
    assert {path.name for path in tmp_path.iterdir()} == {"tables.md", "results.json"}


def test_needs_no_extension_and_no_deepspeed(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules |= {'repo_fast._C': None, 'deepspeed': None}; from bench import gpu_suite;"
        f"sys.exit(gpu_suite.main(['--out', {str(tmp_path)!r}, '--parts', 'environment', 'limits']))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert results_in(tmp_path)["parts"]["limits"]["status"] == "done"


def units(*measures: Callable[[], dict[str, Any]]) -> Part:
    def generate(device: torch.device, tiny: bool, budget_s: float) -> Iterator[tuple[str, Callable]]:
        yield from ((f"unit {i}", measure) for i, measure in enumerate(measures))

    return Part(generate, str, seconds=60)


def run(part: Part, seconds: float = 60.0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a part returns, and what it asked to be kept, as it was then."""
    kept: list[str] = []
    keep = lambda record: kept.append(json.dumps(record))  # noqa: E731
    record = suite.run_part("part", part, CPU, True, time.monotonic() + seconds, keep)
    return record, [json.loads(text) for text in kept]


def test_a_failure_is_kept_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, kept = run(units(lambda: {"a": 1}, lambda: {"b": 1 / 0}, lambda: {"c": 3}))
    assert record["status"] == "failed" and list(record["results"]) == ["unit 0", "unit 2"]
    assert "ZeroDivisionError" in record["failures"]["unit 1"]
    assert kept[-1] == record
    monkeypatch.setitem(PARTS, "environment", units(lambda: {"b": 1 / 0}))
    assert gpu_suite.main(["--out", str(tmp_path), "--parts", "environment"]) == 1


def test_what_was_measured_is_on_disk_before_the_next_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this part and of those before it, whose tables are there too."""
    found = []

    def killed() -> dict[str, Any]:
        found.append(results_in(tmp_path)["parts"])
        raise KeyboardInterrupt

    monkeypatch.setitem(PARTS, "environment", units(lambda: {"a": 1}))
    monkeypatch.setitem(PARTS, "correctness", units(lambda: {"passed": True, "errors": {"x": (0, 1)}}, killed))
    with pytest.raises(KeyboardInterrupt):
        gpu_suite.main(["--out", str(tmp_path), "--parts", "environment", "correctness"])
    assert found[0]["environment"]["status"] == "done" and found[0]["correctness"]["status"] == "running"
    assert list(found[0]["correctness"]["results"]) == ["unit 0"]
    assert (tmp_path / "tables.md").read_text() == "{'unit 0': {'a': 1}}\n"


def test_units_past_the_deadline_are_named() -> None:
    record, _ = run(units(lambda: {"a": 1}, lambda: {"b": 2}), seconds=-1)
    assert record["status"] == "out of time" and record["left_out"] == ["unit 0", "unit 1"] and not record["results"]


@pytest.mark.parametrize("part", PARTS)
def test_units_have_names_of_their_own_on_a_gpu(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (78 << 30, 80 << 30))
    names = [name for name, _ in PARTS[part].units(torch.device("cuda"), False, 1.0)]
    assert bool(names) == (part not in LEFT_OUT) and len(set(names)) == len(names)


# ------------------------------------------------------------------------------------------------------ kernels


def test_what_is_tuned_and_looked_for_exists() -> None:
    from repo_fast.kernels import fused_rectified_policy_loss, linear_log_probs

    settings = list(kernels.settings(torch.device("cuda")))
    shipped = [name.partition(" = ")[0] for name, is_shipped, _ in settings if is_shipped]
    assert shipped == [
        "VECTOR_BYTES",
        "ROW_ALIGNMENT_BYTES",
        "BYTES_PER_THREAD",
        "MAX_THREADS",
        "TILE_BYTES_PER_THREAD",
    ]
    before = linear_log_probs.BYTES_PER_THREAD
    for name, is_shipped, setting in settings:
        with setting():
            assert (linear_log_probs.BYTES_PER_THREAD == before) == (name[:5] != "BYTES" or is_shipped)
    for kernel in kernels.ROW_KERNELS:
        assert hasattr(fused_rectified_policy_loss, kernel) or hasattr(linear_log_probs, kernel)


@pytest.mark.parametrize("rows", [16, 48])
def test_a_chunk_has_the_rows_that_it_is_given(rows: int) -> None:
    seen = []

    def count(logits: Tensor, hidden: Tensor, start: int, stop: int, out: Tensor) -> None:
        seen.append(logits.shape[0])

    with chunks_of(rows):
        sweep.sweep(torch.ones(96, 4), torch.ones(3, 4), None, count)
    assert seen == [rows] * (96 // rows)


def test_idle_is_what_no_kernel_covers() -> None:
    assert kernels.idle([(5, 6), (0, 2), (1, 3), (1.5, 1.75)]) == 2
    assert kernels.idle([]) == 0


def row(ms: float, share: float = 1.0, scratch_mib: float = 100) -> dict[str, float]:
    return {"ms": ms, "share": share, "scratch_mib": scratch_mib}


def verdicts(shape: kernels.Shape, computation: str, device: str = "CPU", **peers: dict[str, Any]) -> dict[str, bool]:
    """By target: whether it is met."""
    result = {"shape": vars(shape), "computation": computation, "device": device, "peers": peers}
    return {name: target["met"] for name, target in kernels.judge({"unit": result}).items()}


def test_targets_are_judged() -> None:
    peers = {"repo_fast": row(10, 0.92), "plain": row(20, 0.5, 600), "cce": row(9, 1.1, 1), "liger": {"why_not": ""}}
    assert verdicts(kernels.ALPACA, "policy_loss", **peers, products=row(9.2)) == {
        "three products / fused op, T 16384, D 4096, V 32001": False,
        "time of plain / fused op, T 16384, D 4096, V 32001": True,
        "time of cce / fused op, T 16384, D 4096, V 32001": False,
        "scratch of fused op / plain, T 16384, D 4096, V 32001": True,
    }
    assert verdicts(kernels.ALPACA, "log_probs", **peers) == {"one product / log-probs, T 16384, D 4096, V 32001": True}
    assert verdicts(kernels.PUBLISHED_NARROW, "policy_loss", **peers) == {}


def test_scratch_is_judged_by_the_number_of_tokens() -> None:
    peers = {"repo_fast": row(10), "plain": row(20, scratch_mib=500)}
    name = "scratch of fused op / plain"
    (short, *_) = kernels.SHORT
    assert verdicts(short, "policy_loss", **peers) == {f"{name}, {short}": True}
    assert not verdicts(kernels.ALPACA, "policy_loss", **peers)[f"{name}, {kernels.ALPACA}"]
    assert f"{name}, {kernels.HALF_IGNORED}" not in verdicts(kernels.HALF_IGNORED, "policy_loss", **peers)


def test_milliseconds_are_judged_where_the_published_ones_were_measured() -> None:
    shape, h100 = kernels.PUBLISHED, "NVIDIA H100 80GB HBM3"
    ms = f"ms of policy_loss, {shape}, {kernels.PUBLISHED_ON}"
    assert verdicts(shape, "policy_loss", h100, repo_fast=row(39.1))[ms] is False
    assert verdicts(shape, "policy_loss", h100, repo_fast=row(38.9))[ms] is True
    assert verdicts(shape, "policy_loss", "NVIDIA H200", repo_fast=row(30, 0.92)) == {
        f"three products / fused op, {shape}": False
    }
    log_probs = verdicts(shape, "log_probs", h100, repo_fast=row(12.6))
    assert log_probs[f"ms of log_probs, {shape}, {kernels.PUBLISHED_ON}"] is False


def test_of_a_shape_measured_twice_the_first_counts() -> None:
    shape = vars(kernels.ALPACA)
    first = {"repo_fast": row(10, 0.95)}
    second = {"repo_fast": row(10, 0.5), "compile": row(15)}
    results = [
        {"shape": shape, "computation": "policy_loss", "device": "", "peers": peers} for peers in (first, second)
    ]
    assert {name: target["met"] for name, target in kernels.judge(dict(enumerate(results))).items()} == {
        f"three products / fused op, {kernels.ALPACA}": True,
        f"time of compile / fused op, {kernels.ALPACA}": True,
    }


def test_a_peer_with_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(peer: Any, computation: str, case: Any, results: Any) -> None:
        assert peer.name != bad, "wrong"

    monkeypatch.setattr(kernels, "check", wrong)
    names = ("repo_fast", "plain")
    bad = "plain"
    peers = kernels.compare(kernels.TINY, "policy_loss", names, CPU, 0.1)["peers"]
    assert "ms" in peers["repo_fast"] and peers["plain"] == {"why_not": "AssertionError: wrong"}
    bad = "repo_fast"
    with pytest.raises(AssertionError, match="wrong"):
        kernels.compare(kernels.TINY, "policy_loss", names, CPU, 0.1)


# ----------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_paths_compute_the_same_loss_and_gradients(checkpointing: bool) -> None:
    update = training_phase.Update(TINY, 2, CPU, checkpointing)
    losses, gradients = {}, {}
    for name, path in training_phase.PATHS.items():
        update.model.zero_grad()
        losses[name] = update.backward(path).item()
        gradients[name] = {n: p.grad.clone() for n, p in update.model.named_parameters()}
    truth = gradients[training_phase.BASELINE]
    assert losses[training_phase.BASELINE] != 0
    for name in training_phase.PATHS:
        assert losses[name] == pytest.approx(losses[training_phase.BASELINE], abs=1e-5)
        for parameter, gradient in gradients[name].items():
            assert (gradient - truth[parameter]).norm() <= 1e-5 * truth[parameter].norm()


def test_lengths_have_half_the_longest_as_their_mean() -> None:
    experience = training_phase.make_experience(training_phase.GEOMETRIES["alpaca-7b"])
    padded = training_phase.Padded.of(experience, range(16), CPU)
    lengths = experience.lengths()
    assert padded.input_ids.shape == (16, 512) and padded.attention_mask.sum() == sum(lengths)
    assert sum(lengths) / 16 == pytest.approx(512 / 2, abs=1.5)
    assert padded.response_mask.sum() == padded.old_log_probs.numel() == experience.cu_seqlens[-1]


def test_model_flop_are_those_of_the_products_that_run() -> None:
    update = training_phase.Update(TINY, 2, CPU, False)
    with FlopCounterMode(display=False) as counter:
        update.backward(training_phase.PATHS["ours without the fused head"])
    lengths = update.experience.lengths()
    attention = 3 * 2 * 2 * TINY.width * sum(length**2 for length in lengths)
    products = TINY.flop(2, lengths, int(update.experience.cu_seqlens[-1])) - attention
    assert len(update.rows[True, False]) > 1
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == products


def test_scaled_figures_lie_on_a_line() -> None:
    def at(layers: int) -> dict[str, Any]:
        paths = {training_phase.BASELINE: {"ms": 10.0 + 4 * layers}, "ours": {"ms": 4.0 + 2 * layers}}
        return {"layers": layers, "tokens": 1000, "paths": paths}

    scaled = training_phase.scale(training_phase.GEOMETRIES["alpaca-7b"], at(8), at(4))
    assert scaled["layers"] == 32 and scaled["measured_layers"] == [4, 8]
    assert scaled["paths"]["ours"]["scaled_ms"] == pytest.approx(68.0)
    assert scaled["paths"]["ours"]["scaled_speedup"] == pytest.approx(138 / 68)
    assert "scaled to 32 layers" in training_phase.table({"alpaca-7b, scaled to 32 layers": scaled})


@pytest.mark.parametrize("name", ["alpaca-7b", "alpaca-7b, one row"])
def test_states_and_activations_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = training_phase.GEOMETRIES[name]
    for gib in (40, 78, 139, 1000):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, gib=gib: (gib << 30, gib << 30))
        layers = training_phase.layers_that_fit(geometry, torch.device("cuda"))
        parameters = layers * geometry.layer_parameters + 2 * geometry.width * geometry.vocabulary
        activations = layers * geometry.micro_batch_tokens * geometry.layer_activation_bytes
        held = parameters * training_phase.STATE_BYTES + activations
        assert 2 <= layers <= 32 and held <= 0.8 * (gib << 30)
        a_layer = geometry.layer_parameters * training_phase.STATE_BYTES + activations // layers
        assert layers == 32 or held + a_layer > 0.8 * (gib << 30)


def test_a_layer_keeps_as_much_for_the_backward_as_is_said() -> None:
    geometry = replace(training_phase.GEOMETRIES["alpaca-7b"], width=64, heads=2, intermediate=172, vocabulary=31)
    geometry = replace(geometry, sequences=4, prompts=(4, 4), responses=(12, 12), micro_batch_tokens=64)
    kept = []
    for layers in (1, 3):
        update = training_phase.Update(geometry, layers, CPU, False)
        update.model.to(torch.bfloat16)
        own = {parameter.untyped_storage().data_ptr() for parameter in update.model.parameters()}
        saved: dict[int, Tensor] = {}

        def keep(x: Tensor, own: set[int] = own, saved: dict[int, Tensor] = saved) -> Tensor:
            if x.untyped_storage().data_ptr() not in own:
                saved[x.untyped_storage().data_ptr()] = x
            return x

        (row,) = update.rows[True, False]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            run_packed(update.model.base_model, row.batch.input_ids, row.batch.position_ids)
        kept.append(sum(x.untyped_storage().nbytes() for x in saved.values()))
    assert (kept[1] - kept[0]) / (2 * 64) == pytest.approx(geometry.layer_activation_bytes, rel=0.1)


def test_a_row_has_the_tokens_that_it_is_named_for() -> None:
    geometry = training_phase.GEOMETRIES["alpaca-7b, one row"]
    assert sum(training_phase.make_experience(geometry).lengths()) == 16384 == geometry.micro_batch_tokens


def test_utilisation_is_model_flop_over_the_time_of_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's time is told apart, and counts in the other figure alone."""
    took = {"backward": 20.0, "step": 60.0}

    def timed(task: Task, device: torch.device) -> float:
        run = task.run.func if isinstance(task.run, partial) else task.run
        return took[run.__name__]

    monkeypatch.setattr(utilisation, "elapsed_ms", timed)
    monkeypatch.setattr(measure, "elapsed_ms", timed)
    monkeypatch.setattr(utilisation, "peak_flops", lambda device: 1e9)
    result = utilisation.utilisation(TINY, 2, CPU, 1.0)
    experience = training_phase.make_experience(TINY)
    work = TINY.flop(2, experience.lengths(), int(experience.cu_seqlens[-1]))
    parts = result["parts"]
    assert parts[utilisation.FORWARD_BACKWARD]["mfu"] == pytest.approx(work / 0.020 / 1e9)
    assert parts[utilisation.WHOLE_STEP]["mfu"] == pytest.approx(work / 0.080 / 1e9)
    assert parts[utilisation.OPTIMIZER] == {"ms": 60.0}
    monkeypatch.setattr(utilisation, "LEAST_UTILISATION", work / 0.025 / 1e9)
    (target,) = utilisation.judge({"unit": result}).values()
    assert target["met"] and target["value"] == parts[utilisation.FORWARD_BACKWARD]["mfu"]
    monkeypatch.setattr(utilisation, "LEAST_UTILISATION", work / 0.015 / 1e9)
    (target,) = utilisation.judge({"unit": result}).values()
    assert not target["met"]


def test_masters_keep_steps_that_bfloat16_would_round_away() -> None:
    parameter = torch.ones(4, dtype=torch.bfloat16)
    optimizer = training_phase.MasterAdamW([parameter])
    optimizer.adam.param_groups[0]["lr"] = 1e-3
    for _ in range(20):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert parameter.max() < 0.99  # a step of 0.001 from 1 is less than half of bfloat16's 1/256 below it
