"""The trainer beside the peers and beside itself: one run, the same model, prompts, lengths and machine.

    python -m bench.trainer --out DIR

    environment   the machine, its bare speed, versions
    update        tokens/s of the policy update: ours, ours with each feature off in turn, padded batches with full
                  logits as in Safe RLHF                                                            (training_phase.py)
                  TRL's GRPOTrainer at its best micro-batch size                                        (trl_update.py)
    rollout       tokens/s of generation on two ranks under ZeRO-3: ours by Hugging Face, and by vLLM where it can be
                  imported, `generate` as peers call it                                             (rollout_phase.py)
    step          whole steps on one rank and on two, phase by phase, and their overhead                (step_phase.py)
    growth        how a step grows with the length of responses, K, the width of the model              (step_phase.py)
                  and what `repo_fast.plan` would have said                                               (on_paper.py)
    scale         a step of Alpaca-7B on 8 to 1024 GPUs by the plan's formulas, on paper                  (on_paper.py)

The geometry is that of `training_phase.GEOMETRIES`: a Llama of 4 layers, width 256, 32,001 tokens; 32 responses of 1 to
256 tokens a step. DIR gets a JSON file for each part, `trainer.json` with the object `ratios`, `tables.md`, and
`beside.png`, `growth.png`. A run that is cut off leaves what it had measured. Exit status: not 0 if something failed;
missed targets are told, and are no failure. With `--tiny`, sizes of no interest, as a test of the benchmark itself.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import rollout_phase, training_phase
from bench.measuring.machine import environment_table, environment_units
from bench.measuring.measure import Task, Timing, elapsed_ms, time_interleaved
from bench.measuring.suite import Part, Results, run_part, write_json
from bench.measuring.tables import at_least, at_most, render, render_targets
from bench.trainer import on_paper
from bench.trainer.processes import torchrun, with_job
from bench.trainer.trl_update import MICRO_BATCH_SIZES, TrlUpdate
from bench.training_phase import BASELINE, GEOMETRIES, IN_PARTS, OURS, Geometry, Update
from repo_fast.speed.throughput import PHASES

CPU = torch.device("cpu")
TRL = "TRL's GRPOTrainer"
# Of a measured run; the first is not counted.
STEPS, GROWTH_STEPS = 7, 4
# Losses of a fast and a plain path may differ by this (float32).
SAME_LOSS = 1e-5
Unit = tuple[str, Callable[[], dict[str, Any]]]


def geometry_of(tiny: bool) -> Geometry:
    return GEOMETRIES["tiny" if tiny else "cpu"]


# ----------------------------------------------------------------------------------------------------- update


def update_units(device: torch.device, tiny: bool, budget_s: float) -> Iterator[Unit]:
    geometry = geometry_of(tiny)
    yield "paths", partial(training_phase.measure, geometry, geometry.layers, CPU, False, budget_s * 0.25)
    yield TRL, partial(beside_trl, geometry, budget_s * 0.1)


def beside_trl(geometry: Geometry, budget_s: float) -> dict[str, Any]:
    """An optimizer step of ours beside TRL's, which is tried at every micro-batch size first.

    Returns:
        `micro_batch_ms` by TRL's micro-batch sizes, and of the fastest of them `ms`, `tokens_per_s` and `ours_ms`;
        `ratio`, ours to TRL's.
    """
    update = Update(geometry, geometry.layers, CPU, checkpointing=False)
    sizes = [size for size in MICRO_BATCH_SIZES if size <= update.experience.responses]
    tried = {}
    for size in sizes:
        task = Task(TrlUpdate(update, size).step)
        elapsed_ms(task, CPU)
        tried[size] = min(elapsed_ms(task, CPU) for _ in range(2))
    best = min(tried, key=lambda size: tried[size])
    trl, ours = Task(TrlUpdate(update, best).step), Task(partial(update.step, training_phase.PATHS[OURS]))
    timing = time_interleaved({OURS: ours}, trl, CPU, budget_s)[OURS]
    tokens = sum(update.experience.lengths())
    trl_ms = Timing(timing.floor_milliseconds, timing.floor_milliseconds).median_ms
    return {
        "micro_batch_ms": tried,
        "micro_batch_size": best,
        "ms": trl_ms,
        "ours_ms": timing.median_ms,
        "tokens_per_s": 1e3 * tokens / trl_ms,
        "ratio": timing.share_of_floor,
    }


def update_table(results: Results) -> str:
    tables = []
    if "paths" in results:
        tables.append(training_phase.table({"update": results["paths"]}))
    if TRL in results:
        row = results[TRL]
        tables.append(
            render(
                ["update beside TRL", "ms a step", "tokens/s", "x TRL"],
                [
                    [
                        f"TRL, {row['micro_batch_size']} responses at once",
                        f"{row['ms']:.1f}",
                        f"{row['tokens_per_s']:.0f}",
                        "1.00",
                    ],
                    [
                        OURS,
                        f"{row['ours_ms']:.1f}",
                        f"{row['tokens_per_s'] * row['ms'] / row['ours_ms']:.0f}",
                        f"{row['ratio']:.2f}",
                    ],
                ],
            )
        )
    return "\n\n".join(tables)


# ---------------------------------------------------------------------------------------------------- rollout


def rollout_units(device: torch.device, tiny: bool, budget_s: float) -> Iterator[Unit]:
    name = "tiny" if tiny else "cpu"

    def run(folder: Path) -> dict[str, Any]:
        return torchrun(2, "bench.rollout_phase", str(folder), "OUT", name)

    yield "two ranks, ZeRO-3", partial(with_job, GEOMETRIES[name], run)


# --------------------------------------------------------------------------------------------- step and growth


def take_steps(geometry: Geometry, ranks: int, responses_per_prompt: int, steps: int = STEPS) -> dict[str, Any]:
    """Whole steps of the main job: RePO with `rloo`, function scorers, ZeRO-3."""

    def run(folder: Path) -> dict[str, Any]:
        options = {
            "policy.path": folder / "policy",
            "data.prompts": folder / "prompts.jsonl",
            "data.eval_prompts": "null",
            "data.template": "plain",
            "reward.path": "bench.job_folder:reward",
            "cost.path": "bench.job_folder:cost",
            "algorithm.advantage": "rloo",
            "rollout.prompts_per_step": geometry.sequences // responses_per_prompt,
            "rollout.responses_per_prompt": responses_per_prompt,
            "rollout.max_new_tokens": geometry.responses[1],
            "update.micro_batch_tokens": geometry.micro_batch_tokens,
            # So small that the policy goes on as it is: the lengths stay comparable.
            "policy_optimizer.learning_rate": 1e-9,
            "checkpoint.every": 0,
            "log.loggers": "[]",
            "total_steps": steps,
            "output_dir": folder / "run",
        }
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        return torchrun(ranks, "bench.step_phase", "OUT", *words)

    return with_job(geometry, run)


def step_units(device: torch.device, tiny: bool, budget_s: float) -> Iterator[Unit]:
    for ranks in (1, 2):
        yield f"{ranks} rank{'s' * (ranks > 1)}", partial(take_steps, geometry_of(tiny), ranks, 4)


UNCHANGED = "unchanged"


def growth_settings(geometry: Geometry) -> dict[str, tuple[Geometry, int]]:
    """Geometries and responses a prompt, by what is changed and its value; `UNCHANGED` comes first."""
    longest = geometry.responses[1]
    settings = {UNCHANGED: (geometry, 4)}
    for length in (longest // 4, longest // 2, 2 * longest):
        settings[f"longest response {length}"] = (replace(geometry, responses=(1, length)), 4)
    # So many responses of each of the same prompts.
    for count in (2, 8):
        sequences = geometry.sequences // 4 * count
        settings[f"responses a prompt {count}"] = (replace(geometry, sequences=sequences), count)
    for factor in (0.5, 2):
        width, intermediate = int(geometry.width * factor), int(geometry.intermediate * factor)
        settings[f"width {width}"] = (replace(geometry, width=width, intermediate=intermediate), 4)
    return settings


def growth_units(device: torch.device, tiny: bool, budget_s: float) -> Iterator[Unit]:
    for name, (geometry, count) in growth_settings(geometry_of(tiny)).items():
        yield name, partial(take_steps, geometry, 1, count, GROWTH_STEPS)


def plan_beside(growth: Results, geometry: Geometry) -> Results:
    """The plan's times beside those measured, by `on_paper.check_plan`; empty where its reference was not measured."""
    if UNCHANGED not in growth:
        return {}
    settings = growth_settings(geometry)
    steps = {
        name: (*settings[name], row["metrics"] | {"optimizer_seconds": row["seconds"]["optimizer"]})
        for name, row in growth.items()
    }
    return on_paper.check_plan(steps, UNCHANGED)


def scale_units(device: torch.device, tiny: bool, budget_s: float) -> Iterator[Unit]:
    yield "on paper", on_paper.simulate


def step_table(results: Results) -> str:
    header = ["whole steps", "seconds", *PHASES, "tokens/s", "overhead", "with log-probs"]
    rows = []
    for name, row in results.items():
        metrics = row["metrics"]
        phases = [f"{metrics[f'{phase}_seconds']:.2f}" for phase in PHASES]
        shares = [f"{share:.1%}" for share in (row["overhead_share"], _with_log_probs(row))]
        rows.append([name, f"{row['seconds']['step']:.2f}", *phases, f"{metrics['tokens_per_second']:.0f}", *shares])
    return render(header, rows)


def plot_growth(results: Results, geometry: Geometry, path: Path) -> None:
    """A panel for each thing that grows: the seconds of a step's phases."""
    from matplotlib.figure import Figure

    groups: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for name, row in results.items():
        if name != UNCHANGED:
            what, _, value = name.rpartition(" ")
            groups.setdefault(what, []).append((float(value), row["metrics"]))
    unchanged = {"longest response": geometry.responses[1], "responses a prompt": 4, "width": geometry.width}
    for what, points in groups.items():
        if UNCHANGED in results:
            points.append((unchanged[what], results[UNCHANGED]["metrics"]))
    figure = Figure(figsize=(4 * len(groups), 3.5), layout="constrained")
    for axes, (what, points) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        points.sort(key=lambda point: point[0])
        for phase in PHASES:
            seconds = [metrics[f"{phase}_seconds"] for _, metrics in points]
            axes.plot([value for value, _ in points], seconds, marker="o", label=phase)
        axes.set(xlabel=what, ylabel="seconds a step", xscale="log", yscale="log")
        axes.set_xticks([value for value, _ in points], [f"{value:g}" for value, _ in points], minor=False)
        axes.minorticks_off()
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def plot_beside(records: Mapping[str, Results], path: Path) -> None:
    """Tokens a second beside the peers, a bar for each way: of the update, and of generation."""
    from matplotlib.figure import Figure

    update = records.get("update", {})
    bars = {name: row["tokens_per_s"] for name, row in update.get("paths", {}).get("paths", {}).items()}
    if TRL in update:
        bars[TRL] = update[TRL]["tokens_per_s"]
    panels = {"update": bars}
    for ways in records.get("rollout", {}).values():
        panels["rollout"] = {name: row["tokens_per_s"] for name, row in ways.items()}
    panels = {what: bars for what, bars in panels.items() if bars}
    figure = Figure(figsize=(6.5 * len(panels), 3.5), layout="constrained")
    for axes, (what, bars) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        colours = ["tab:blue" if name.startswith(OURS) else "tab:grey" for name in bars]
        axes.barh(list(bars), list(bars.values()), color=colours)
        axes.invert_yaxis()
        axes.set(xlabel=f"{what}, tokens/s")
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------- judging


def ratios(records: Mapping[str, Results]) -> dict[str, float]:
    """The figures that the targets are about, of the parts that were measured."""
    found: dict[str, float] = {}
    update = records.get("update", {})
    if "paths" in update:
        paths = update["paths"]["paths"]
        own = paths[OURS]["speedup"]
        found["update_vs_padded"] = own
        found["update_vs_padded_in_parts"] = own / paths[IN_PARTS]["speedup"]
        found["update_vs_padded_flops"] = own / update["paths"]["speedup_by_flop"]
    if TRL in update:
        found["update_vs_trl"] = update[TRL]["ratio"]
    for ways in records.get("rollout", {}).values():
        baseline = ways[rollout_phase.HOOKS_ON]["tokens_per_s"]
        found["rollout_vs_zero3_generate"] = ways[rollout_phase.OURS]["tokens_per_s"] / baseline
        if rollout_phase.OURS_VLLM in ways:
            found["rollout_vllm_vs_zero3_generate"] = ways[rollout_phase.OURS_VLLM]["tokens_per_s"] / baseline
    if "1 rank" in records.get("step", {}):
        row = records["step"]["1 rank"]
        found["overhead_share"] = row["overhead_share"]
        found["overhead_share_with_log_probs"] = _with_log_probs(row)
    return found


def _with_log_probs(row: Mapping[str, Any]) -> float:
    """The share of a step outside generation, scoring and the update's work on the model: the forwards that give
    log-probabilities of policy and reference, which are model work too, are then called overhead."""
    return row["overhead_share"] + row["metrics"]["experience_seconds"] / row["seconds"]["step"]


TARGETS = {
    "update_vs_padded": partial(at_least, target=2.2),
    "update_vs_padded_flops": partial(at_least, target=0.9),
    "update_vs_trl": partial(at_least, target=2.0),
    "rollout_vs_zero3_generate": partial(at_least, target=2.5),
    "overhead_share": partial(at_most, target=0.05),
}


def wrong_losses(update: Results) -> dict[str, float]:
    """The paths whose loss is not that of the plain one, and by how much; relative where the loss is above 1."""
    losses = {name: row["loss"] for name, row in update.get("paths", {}).get("paths", {}).items()}
    if not losses:
        return {}
    plain = losses[BASELINE]
    gaps = {name: abs(loss - plain) / max(1.0, abs(plain)) for name, loss in losses.items()}
    return {name: gap for name, gap in gaps.items() if not gap <= SAME_LOSS or math.isnan(gap)}


# ---------------------------------------------------------------------------------------------------- running

PARTS = {
    "environment": Part(environment_units, environment_table, 20),
    "update": Part(update_units, update_table, 1200),
    "rollout": Part(rollout_units, rollout_phase.table, 300),
    "step": Part(step_units, step_table, 600),
    "growth": Part(growth_units, step_table, 1800),
    "scale": Part(scale_units, lambda results: on_paper.scale_table(results["on paper"]), 60),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; made if it is not there")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    parser.add_argument("--again", action="store_true", help="measure nothing: summarize anew what DIR holds")
    parser.add_argument("--tiny", action="store_true", help="sizes of no interest: a test of the benchmark")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    records: dict[str, dict[str, Any]] = {}
    for name in options.parts:
        deadline = time.monotonic() + PARTS[name].seconds
        if not options.again:
            keep = partial(write_json, options.out / f"{name}.json")
            records[name] = run_part(name, PARTS[name], CPU, options.tiny, deadline, keep)
        elif (options.out / f"{name}.json").is_file():
            records[name] = json.loads((options.out / f"{name}.json").read_text())
    results = {name: record["results"] for name, record in records.items() if record["results"]}
    found = ratios(results)
    targets = {name: TARGETS[name](value) for name, value in found.items() if name in TARGETS}
    failures = {name: list(record["failures"]) for name, record in records.items() if record["failures"]}
    summary = {
        "ratios": found,
        "targets": targets,
        "wrong_losses": wrong_losses(results.get("update", {})),
        "failures": failures,
        "left_out": {name: record["left_out"] for name, record in records.items() if record["left_out"]},
        "plan": plan_beside(results.get("growth", {}), geometry_of(options.tiny)),
        "results": results,
    }
    write_json(options.out / "trainer.json", summary)
    if results.get("update") or results.get("rollout"):
        plot_beside(results, options.out / "beside.png")
    if results.get("growth"):
        plot_growth(results["growth"], geometry_of(options.tiny), options.out / "growth.png")
    tables = [PARTS[name].table(result) for name, result in results.items()]
    if summary["plan"]:
        tables.append(on_paper.check_table(summary["plan"]))
    tables.append(render_targets(targets))
    text = "\n\n".join(table for table in tables if table)
    (options.out / "tables.md").write_text(text + "\n")
    print(text)
    for key in ("wrong_losses", "failures", "left_out"):
        print(f"{key}: {summary[key]}")
    return 1 if failures or summary["wrong_losses"] else 0


if __name__ == "__main__":
    sys.exit(main())
