"""The pictures of a run, `plots/*.png`, drawn from its metrics.

Matplotlib's `Figure` is used without pyplot: no global state, no display, and safe beside a user's own plots. Each
step is drawn as measured; from 30 steps on this is pale, under a running mean, since the steps of RL are noisy.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from repo_fast.report.jsonl import Value
from repo_fast.report.measures import Thresholds
from repo_fast.report.panels import EVALUATED, PICTURES, SMOOTH_FROM, Panel, column, is_sparse, panels_of
from repo_fast.report.series import running_mean, running_window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PHASES = ("generate", "score", "experience", "update")
# From Okabe and Ito's colours, which the colour-blind can tell apart.
_LINE, _FILLS = "#0072B2", ("#56B4E9", "#E69F00", "#CC79A7", "#009E73")


def plot_metrics(metrics: Sequence[Mapping[str, Value]], folder: Path, threshold: Thresholds = 0.0) -> list[Path]:
    """Draws a run's metrics into PNG files, replacing those of an earlier call.

    Args:
        metrics: One dictionary a step, as `read_metrics` returns them. Missing keys, None, NaN and infinities leave
            gaps; a panel without a single finite value is not drawn, nor a picture without a panel.
        folder: Where the files go; made if missing.
        threshold: d, the mean cost to stay under; drawn as a line. Of several constraints by name: each has a panel.

    Returns:
        The files written, of reward_and_cost, safety, multiplier, kl_and_entropy, response_length, loss and speed.
    """
    thresholds = dict(threshold) if isinstance(threshold, Mapping) else {"": threshold}
    lines = {column(name, "cost"): (d, f"threshold d = {d:g}") for name, d in thresholds.items()}
    pictures = {name: list(panels_of(panels, list(thresholds))) for name, panels in PICTURES.items()}
    written = plot_panels(metrics, pictures, folder, lines)
    return written + _plot_speed(metrics, _series(metrics, "step"), folder / "speed.png")


def plot_evaluations(rows: Sequence[Mapping[str, Value]], folder: Path, threshold: Thresholds = 0.0) -> list[Path]:
    """Draws the rows of `evaluations.jsonl` into `evaluations.png`; all else as for `plot_metrics`."""
    constraints = list(threshold) if isinstance(threshold, Mapping) else [""]
    return plot_panels(rows, {"evaluations": list(panels_of(EVALUATED, constraints))}, folder)


def plot_panels(
    metrics: Sequence[Mapping[str, Value]],
    pictures: Mapping[str, Sequence[Panel]],
    folder: Path,
    lines: Mapping[str, tuple[float, str]] | None = None,
) -> list[Path]:
    """Draws metrics over steps into PNG files, replacing those of an earlier call.

    Args:
        metrics: As for `plot_metrics`.
        pictures: By file name without ending: its panels from top to bottom, each the metric and its axis label with
            the unit.
        folder: Where the files go; made if missing.
        lines: Horizontal lines, by metric: where, and what they are.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps = _series(metrics, "step")
    written = []
    for name, panels in pictures.items():
        drawn = [(key, label, _series(metrics, key)) for key, label in panels]
        drawn = [panel for panel in drawn if np.isfinite(panel[2]).any()]
        if not drawn:
            continue
        figure, axes = _figure(len(drawn))
        for ax, (key, label, values) in zip(axes, drawn, strict=True):
            if lines and key in lines:
                height, meaning = lines[key]
                ax.axhline(height, color="black", linestyle="--", linewidth=1, label=meaning)
            _draw_curve(ax, steps, values)
            ax.set_ylabel(label)
            ax.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
        written.append(_save(figure, axes, folder / f"{name}.png"))
    return written


def _plot_speed(metrics: Sequence[Mapping[str, Value]], steps: np.ndarray, path: Path) -> list[Path]:
    seconds = [np.nan_to_num(_series(metrics, f"{phase}_seconds"), posinf=0.0, neginf=0.0) for phase in _PHASES]
    rate = _series(metrics, "tokens_per_second")
    if not any(values.any() for values in seconds) and not np.isfinite(rate).any():
        return []
    figure, (top, bottom) = _figure(2)
    edges = np.append(steps - 0.5, steps[-1] + 0.5)
    below = np.zeros(len(steps))
    for phase, values, color in zip(_PHASES, seconds, _FILLS, strict=True):
        top.stairs(below + values, edges, baseline=below, fill=True, color=color, label=phase)
        below = below + values
    top.set_ylabel("time (seconds/step)")
    _draw_curve(bottom, steps, rate)
    bottom.set_ylabel("throughput (tokens/s)")
    bottom.set_xlim(edges[0], edges[-1])
    return [_save(figure, (top, bottom), path)]


def _series(metrics: Sequence[Mapping[str, Value]], key: str) -> np.ndarray:
    """One metric over all records, float64 [N]; NaN where it is missing, None or not finite."""
    values = [row.get(key) for row in metrics]
    series = np.array([value if isinstance(value, (int, float)) else np.nan for value in values], dtype=np.float64)
    series[~np.isfinite(series)] = np.nan
    return series


def _draw_curve(ax: "Axes", steps: np.ndarray, values: np.ndarray) -> None:
    finite = np.isfinite(values)
    if is_sparse(values):
        # Measured now and then: a point each, since the gaps between would hide lone ones.
        ax.plot(steps[finite], values[finite], color=_LINE, marker="o", markersize=3, label="each evaluation")
        return
    if len(steps) < SMOOTH_FROM:
        ax.plot(steps, values, color=_LINE, marker="o", markersize=3, label="each step")
        return
    window = running_window(len(steps))
    ax.plot(steps, values, color=_LINE, alpha=0.3, linewidth=1, label="each step")
    ax.plot(steps, running_mean(values, window), color=_LINE, label=f"mean of {window} steps")


def _figure(panels: int) -> "tuple[Figure, Sequence[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 2.8 * panels), layout="constrained")
    return figure, list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])


def _save(figure: "Figure", axes: "Sequence[Axes]", path: Path) -> Path:
    from matplotlib.ticker import MaxNLocator

    for ax in axes:
        ax.grid(alpha=0.3)
        if len(ax.get_legend_handles_labels()[0]) > 1:
            ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    # Agg by name, whatever backend the user's configuration asks for.
    figure.savefig(path, dpi=120, backend="agg")
    return path
