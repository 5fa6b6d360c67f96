"""What came out: measures of each setting over its seeds, the frontier, and curves over training."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.interference.settings import FAMILIES, MULTIPLIER_RATE, Setting, headline
from experiments.runs import START
from experiments.seeds import cell, over_seeds
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
# The claim, as chosen before the grid was run: RePO's frontier against that of all PPO-Lagrangian runs, seed by seed.
ONE, OTHER = ("repo",), ("ppo_lag", "ppo_lag_alike")
PRIMARY_JUDGE = "rules"
# Also shown: settings that somebody might choose alike.
PAIRS = (
    ("repo-0", "ppo_lag-0"),
    ("repo-1", "ppo_lag-1"),
    ("repo-0", "ppo_lag_alike-0"),
    ("repo-1", "ppo_lag_alike-1"),
    ("repo-0", "hc_lag"),
    ("repo-0", "ppo"),
)
# Of a run, whose mean is its final λ.
_LAST_STEPS = 5
Point = tuple[float | None, float | None]

_AXES = ("strict_violation", "mean_reward")
_COLORS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#999999")  # Okabe and Ito's
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", ":")  # in the order of the knob's values


@dataclass(frozen=True)
class Gap:
    """How far one frontier is above another.

    Attributes:
        mean: Of the first's y - the second's, over the x that both have.
        low, high: The ends of that range.
    """

    mean: float
    low: float
    high: float


def gap_between(one: Sequence[Point], other: Sequence[Point], *, less_is_better: bool) -> Gap | None:
    """Compare two frontiers where both have points.

    A frontier is the best y at each x that its settings reach, or mixtures of them do: answering each prompt by one of
    two policies, drawn by lot, lies on the line between them. So a setting that others beat pulls no frontier down.

    Args:
        one, other: Points (x, y), one for each setting.
        less_is_better: Of y.

    Returns:
        None where they have no x in common, or a coordinate is not defined.
    """
    if any(value is None for point in (*one, *other) for value in point):
        return None
    low = max(min(x for x, _ in points) for points in (one, other))
    high = min(max(x for x, _ in points) for points in (one, other))
    if low > high:
        return None
    grid = np.linspace(low, high, 101)
    sign = -1.0 if less_is_better else 1.0
    ours, theirs = (sign * np.interp(grid, *_upper_hull([(x, sign * y) for x, y in points])) for points in (one, other))
    return Gap(float(np.mean(ours - theirs)), low, high)


def _upper_hull(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The x and y of the corners of the smallest concave function above the points, from left to right."""
    hull: list[tuple[float, float]] = []
    best: dict[float, float] = {}
    for x, y in points:
        best[x] = max(y, best.get(x, y))
    for x, y in sorted(best.items()):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) <= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return [x for x, _ in hull], [y for _, y in hull]


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
                measure: over_seeds(_values(report, setting, measure))
                for measure in MEASURES
                if measure in report["policies"][START]
            }
            | {"multiplier": over_seeds(_final_multipliers(setting, folders))}
            for setting in grid
        }
    text = "\n\n".join(
        [
            _frontier_differences(grid, reports),
            *(_markdown(judge, grid, table[judge], reports[judge]["policies"][START]) for judge in reports),
            _paired_differences(grid, reports),
        ]
    )
    (output_dir / "results.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    (output_dir / "results.md").write_text(text + "\n", encoding="utf-8")
    _draw_frontier(output_dir / "frontier.png", grid, table, reports)
    _draw_curves(output_dir / "curves.png", grid, folders)
    return text


def _values(report: dict, setting: Setting, measure: str) -> list[float | None]:
    return [report["policies"][f"{setting.name}.{seed}"][measure]["value"] for seed in range(setting.seeds)]


def _final_multipliers(setting: Setting, folders: Mapping[tuple[str, int], Path]) -> list[float | None]:
    if MULTIPLIER_RATE not in FAMILIES[setting.family].untuned():
        return [None] * setting.seeds
    runs = [read_metrics(folders[setting.name, seed] / "metrics.jsonl") for seed in range(setting.seeds)]
    return [statistics.fmean(float(row["multiplier"]) for row in run[-_LAST_STEPS:]) for run in runs]


def _label(setting: Setting) -> str:
    family = FAMILIES[setting.family]
    if family.knob is None:
        return family.label
    knob = {"algorithm.margin": "m", "algorithm.shaping_weight": "w"}[family.knob]
    return f"{family.label}, {knob} = {setting.value:g}"


def _markdown(judge: str, grid: Sequence[Setting], table: Mapping, start: Mapping) -> str:
    measures = [measure for measure in MEASURES if measure in start]
    named = [*(measure.replace("_", " ") for measure in measures), "final λ"]
    lines = [
        f"Judged by the {judge}. Mean over seeds and 95 % t-interval; `start`: 95 % bootstrap interval over prompts.",
        "",
        "| setting | seeds | " + " | ".join(named) + " |",
        "|---|---:|" + "---:|" * len(named),
        "| start | | "
        + " | ".join(cell(*(start[m][k] for k in ("value", "low", "high"))) for m in measures)
        + " | - |",
    ]
    for setting in grid:
        shown = [*measures, "multiplier"]
        cells = [cell(*(table[setting.name][m][k] for k in ("mean", "low", "high"))) for m in shown]
        lines.append(f"| {_label(setting)} | {setting.seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def frontier_gaps(grid: Sequence[Setting], report: Mapping, x: str, y: str) -> list[Gap | None]:
    """The gap between the frontiers of `ONE` and `OTHER`, of each seed that all their settings have.

    Args:
        grid: The settings.
        report: `report.json` with policies `SETTING.SEED`.
        x, y: Measures; less of y is better, but for the reward.
    """
    sides = [[row for row in grid if row.family in families] for families in (ONE, OTHER)]
    seeds = min((row.seeds for rows in sides for row in rows), default=0)
    gaps = []
    for seed in range(seeds):
        one, other = (
            [tuple(_values(report, row, measure)[seed] for measure in (x, y)) for row in rows] for rows in sides
        )
        gaps.append(gap_between(one, other, less_is_better=y != "mean_reward"))
    return gaps


def _frontier_differences(grid: Sequence[Setting], reports: Mapping[str, dict]) -> str:
    axes = (
        ("mean_reward", "strict_violation"),
        ("mean_reward", "interference_rate"),
        ("strict_violation", "mean_reward"),
    )
    names = [" and ".join(FAMILIES[name].label for name in families) for families in (ONE, OTHER)]
    lines = [
        f"The frontier of {names[0]} minus that of {names[1]}, at the same seeds: the best that settings and",
        "mixtures of two of them reach, on average over the range that both have; mean over seeds and 95 % t-interval.",
        "",
        "| | judge | seeds | difference | range in common, by seed |",
        "|---|---|---:|---:|---|",
    ]
    for judge, report in reports.items():
        for x, y in axes:
            found = [gap for gap in frontier_gaps(grid, report, x, y) if gap is not None]
            entry = over_seeds([gap.mean for gap in found] or [None])
            shown_gap = cell(entry["mean"], entry["low"], entry["high"], "+")
            primary = judge == PRIMARY_JUDGE and (x, y) == axes[0]
            what = f"{y} at equal {x}".replace("_", " ")
            ranges = ", ".join(f"{gap.low:.2f} to {gap.high:.2f}" for gap in found) or "none"
            shown = f"**{what}** (primary)" if primary else what
            lines.append(f"| {shown} | {judge} | {len(found)} | {shown_gap} | {ranges} |")
    return "\n".join(lines)


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
                entry = over_seeds([None if a is None or b is None else a - b for a, b in pairs])
                cells.append(cell(entry["mean"], entry["low"], entry["high"], "+"))
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
        ("cost", "mean cost (learned)"),
        ("strict_violation", "strict violation (learned)"),
        ("safety_rate", "safe responses (learned)"),
        ("multiplier", "multiplier λ"),
        ("kl", "KL to the start (nats/response)"),
    )
    figure = Figure(figsize=(18, 8), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    families = list(FAMILIES)
    for setting in headline(grid):
        color = _COLORS[families.index(setting.family)]
        place = 0 if setting.value is None else FAMILIES[setting.family].values.index(setting.value)
        runs = [read_metrics(folders[setting.name, seed] / "metrics.jsonl") for seed in range(setting.seeds)]
        for ax, (metric, _) in zip(axes, panels, strict=True):
            curves = np.array([[float(row[metric]) for row in run] for run in runs])
            steps = np.arange(1, curves.shape[1] + 1)
            _draw_band(ax, steps, curves, color, _DASHES[place], _label(setting))
    for ax, (_, label) in zip(axes, panels, strict=True):
        ax.set_ylabel(label)
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=80, backend="agg")


def _draw_band(ax: "Axes", steps: np.ndarray, curves: np.ndarray, color: str, style: str, label: str) -> None:
    """The mean over seeds, smoothed over five steps, and the range of the seeds' smoothed curves."""
    width = min(5, len(steps))
    smooth = np.array([np.convolve(curve, np.ones(width) / width, mode="valid") for curve in curves])
    at = steps[width - 1 :]
    ax.plot(at, smooth.mean(axis=0), color=color, linestyle=style, label=label)
    ax.fill_between(at, smooth.min(axis=0), smooth.max(axis=0), color=color, alpha=0.08, linewidth=0)
