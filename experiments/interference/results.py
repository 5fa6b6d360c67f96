"""What came out: measures of each setting over its seeds, the frontier, and curves over training."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.interference.settings import FAMILIES, Setting, headline
from experiments.interference.world import START
from repo_fast.report.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURES = (
    "strict_violation",
    "interference_rate",
    "repair_rate",
    "safety_rate",
    "mean_reward",
    "win_rate",
    "mean_cost",
    "compensation",
    "well_formed",
)
# Compared at the same seeds: the per-prompt constraint, and the average one, of the same margin.
PAIRS = (("repo-0", "ppo_lag-0"), ("repo-1", "ppo_lag-1"), ("repo-0", "repo_response-0"), ("repo-0", "hc_lag"))
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_AXES = ("strict_violation", "mean_reward")
_COLORS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito's
_MARKERS = ("o", "s", "^", "D", "v", "P")


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % t-interval over seeds; the bounds are NaN for a single one."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = _T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def write_results(
    output_dir: Path, grid: list[Setting], folders: Mapping[tuple[str, int], Path], reports: Mapping[str, dict]
) -> str:
    """Write `results.json`, `results.md`, `frontier.png` and `curves.png`.

    Args:
        output_dir: Where to.
        grid: The settings.
        folders: Of the run of each setting's name and seed.
        reports: By judge, `rules` and `learned`: `report.json` with policies `SETTING.SEED`.

    Returns:
        The content of `results.md`.
    """
    table: dict[str, dict] = {}
    for judge, report in reports.items():
        table[judge] = {
            setting.name: {
                measure: _over_seeds(report, setting, measure)
                for measure in MEASURES
                if measure in report["policies"][START]
            }
            for setting in grid
        }
    text = "\n\n".join(
        [
            *(_markdown(judge, grid, table[judge], reports[judge]["policies"][START]) for judge in reports),
            _paired_differences(grid, reports),
        ]
    )
    (output_dir / "results.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    (output_dir / "results.md").write_text(text + "\n", encoding="utf-8")
    _draw_frontier(output_dir / "frontier.png", grid, table, reports)
    _draw_curves(output_dir / "curves.png", grid, folders)
    return text


def _values(report: dict, setting: Setting, measure: str) -> list[float]:
    values = [report["policies"][f"{setting.name}.{seed}"][measure]["value"] for seed in range(setting.seeds)]
    return [math.nan if value is None else value for value in values]


def _over_seeds(report: dict, setting: Setting, measure: str) -> dict:
    values = _values(report, setting, measure)
    mean, low, high = interval(values)
    bounds = {"low": low, "high": high}
    return {"mean": mean, **{k: None if math.isnan(v) else v for k, v in bounds.items()}, "seeds": values}


def _label(setting: Setting) -> str:
    family = FAMILIES[setting.family]
    if family.knob is None:
        return family.label
    knob = {"algorithm.margin": "m", "algorithm.shaping_weight": "w"}[family.knob]
    return f"{family.label}, {knob} = {setting.value:g}"


def _markdown(judge: str, grid: Sequence[Setting], table: Mapping, start: Mapping) -> str:
    measures = [measure for measure in MEASURES if measure in start]
    lines = [
        f"Judged by the {judge}. Mean over seeds and 95 % t-interval; `start`: 95 % bootstrap interval over prompts.",
        "",
        "| setting | seeds | " + " | ".join(measure.replace("_", " ") for measure in measures) + " |",
        "|---|---:|" + "---:|" * len(measures),
        "| start | | " + " | ".join(_cell(*(start[m][k] for k in ("value", "low", "high"))) for m in measures) + " |",
    ]
    for setting in grid:
        cells = [_cell(*(table[setting.name][m][k] for k in ("mean", "low", "high"))) for m in measures]
        lines.append(f"| {_label(setting)} | {setting.seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, low: float | None, high: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _paired_differences(grid: Sequence[Setting], reports: Mapping[str, dict]) -> str:
    by_name = {setting.name: setting for setting in grid}
    measures = ("strict_violation", "interference_rate", "mean_reward")
    lines = [
        "Differences at the same seeds, mean and 95 % t-interval:",
        "",
        "| first - second | judge | seeds | " + " | ".join(measure.replace("_", " ") for measure in measures) + " |",
        "|---|---|---:|" + "---:|" * len(measures),
    ]
    for first, second in PAIRS:
        if first not in by_name or second not in by_name:
            continue
        one, other = by_name[first], by_name[second]
        for judge, report in reports.items():
            cells = []
            for measure in measures:
                pairs = zip(_values(report, one, measure), _values(report, other, measure), strict=False)
                mean, low, high = interval([a - b for a, b in pairs])
                cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            seeds = min(one.seeds, other.seeds)
            lines.append(f"| {_label(one)} - {_label(other)} | {judge} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _draw_frontier(path: Path, grid: Sequence[Setting], table: Mapping, reports: Mapping[str, dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    for ax, judge, title in zip(
        panels, ("rules", "learned"), ("judged by the rules", "by the learned scores"), strict=True
    ):
        start = reports[judge]["policies"][START]
        ax.plot(start["strict_violation"]["value"], start["mean_reward"]["value"], "k*", markersize=13, label="start")
        for (name, family), color, marker in zip(FAMILIES.items(), _COLORS, _MARKERS, strict=True):
            rows = sorted((row for row in grid if row.family == name), key=lambda row: row.value or 0.0)
            if not rows:
                continue
            places = {m: np.array([table[judge][row.name][m]["mean"] for row in rows]) for m in _AXES}
            ax.plot(*(places[m] for m in _AXES), color=color, marker=marker, linewidth=1, label=family.label)
            for row in rows:
                seeds = [table[judge][row.name][m]["seeds"] for m in _AXES]
                ax.plot(*seeds, color=color, marker=marker, linestyle="", markersize=3, alpha=0.35)
                if row.value is not None:
                    here = [table[judge][row.name][m]["mean"] for m in _AXES]
                    ax.annotate(f"{row.value:g}", here, textcoords="offset points", xytext=(5, 4), fontsize=8)
        ax.set_xlabel("strict violation (units of the cost)")
        ax.set_ylabel("mean reward")
        ax.set_title(title)
        ax.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120, backend="agg")


def _draw_curves(path: Path, grid: list[Setting], folders: Mapping[tuple[str, int], Path]) -> None:
    """Headline settings over training, as their runs saw it: learned scores, training prompts, mean over seeds."""
    from matplotlib.figure import Figure

    panels = (
        ("reward", "mean reward (learned)"),
        ("strict_violation", "strict violation (learned)"),
        ("multiplier", "multiplier λ"),
        ("kl", "KL to the start (nats/response)"),
    )
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = list(figure.subplots(2, 2).flat)
    families = list(FAMILIES)
    for setting in headline(grid):
        color = _COLORS[families.index(setting.family)]
        dashed = setting.value is not None and setting.value != min(FAMILIES[setting.family].values)
        runs = [read_metrics(folders[setting.name, seed] / "metrics.jsonl") for seed in range(setting.seeds)]
        for ax, (metric, _) in zip(axes, panels, strict=True):
            curves = np.array([[float(row[metric]) for row in run] for run in runs])
            steps = np.arange(1, curves.shape[1] + 1)
            _draw_band(ax, steps, curves, color, "--" if dashed else "-", _label(setting))
    for ax, (_, label) in zip(axes, panels, strict=True):
        ax.set_ylabel(label)
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=120, backend="agg")


def _draw_band(ax: "Axes", steps: np.ndarray, curves: np.ndarray, color: str, style: str, label: str) -> None:
    """The mean over seeds, smoothed over five steps, and the range of the seeds' smoothed curves."""
    width = min(5, len(steps))
    smooth = np.array([np.convolve(curve, np.ones(width) / width, mode="valid") for curve in curves])
    at = steps[width - 1 :]
    ax.plot(at, smooth.mean(axis=0), color=color, linestyle=style, label=label)
    ax.fill_between(at, smooth.min(axis=0), smooth.max(axis=0), color=color, alpha=0.08, linewidth=0)
