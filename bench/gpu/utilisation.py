"""How much of a device the policy update uses: forward and backward of one packed row of 16,384 tokens at the geometry
of a 7B model, as deep as fits, and the optimizer apart from them.

An optimizer that is not sharded, on a step of so few tokens, takes a share of the time that it does not take in a
training step of many: so it is told, and only forward and backward have a target. Model FLOPs are counted as in
`training_phase`.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from bench.measuring.measure import Task, elapsed_ms, median_ms, rounds_within
from bench.measuring.tables import at_least, render
from bench.training_phase import GEOMETRIES, OURS, PATHS, Geometry, Update, layers_that_fit
from repo_fast.speed.flops import peak_flops

FORWARD_BACKWARD, OPTIMIZER, WHOLE_STEP = "forward and backward", "optimizer", "with the optimizer"
LEAST_UTILISATION = 0.5


def utilisation(geometry: Geometry, layers: int, device: torch.device, budget_s: float) -> dict[str, Any]:
    """How much of the device a step of ours uses: forward and backward, and the optimizer apart from them.

    Returns:
        What was measured, with `parts` by name: `ms`, the median; `model_tflops` (TFLOP/s) and `mfu`, their share of
        the data sheet's, of forward and backward and of these with the optimizer (None where it is not known).
    """
    update = Update(geometry, layers, device, checkpointing=False)
    parts = {FORWARD_BACKWARD: Task(partial(update.backward, PATHS[OURS])), OPTIMIZER: Task(update.optimizer.step)}
    ms = {}
    # In this order: the optimizer's moments are made in its first step.
    for name, task in parts.items():
        elapsed_ms(task, device)
        rounds = rounds_within(budget_s / len(parts), elapsed_ms(task, device))
        ms[name] = median_ms(task, device, rounds)
    ms[WHOLE_STEP] = sum(ms.values())
    lengths, response_tokens = update.experience.lengths(), int(update.experience.cu_seqlens[-1])
    work, peak = geometry.flop(layers, lengths, response_tokens), peak_flops(device)
    rows: dict[str, dict[str, Any]] = {name: {"ms": value} for name, value in ms.items()}
    for name in (FORWARD_BACKWARD, WHOLE_STEP):
        rate = 1e3 * work / ms[name]
        rows[name] |= {"model_tflops": 1e-12 * rate, "mfu": None if peak is None else rate / peak}
    return {
        "geometry": asdict(geometry),
        "layers": layers,
        "parameters": sum(p.numel() for p in update.model.parameters()),
        "tokens": sum(lengths),
        "rows": len(update.rows[PATHS[OURS].balanced, PATHS[OURS].shared]),
        "parts": rows,
    }


def units(device: torch.device, tiny: bool, budget_s: float) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The measurement: its name, and a function that makes it.

    Args:
        device: Where to measure.
        tiny: A geometry of no interest, for a test.
        budget_s: Seconds for all rounds.
    """
    name = "tiny" if tiny else "alpaca-7b, one row"
    layers = layers_that_fit(GEOMETRIES[name], device)
    yield f"utilisation, {name}, {layers} layers", partial(utilisation, GEOMETRIES[name], layers, device, budget_s)


def judge(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The target of the utilisation against what `units` found, by name: `value`, `target` and whether `met`."""
    targets: dict[str, Any] = {}
    for name, result in results.items():
        mfu = result["parts"][FORWARD_BACKWARD]["mfu"]
        if mfu is not None:
            targets[f"model FLOP {name}, {FORWARD_BACKWARD}"] = at_least(mfu, LEAST_UTILISATION)
    return targets


def table(results: dict[str, dict[str, Any]]) -> str:
    """What `units` found, as text."""
    rows = []
    for name, result in results.items():
        rows.append([f"{name}, {result['tokens']} tokens", "", "", ""])
        for part, row in result["parts"].items():
            cells = [f"{row['ms']:.1f}", f"{row['model_tflops']:.1f}" if "model_tflops" in row else ""]
            rows.append([f"  {part}", *cells, f"{row['mfu']:.1%}" if row.get("mfu") is not None else ""])
    return render(["ours", "ms", "model TFLOP/s", "MFU"], rows)
