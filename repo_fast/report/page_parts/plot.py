"""A picture with two axes, as SVG that takes its colours from the page's style sheet.

So it follows the reader's light or dark scheme and prints well, and needs no inline style, which the page's security
policy forbids.
"""

from collections.abc import Callable, Mapping, Sequence
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from repo_fast.report.page_parts.wording import MINUS, visible

# Between the frame and the outermost points, in units of the picture.
_INSET = 7

Limits = tuple[float, float]


class Plot:
    """A picture with two linear axes, drawn in the order of the calls.

    Args:
        width, height: Of the picture, in its own units.
        x_limits, y_limits: The range of each axis.
        left, bottom, top: Room for labels.
        whole_x: Whether x counts something: its ticks are whole numbers.
    """

    def __init__(
        self,
        width: float,
        height: float,
        x_limits: Limits,
        y_limits: Limits,
        left: float,
        bottom: float,
        top: float = 22,
        whole_x: bool = False,
    ):
        self.left, self.right, self.top, self.bottom = left, width - 14, top, height - bottom
        self._svg = ElementTree.Element("svg", {"viewBox": f"0 0 {width} {height}", "role": "img", "class": "chart"})
        x_limits, y_limits = _apart(*x_limits), _apart(*y_limits)
        self._x_ticks, self._y_ticks = _ticks(*x_limits, whole=whole_x), _ticks(*y_limits)
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
            self.path(f"M{short(self.left)} {short(y)}H{short(self.right)}", "grid")
            text = f"{100 * tick:.0f} %" if percent else _number(tick)
            self.text(self.left - 6, y + 4, "tick", text, anchor="end")
        label = self.text(0, 0, "axis", y_label, anchor="middle")
        label.set("transform", f"translate(13 {short((self.top + self.bottom) / 2)}) rotate(-90)")
        self.x_axis(x_label)

    def x_axis(self, label: str) -> None:
        for tick in self._x_ticks:
            x = self.x(tick)
            self.path(f"M{short(x)} {short(self.top)}V{short(self.bottom)}", "grid zero" if tick == 0 else "grid")
            self.text(x, self.bottom + 16, "tick", _number(tick), anchor="middle")
        self.text((self.left + self.right) / 2, self.bottom + 36, "axis", label, anchor="middle")

    def threshold(self, value: float) -> None:
        x = self.x(value)
        area = {"x": short(x), "y": short(self.top), "width": short(max(self.right - x, 0))}
        area |= {"height": short(self.bottom - self.top), "class": "unsafe-area"}
        ElementTree.SubElement(self._svg, "rect", area)
        self.path(f"M{short(x)} {short(self.top - 6)}V{short(self.bottom)}", "threshold")
        room = self.right - x
        where, anchor = (x + 4, "start") if room > 60 else (x - 4, "end")
        self.text(where, self.top - 8, "tick", "unsafe →" if anchor == "start" else "← safe", anchor=anchor)

    def level(self, value: float, text: str) -> None:
        """A line across, at a value of y, and what it is."""
        y = self._y(value)
        self.path(f"M{short(self.left)} {short(y)}H{short(self.right)}", "threshold")
        self.text(self.right, self.top - 8, "tick", text, anchor="end")

    def pointed(self, ends: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
        """Areas from the top to the bottom, from one x to another, that show a text where the pointer rests."""
        group = ElementTree.SubElement(self._svg, "g", {"class": "pointed"})
        for (low, high), text in zip(ends, texts, strict=True):
            left, right = self.x(low), self.x(high)
            path = {"d": f"M{short(left)} {short(self.top)}V{short(self.bottom)}H{short(right)}V{short(self.top)}z"}
            ElementTree.SubElement(ElementTree.SubElement(group, "path", path), "title").text = visible(text)

    def path(self, d: str, css: str, more: Mapping[str, str] | None = None) -> None:
        if d:
            ElementTree.SubElement(self._svg, "path", {"class": css, "d": d, **(more or {})})

    def marks(self, positions: np.ndarray, shape: str, radius: float, css: str) -> None:
        self.path(outline(positions, shape, radius), css)

    def text(self, x: float, y: float, css: str, text: str, anchor: str = "start") -> ElementTree.Element:
        where = {"x": short(x), "y": short(y), "class": css, "text-anchor": anchor}
        element = ElementTree.SubElement(self._svg, "text", where)
        element.text = visible(text)
        return element

    def finish(self, description: str) -> Markup:
        self._svg.set("aria-label", visible(description))
        return markup(self._svg)


def outline(positions: np.ndarray, shape: str, r: float) -> str:
    """One path with a mark of "radius" r at each of the positions [N, 2]."""
    a, b = short(r), short(2 * r)
    forms: dict[str, Callable[[float, float], str]] = {
        "circle": lambda x, y: f"M{short(x - r)} {short(y)}a{a} {a} 0 1 0 {b} 0a{a} {a} 0 1 0 -{b} 0",
        "square": lambda x, y: f"M{short(x - r)} {short(y - r)}h{b}v{b}h-{b}z",
        "diamond": lambda x, y: f"M{short(x)} {short(y - r)}l{a} {a}l-{a} {a}l-{a} -{a}z",
        "triangle": lambda x, y: f"M{short(x)} {short(y - r)}l{a} {short(1.8 * r)}h-{b}z",
        "cross": lambda x, y: f"M{short(x - r)} {short(y - r)}l{b} {b}m0 -{b}l-{b} {b}",
    }
    return "".join(forms[shape](x, y) for x, y in positions)


def _ticks(low: float, high: float, whole: bool = False) -> np.ndarray:
    """Round numbers within a range."""
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1 if whole else 2, integer=whole)
    ticks = np.asarray(locator.tick_values(low, high))
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


def short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def xy(point: Sequence[float]) -> str:
    return f"{short(point[0])} {short(point[1])}"


def markup(svg: ElementTree.Element) -> Markup:
    # ElementTree has escaped every text and attribute.
    return Markup(ElementTree.tostring(svg, encoding="unicode"))
