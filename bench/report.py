"""Makes the Markdown table and the plots of a benchmark run.

    python -m bench.report run.json --out DIR

`run.json` is what `pytest bench/ --benchmark-json run.json` wrote. DIR gets `table.md`, which is printed too, and a
picture for each computation that was measured at several T: time and scratch memory, one line a peer.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.loss_head.peers import NOT_MEASURED
from bench.measuring.tables import render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]

TITLES = {
    "policy_loss": "Policy loss, forward + backward",
    "log_probs": "Log-probabilities, forward only",
    "log_probs_backward": "Log-probabilities, backward alone",
}
HEADER = ["", "ms", "± IQR", "TFLOP/s", "of the floor", "scratch MiB", "first call s"]
LEGEND = """\
ms: median of the rounds; ± IQR: their interquartile range. TFLOP/s: of the products that the mathematics needs (2·N·D·V
each: 3 for the policy loss, 1 forward, 2 backward; N tokens that are not ignored), over the median. Of the floor:
median of the bare products' time, taken right before each round, over its own; 1 is as fast as they are. Scratch: MiB
at the peak that are neither inputs nor results; for a backward alone with what its forward kept; not given for the
products. First call: with compilation, of what no row above has compiled already. On a
busy machine compare shares of the floor, not milliseconds."""

# Okabe and Ito's colours, which the colour-blind can tell apart; the floor is black.
COLOURS = ["#000000", "#D55E00", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#999999"]
# One fewer, so that both repeat together only after many peers.
MARKERS = "oDdsv^P"


def load(run: dict[str, Any]) -> list[Row]:
    """The measured rows of a run's JSON, in the order in which they were measured."""
    return [benchmark["extra_info"] for benchmark in run["benchmarks"]]


def machine(run: dict[str, Any]) -> str:
    """Where and when a run was made, and with what, in a line."""
    info = run["machine_info"]
    cpu = info["cpu"].get("brand_raw", info["processor"])
    where = cpu if info["device"] == "cpu" else f"{info['device']}, {cpu}"
    packages = ", ".join(f"{name} {version}" for name, version in info["packages"].items() if version is not None)
    return f"{where}, {info['threads']} threads, Python {info['python_version']}, {packages}, {run['datetime'][:10]}"


def table(run: dict[str, Any]) -> str:
    """The Markdown of a run: a table for each computation and shape, and what the columns and the peers are."""
    rows = load(run)
    parts = [machine(run)]
    for (computation, shape), group in _grouped(rows, lambda row: (row["computation"], _shape(row, row["T"]))).items():
        parts.append(f"**{TITLES[computation]}**, {shape}\n\n{render(HEADER, [_cells(row) for row in group])}")
    notes = {row["peer"]: row["notes"] for row in rows}
    parts += [LEGEND, "\n".join(f"- {peer}: {note}." for peer, note in notes.items()), NOT_MEASURED]
    return "\n\n".join(parts) + "\n"


def _grouped(rows: Iterable[Row], key: Any) -> dict[Any, list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def _shape(row: Row, T: int | None = None) -> str:
    sizes = [f"T {T}"] if T is not None else []
    sizes += [f"D {row['D']}", f"V {row['V']}", row["dtype"]]
    return ", ".join(sizes + [f"{row['ignored']:.0%} of the tokens ignored"] * (row["ignored"] > 0))


def _cells(row: Row) -> list[str]:
    return [
        row["peer"],
        f"{row['ms']:.1f}",
        f"{row['spread_ms']:.1f}",
        f"{row['tflops']:.3g}",
        f"{row['share_of_floor']:.3f}",
        "" if row["scratch_mib"] is None else f"{row['scratch_mib']:.1f}",
        f"{row['first_call_s']:.1f}",
    ]


def plots(run: dict[str, Any], folder: Path) -> list[Path]:
    """Draws time and scratch memory against T, a file for each computation and shape that has several T."""
    rows = load(run)
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    groups = _grouped(rows, lambda row: (row["computation"], row["dtype"], row["D"], row["V"], row["ignored"]))
    written = []
    for (computation, dtype, D, V, ignored), group in groups.items():
        if len({row["T"] for row in group}) < 2:
            continue
        suffix = f"-ignored{ignored:g}" if ignored else ""
        path = folder / f"{computation}-{dtype}-D{D}-V{V}{suffix}.png"
        title = f"{TITLES[computation]}, {_shape(group[0])}"
        written.append(_plot(group, peers, title, machine(run), path))
    return written


def _plot(rows: list[Row], peers: list[str], title: str, caption: str, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for peer, colour, marker in zip(peers, cycle(COLOURS), cycle(MARKERS)):
        own = sorted((row for row in rows if row["peer"] == peer), key=lambda row: row["T"])
        if not own:
            continue
        style = {"color": colour, "marker": marker, "markersize": 5, "label": peer}
        time.plot([row["T"] for row in own], [row["ms"] for row in own], **style)
        if all(row["scratch_mib"] is not None for row in own):
            memory.plot([row["T"] for row in own], [row["scratch_mib"] for row in own], **style)
    _finish(time, rows, "time (ms)")
    _finish(memory, rows, "scratch memory at the peak (MiB)")
    time.legend(frameon=False)
    figure.suptitle(title)
    figure.supxlabel(f"tokens T\n{caption}", fontsize=8)
    figure.savefig(path, dpi=120, backend="agg")
    return path


def _finish(ax: "Axes", rows: list[Row], label: str) -> None:
    from matplotlib.ticker import LogFormatter

    lengths = sorted({row["T"] for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(lengths, [str(T) for T in lengths])
    for set_formatter in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        set_formatter(LogFormatter())
    ax.set_ylabel(label)
    ax.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Table and plots of a benchmark run.")
    parser.add_argument("run", type=Path, help="the JSON that pytest-benchmark wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for table.md and the plots, made if missing")
    arguments = parser.parse_args()
    run = json.loads(arguments.run.read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = table(run)
    (arguments.out / "table.md").write_text(text)
    print(text)
    for path in plots(run, arguments.out):
        print(path)


if __name__ == "__main__":
    main()
