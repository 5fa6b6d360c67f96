"""The charts of the page, as SVG that takes its colours from the page's style sheet.

So they follow the reader's light or dark scheme and print well, and need no inline style, which the page's security
policy forbids. Points are drawn as one path for each kind of mark: thousands of elements would be slow. A policy has
its colour (Okabe and Ito's, for the colour-blind), its dashes and its mark everywhere; the reference is grey.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from repo_fast.report.page_parts.responses import PolicyScores
from repo_fast.report.page_parts.wording import MINUS, Measure, visible

# Of points in a panel, and of lines that join a prompt's two points; more hide each other.
DRAWN_PROMPTS, DRAWN_LINES = 300, 40
CURVE_POINTS = 256
# Of the chart by category; the table has them all.
DRAWN_CATEGORIES = 30

# Between the frame and the outermost points, in units of the picture.
_INSET = 7
_COLORS = 5
_DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "4 4", "12 3", "2 5", "9 2 2 2 2 2")
_SHAPES = ("circle", "square", "diamond", "triangle", "cross")

Interval = tuple[float, float, float]
Limits = tuple[float, float]


def scatter(
    reference: PolicyScores, policy: PolicyScores | None, threshold: float, limits: tuple[Limits, Limits], name: str
) -> Markup:
    """Mean reward against mean cost of each prompt, under the reference and, joined to it, under a policy.

    Args:
        reference, policy: No policy for the reference alone.
        threshold: d, drawn as a line.
        limits: From `scatter_limits`, the same for all panels.
        name: Of the policy, for the text alternative.
    """
    rows = drawn_prompts(reference, policy)
    plot = _Plot(400, 330, limits[0], limits[1], left=52, bottom=44)
    plot.axes("mean cost of the prompt", "mean reward of the prompt")
    plot.threshold(threshold)
    before = plot.points(reference.cost[rows], reference.reward[rows])
    if policy is None:
        plot.marks(before, "circle", 2.2, "mark hollow reference")
        return plot.finish(f"Scatter of mean reward against mean cost of {len(rows)} prompts under {name}.")
    after = plot.points(policy.cost[rows], policy.reward[rows])
    joined = np.unique(np.linspace(0, max(len(rows) - 1, 0), min(DRAWN_LINES, len(rows))).astype(int))
    old, new = reference.unsafe[rows], policy.unsafe[rows]
    plot.marks(before, "circle", 2.2, "mark hollow reference")
    plot.marks(after[old == new], "circle", 2.4, "mark kept")
    plot.path("".join(f"M{_xy(before[i])}L{_xy(after[i])}" for i in joined), "join")
    plot.marks(after[old & ~new], "diamond", 4.2, "mark repaired")
    plot.marks(after[~old & new], "triangle", 4.4, "mark broken")
    return plot.finish(
        f"Scatter of mean reward against mean cost of {len(rows)} prompts, under the reference and under {name}. Of "
        f"these, {int((~old & new).sum())} became unsafe and {int((old & ~new).sum())} became safe."
    )


def drawn_prompts(reference: PolicyScores, policy: PolicyScores | None) -> np.ndarray:
    """Which prompts a scatter shows: all, or evenly spaced ones in the order of their cost under the reference."""
    finite = np.isfinite(reference.cost) & np.isfinite(reference.reward)
    if policy is not None:
        finite &= np.isfinite(policy.cost) & np.isfinite(policy.reward)
    rows = finite.nonzero()[0]
    if len(rows) <= DRAWN_PROMPTS:
        return rows
    rows = rows[np.argsort(reference.cost[rows], kind="stable")]
    return rows[np.linspace(0, len(rows) - 1, DRAWN_PROMPTS).astype(int)]


def scatter_limits(
    reference: PolicyScores, policies: Sequence[PolicyScores | None], threshold: float
) -> tuple[Limits, Limits] | None:
    """The ranges of cost and reward of all points that the panels draw, or None where there is none.

    Args:
        reference, threshold: As for `scatter`.
        policies: Of each panel; None for the reference alone.
    """
    costs, rewards = [], []
    for policy in policies:
        rows = drawn_prompts(reference, policy)
        for scores in [reference, policy] if policy is not None else [reference]:
            costs.append(scores.cost[rows])
            rewards.append(scores.reward[rows])
    cost, reward = np.concatenate(costs), np.concatenate(rewards)
    if cost.size == 0:
        return None
    return (min(cost.min(), threshold), max(cost.max(), threshold)), (reward.min(), reward.max())


def distribution(costs: Mapping[str, np.ndarray], threshold: float, safe: Mapping[str, str]) -> Markup:
    """The share of prompts whose mean cost is at most c, against c, a curve for each policy.

    Args:
        costs: By policy, the reference first: its finite mean costs, at least one in all.
        threshold: d, drawn as a line.
        safe: By policy, the share of safe prompts, for the text alternative.
    """
    ordered = [np.sort(values) for values in costs.values()]
    everything = np.concatenate(ordered)
    limits = (min(everything.min(), threshold), max(everything.max(), threshold))
    plot = _Plot(520, 330, limits, (0.0, 1.0), left=52, bottom=44)
    plot.axes("mean cost of the prompt", "share of prompts at or below", percent=True)
    plot.threshold(threshold)
    for position, values in reversed(list(enumerate(ordered))):
        if values.size == 0:
            continue
        kept = np.unique(np.linspace(0, values.size - 1, min(CURVE_POINTS, values.size)).astype(int))
        shares = (kept + 1) / values.size
        steps = [f"M{_xy(plot.point(values[kept[0]], 0))}"]
        for x, y in plot.points(values[kept], shares):
            steps.append(f"H{_short(x)}V{_short(y)}")
        plot.path("".join([*steps, f"H{_short(plot.right)}"]), f"curve {color(position)}", _dash(position))
    shares = "; ".join(f"{policy}: {share}" for policy, share in safe.items())
    return plot.finish(
        f"Cumulative distribution of the mean cost of a prompt. Share at or below {threshold:g}: {shares}."
    )


def by_category(
    measure: Measure,
    categories: Sequence[tuple[str, int]],
    values: Sequence[Sequence[Interval]],
    policies: Sequence[str],
) -> Markup:
    """One measure with its intervals, for each category and policy.

    Args:
        measure: Which.
        categories: Names with their numbers of prompts, from top to bottom.
        values: For each category, (value, low, high) by policy; NaN where undefined.
        policies: Names, the reference first.
    """
    scale = 100 if measure.share else 1
    line, gap, top, labels, width = 11, 9, 8, 124, 380
    block = line * len(policies) + gap
    flat = [scale * x for row in values for entry in row for x in entry if math.isfinite(x)]
    if measure.key != "mean_reward":
        flat.append(0.0)
    limits = (min(flat), max(flat)) if flat else (0.0, 1.0)
    plot = _Plot(width, top + block * len(categories) + 44, limits, (0, 1), left=labels, bottom=44, top=top)
    plot.x_axis(f"{measure.label.lower()}{', %' if measure.share else ''}")
    for number, ((name, prompts), row) in enumerate(zip(categories, values, strict=True)):
        middle = top + block * number + (block - gap) / 2 + gap / 2
        if number:
            plot.path(f"M0 {_short(top + block * number)}H{width}", "rule")
        label = plot.text(labels - 8, middle + 1, "label", _shortened(name, 18), anchor="end")
        ElementTree.SubElement(label, "title").text = visible(name)
        plot.text(labels - 8, middle + 13, "tick", f"{prompts:,} prompts", anchor="end")
        for position, (value, low, high) in enumerate(row):
            y = top + block * number + gap / 2 + line * (position + 0.5)
            if math.isnan(value):
                plot.text(labels + 4, y + 4, "tick", "undefined")
                continue
            if math.isfinite(low) and math.isfinite(high):
                ends = plot.x(scale * low), plot.x(scale * high)
                plot.path(f"M{_short(ends[0])} {_short(y)}H{_short(ends[1])}", f"interval {color(position)}")
            here = np.array([[plot.x(scale * value), y]])
            plot.marks(here, _shape(position), 3.4, f"mark {color(position)}")
    return plot.finish(f"{measure.label} by category, for {', '.join(policies)}; the table below has the numbers.")


def swatch(position: int) -> Markup:
    """The line and mark of a policy, for a legend."""
    svg = ElementTree.Element("svg", {"class": "swatch", "viewBox": "0 0 34 12", "aria-hidden": "true"})
    path = {"class": f"curve {color(position)}", "d": "M1 6H33"} | _dash(position)
    ElementTree.SubElement(svg, "path", path)
    mark = _outline(np.array([[17.0, 6.0]]), _shape(position), 3.8)
    ElementTree.SubElement(svg, "path", {"class": f"mark {color(position)}", "d": mark})
    return _markup(svg)


def sign(kind: str) -> Markup:
    """A mark of the scatter, for its legend: `reference`, `kept`, `repaired` or `broken`."""
    shape = {"reference": "circle", "kept": "circle", "repaired": "diamond", "broken": "triangle"}[kind]
    svg = ElementTree.Element("svg", {"class": "sign", "viewBox": "0 0 12 12", "aria-hidden": "true"})
    hollow = " hollow" if kind == "reference" else ""
    mark = _outline(np.array([[6.0, 6.0]]), shape, 3.2 if shape == "circle" else 4.4)
    ElementTree.SubElement(svg, "path", {"class": f"mark{hollow} {kind}", "d": mark})
    return _markup(svg)


def color(position: int) -> str:
    """The class with the colour of a policy; the reference stands first."""
    return "reference" if position == 0 else f"policy{(position - 1) % _COLORS}"


class _Plot:
    """A picture with two linear axes, drawn in the order of the calls."""

    def __init__(
        self,
        width: float,
        height: float,
        x_limits: Limits,
        y_limits: Limits,
        left: float,
        bottom: float,
        top: float = 22,
    ):
        self.left, self.right, self.top, self.bottom = left, width - 14, top, height - bottom
        self._svg = ElementTree.Element("svg", {"viewBox": f"0 0 {width} {height}", "role": "img", "class": "chart"})
        x_limits, y_limits = _apart(*x_limits), _apart(*y_limits)
        self._x_ticks, self._y_ticks = _ticks(*x_limits), _ticks(*y_limits)
        self.x = _line_through(x_limits[0], self.left + _INSET, x_limits[1], self.right - _INSET)
        self._y = _line_through(y_limits[0], self.bottom - _INSET, y_limits[1], self.top + _INSET)

    def point(self, x: float, y: float) -> tuple[float, float]:
        return self.x(x), self._y(y)

    def points(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Data to positions [N, 2]."""
        return np.stack([self.x(x), self._y(y)], axis=-1)

    def axes(self, x_label: str, y_label: str, percent: bool = False) -> None:
        for tick in self._y_ticks:
            y = self._y(tick)
            self.path(f"M{_short(self.left)} {_short(y)}H{_short(self.right)}", "grid")
            text = f"{100 * tick:.0f} %" if percent else _number(tick)
            self.text(self.left - 6, y + 4, "tick", text, anchor="end")
        label = self.text(0, 0, "axis", y_label, anchor="middle")
        label.set("transform", f"translate(13 {_short((self.top + self.bottom) / 2)}) rotate(-90)")
        self.x_axis(x_label)

    def x_axis(self, label: str) -> None:
        for tick in self._x_ticks:
            x = self.x(tick)
            self.path(f"M{_short(x)} {_short(self.top)}V{_short(self.bottom)}", "grid zero" if tick == 0 else "grid")
            self.text(x, self.bottom + 16, "tick", _number(tick), anchor="middle")
        self.text((self.left + self.right) / 2, self.bottom + 36, "axis", label, anchor="middle")

    def threshold(self, value: float) -> None:
        x = self.x(value)
        area = {"x": _short(x), "y": _short(self.top), "width": _short(max(self.right - x, 0))}
        area |= {"height": _short(self.bottom - self.top), "class": "unsafe-area"}
        ElementTree.SubElement(self._svg, "rect", area)
        self.path(f"M{_short(x)} {_short(self.top - 6)}V{_short(self.bottom)}", "threshold")
        room = self.right - x
        where, anchor = (x + 4, "start") if room > 60 else (x - 4, "end")
        self.text(where, self.top - 8, "tick", "unsafe →" if anchor == "start" else "← safe", anchor=anchor)

    def path(self, d: str, css: str, more: Mapping[str, str] | None = None) -> None:
        if d:
            ElementTree.SubElement(self._svg, "path", {"class": css, "d": d, **(more or {})})

    def marks(self, positions: np.ndarray, shape: str, radius: float, css: str) -> None:
        self.path(_outline(positions, shape, radius), css)

    def text(self, x: float, y: float, css: str, text: str, anchor: str = "start") -> ElementTree.Element:
        where = {"x": _short(x), "y": _short(y), "class": css, "text-anchor": anchor}
        element = ElementTree.SubElement(self._svg, "text", where)
        element.text = visible(text)
        return element

    def finish(self, description: str) -> Markup:
        self._svg.set("aria-label", visible(description))
        return _markup(self._svg)


def _outline(positions: np.ndarray, shape: str, r: float) -> str:
    """One path with a mark of "radius" r at each of the positions [N, 2]."""
    a, b = _short(r), _short(2 * r)
    forms: dict[str, Callable[[float, float], str]] = {
        "circle": lambda x, y: f"M{_short(x - r)} {_short(y)}a{a} {a} 0 1 0 {b} 0a{a} {a} 0 1 0 -{b} 0",
        "square": lambda x, y: f"M{_short(x - r)} {_short(y - r)}h{b}v{b}h-{b}z",
        "diamond": lambda x, y: f"M{_short(x)} {_short(y - r)}l{a} {a}l-{a} {a}l-{a} -{a}z",
        "triangle": lambda x, y: f"M{_short(x)} {_short(y - r)}l{a} {_short(1.8 * r)}h-{b}z",
        "cross": lambda x, y: f"M{_short(x - r)} {_short(y - r)}l{b} {b}m0 -{b}l-{b} {b}",
    }
    return "".join(forms[shape](x, y) for x, y in positions)


def _shape(position: int) -> str:
    return _SHAPES[position % len(_SHAPES)]


def _dash(position: int) -> dict[str, str]:
    dash = _DASHES[position % len(_DASHES)]
    return {"stroke-dasharray": dash} if dash else {}


def _ticks(low: float, high: float) -> np.ndarray:
    """Round numbers within a range."""
    from matplotlib.ticker import MaxNLocator

    ticks = np.asarray(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2).tick_values(low, high))
    # Differences of floats leave zeros like 1e-17.
    ticks[np.abs(ticks) < 1e-9 * np.abs(ticks).max()] = 0.0
    slack = 1e-9 * (high - low)
    return ticks[(ticks >= low - slack) & (ticks <= high + slack)]


def _apart(low: float, high: float) -> Limits:
    """The range, or one around it where it is a single number."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _line_through(x1: float, y1: float, x2: float, y2: float) -> Callable:
    return lambda x: y1 + (x - x1) * (y2 - y1) / (x2 - x1)


def _number(value: float) -> str:
    return f"{value:g}".replace("-", MINUS)


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _xy(point: Sequence[float]) -> str:
    return f"{_short(point[0])} {_short(point[1])}"


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _markup(svg: ElementTree.Element) -> Markup:
    # ElementTree has escaped every text and attribute.
    return Markup(ElementTree.tostring(svg, encoding="unicode"))
