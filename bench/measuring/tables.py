"""Tables in Markdown, and targets."""

from collections.abc import Mapping, Sequence
from typing import Any


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column flush left and the others flush right, readable as plain text too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def at_least(value: float, target: float) -> dict[str, Any]:
    """A measured value that should reach a target."""
    return {"value": value, "target": target, "met": value >= target}


def at_most(value: float, target: float) -> dict[str, Any]:
    """A measured value that should stay below a target."""
    return {"value": value, "target": target, "met": value <= target, "at_most": True}


def render_targets(targets: Mapping[str, Mapping[str, Any]]) -> str:
    """Judged targets as text, by name; empty for none."""
    rows = [
        [
            name,
            f"{row['value']:.2f}",
            f"{'at most' if row.get('at_most') else 'at least'} {row['target']:.2f}",
            "met" if row["met"] else "MISSED",
        ]
        for name, row in targets.items()
    ]
    return render(["target", "value", "", ""], rows) if rows else ""
