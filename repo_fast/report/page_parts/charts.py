"""The charts of an evaluation's page.

Points are drawn as one path for each kind of mark: thousands of elements would be slow. A policy has its colour (Okabe
and Ito's, for the colour-blind), its dashes and its mark everywhere; the reference is grey.
"""

import math
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from repo_fast.report.page_parts.plot import Limits, Plot, markup, outline, short, xy
from repo_fast.report.page_parts.responses import PolicyScores
from repo_fast.report.page_parts.wording import Measure, visible

# Of points in a panel, and of lines that join a prompt's two points; more hide each other.
DRAWN_PROMPTS, DRAWN_LINES = 300, 40
CURVE_POINTS = 256
# Of the chart by category; the table has them all.
DRAWN_CATEGORIES = 30

_COLORS = 5
_DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "4 4", "12 3", "2 5", "9 2 2 2 2 2")
_SHAPES = ("circle", "square", "diamond", "triangle", "cross")

Interval = tuple[float, float, float]


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
    plot = Plot(400, 330, limits[0], limits[1], left=52, bottom=44)
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
    plot.path("".join(f"M{xy(before[i])}L{xy(after[i])}" for i in joined), "join")
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
    plot = Plot(520, 330, limits, (0.0, 1.0), left=52, bottom=44)
    plot.axes("mean cost of the prompt", "share of prompts at or below", percent=True)
    plot.threshold(threshold)
    for position, values in reversed(list(enumerate(ordered))):
        if values.size == 0:
            continue
        kept = np.unique(np.linspace(0, values.size - 1, min(CURVE_POINTS, values.size)).astype(int))
        shares = (kept + 1) / values.size
        steps = [f"M{xy(plot.point(values[kept[0]], 0))}"]
        for x, y in plot.points(values[kept], shares):
            steps.append(f"H{short(x)}V{short(y)}")
        plot.path("".join([*steps, f"H{short(plot.right)}"]), f"curve {color(position)}", _dash(position))
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
    plot = Plot(width, top + block * len(categories) + 44, limits, (0, 1), left=labels, bottom=44, top=top)
    plot.x_axis(f"{measure.label.lower()}{', %' if measure.share else ''}")
    for number, ((name, prompts), row) in enumerate(zip(categories, values, strict=True)):
        middle = top + block * number + (block - gap) / 2 + gap / 2
        if number:
            plot.path(f"M0 {short(top + block * number)}H{width}", "rule")
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
                plot.path(f"M{short(ends[0])} {short(y)}H{short(ends[1])}", f"interval {color(position)}")
            here = np.array([[plot.x(scale * value), y]])
            plot.marks(here, _shape(position), 3.4, f"mark {color(position)}")
    return plot.finish(f"{measure.label} by category, for {', '.join(policies)}; the table below has the numbers.")


def swatch(position: int) -> Markup:
    """The line and mark of a policy, for a legend."""
    svg = ElementTree.Element("svg", {"class": "swatch", "viewBox": "0 0 34 12", "aria-hidden": "true"})
    path = {"class": f"curve {color(position)}", "d": "M1 6H33"} | _dash(position)
    ElementTree.SubElement(svg, "path", path)
    mark = outline(np.array([[17.0, 6.0]]), _shape(position), 3.8)
    ElementTree.SubElement(svg, "path", {"class": f"mark {color(position)}", "d": mark})
    return markup(svg)


def sign(kind: str) -> Markup:
    """A mark of the scatter, for its legend: `reference`, `kept`, `repaired` or `broken`."""
    shape = {"reference": "circle", "kept": "circle", "repaired": "diamond", "broken": "triangle"}[kind]
    svg = ElementTree.Element("svg", {"class": "sign", "viewBox": "0 0 12 12", "aria-hidden": "true"})
    hollow = " hollow" if kind == "reference" else ""
    mark = outline(np.array([[6.0, 6.0]]), shape, 3.2 if shape == "circle" else 4.4)
    ElementTree.SubElement(svg, "path", {"class": f"mark{hollow} {kind}", "d": mark})
    return markup(svg)


def color(position: int) -> str:
    """The class with the colour of a policy; the reference stands first."""
    return "reference" if position == 0 else f"policy{(position - 1) % _COLORS}"


def _shape(position: int) -> str:
    return _SHAPES[position % len(_SHAPES)]


def _dash(position: int) -> dict[str, str]:
    dash = _DASHES[position % len(_DASHES)]
    return {"stroke-dasharray": dash} if dash else {}


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
