"""The charts of a run's page: a column of a log over the steps.

Steps are drawn one by one as long as there is room, else in groups of consecutive ones: a band from the lowest to the
highest of a group, and a line through the means. Every point says its numbers where the pointer rests.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from markupsafe import Markup

from repo_fast.report.page_parts.plot import Limits, Plot, short, xy
from repo_fast.report.page_parts.wording import MINUS
from repo_fast.report.panels import SMOOTH_FROM, is_sparse
from repo_fast.report.series import Thinned, running_mean, running_window, thin

# Of a normal distribution, what 95 % lie within.
_ERRORS = 1.96


def curve(
    steps: np.ndarray,
    values: np.ndarray,
    name: str,
    unit: str,
    level: tuple[float, str] | None = None,
    errors: np.ndarray | None = None,
) -> Markup:
    """A chart of a column that has a finite value.

    Args:
        steps, values: float64 [M]; NaN where there is no value.
        name, unit: Of what is drawn.
        level: A value to compare with, and what it is.
        errors: Standard errors [M], NaN where there is none: 95 % intervals are drawn, where each step is.
    """
    sparse, limits = is_sparse(values), (steps[0], steps[-1])
    if sparse:
        kept = np.isfinite(values)
        steps, values, errors = steps[kept], values[kept], None if errors is None else errors[kept]
    groups = thin(steps, values)
    half = np.zeros(len(groups.mean))
    if errors is not None and groups.group == 1:
        half = np.nan_to_num(_ERRORS * errors)
    bars, is_share = [groups.mean - half, groups.mean + half], unit.startswith("share")
    if is_share:
        # Whatever its standard error adds.
        bars = [np.clip(own, 0, 1) for own in bars]
    plot = Plot(
        400,
        236,
        limits,
        _limits([groups.low, groups.high, *bars, [] if level is None else [level[0]]], is_share),
        left=66,
        bottom=42,
        top=22 if level else 10,
        whole_x=True,
    )
    plot.axes("step", unit)
    if level is not None:
        plot.level(*level)
    middle = (groups.first + groups.last) / 2
    if sparse or len(middle) < SMOOTH_FROM:
        plot.path(_line(plot.points(middle, groups.mean)), "curve policy0")
        places = zip(*(plot.points(middle, own) for own in bars), strict=True)
        plot.path("".join(f"M{xy(a)}V{short(b[1])}" for a, b in places), "interval policy0")
        finite = np.isfinite(groups.mean)
        plot.marks(plot.points(middle, groups.mean)[finite], "circle", 2.6, "mark policy0")
    else:
        if groups.group == 1:
            plot.path(_line(plot.points(middle, groups.mean)), "curve pale policy0")
        else:
            plot.path(_band(*(plot.points(middle, ends) for ends in (groups.low, groups.high))), "band policy0")
        smooth = running_mean(groups.mean, running_window(len(middle)))
        plot.path(_line(plot.points(middle, smooth)), "curve policy0")
    plot.pointed(*zip(*_texts(groups, half), strict=True))
    return plot.finish(f"{name} over {len(steps):,} steps, in {unit}.")


def spelled(value: float) -> str:
    """A number, to be read by itself."""
    return (f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}").replace("-", MINUS)


def how_drawn(steps: int) -> str:
    """What a point and a line of charts of so many steps are, in words."""
    groups = thin(np.arange(float(steps)), np.zeros(steps))
    points = len(groups.mean)
    if points < SMOOTH_FROM:
        return "Each point is a step."
    window = running_window(points)
    if groups.group == 1:
        return f"The pale line has each step, the strong one is the mean of {window} steps."
    return (
        f"Of {steps:,} steps {groups.group} at a time are drawn as one: the pale band reaches from the lowest to the "
        f"highest of them, the line is the mean of {window * groups.group:,} steps. metrics.jsonl has each step."
    )


def _limits(parts: Iterable[np.ndarray | list[float]], is_share: bool = False) -> Limits:
    """The range of all finite numbers; from 0 on, where that is not further from them than they are from each other; of
    a share that does not change, all that it can be."""
    values = np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if is_share and low == high:
        return 0.0, 1.0
    if 0 < low < high - low:
        low = 0.0
    return low, high


def _runs(finite: np.ndarray) -> Iterator[slice]:
    """Where the stretches without a gap are."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], finite, [False]]).astype(np.int8)))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        yield slice(int(start), int(end))


def _line(points: np.ndarray) -> str:
    stretches = (points[own] for own in _runs(np.isfinite(points[:, 1])))
    return "".join("M" + "L".join(map(xy, own)) for own in stretches)


def _band(low: np.ndarray, high: np.ndarray) -> str:
    stretches = _runs(np.isfinite(low[:, 1]))
    return "".join("M" + "L".join(map(xy, [*low[own], *high[own][::-1]])) + "z" for own in stretches)


def _texts(groups: Thinned, half: np.ndarray) -> Iterator[tuple[Limits, str]]:
    """Of each group with a value: from where to where it reaches, and what it says."""
    between = (groups.last[:-1] + groups.first[1:]) / 2
    starts = np.concatenate([groups.first[:1], between])
    ends = np.concatenate([between, groups.last[-1:]])
    for i in np.flatnonzero(np.isfinite(groups.mean)):
        first, last = groups.first[i], groups.last[i]
        text = f"step {first:,.0f}: {spelled(groups.mean[i])}"
        if half[i]:
            text += f" ± {spelled(half[i])}"
        if first != last:
            ends_of = f"{spelled(groups.low[i])} to {spelled(groups.high[i])}"
            text = f"steps {first:,.0f} to {last:,.0f}: mean {spelled(groups.mean[i])}, {ends_of}"
        yield (float(starts[i]), float(ends[i])), text
