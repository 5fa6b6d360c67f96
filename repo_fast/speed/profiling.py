"""A step under torch's profiler, and the picture of its phases.

    python -m repo_fast.train --config tiny --profile 3

writes `profile/trace-rank-N.json.gz`, which https://ui.perfetto.dev opens, and `profile/timeline.png`: when each rank
was in which phase. A traced step is slower than others.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from repo_fast.collectives import Ranks
from repo_fast.speed.throughput import Measured

# Okabe and Ito's, which the colour-blind can tell apart.
_COLORS = ("#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#D55E00")


@contextlib.contextmanager
def traced(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Trace what is done inside, on every rank; the folder is made."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (ranks.device.type == "cuda")
    with profile(activities=activities) as profiler:
        yield
    with ranks.together("the trace"):
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"trace-rank-{ranks.rank}.json.gz"))


def draw_timeline(folder: Path, phases: Mapping[str, Measured], ranks: Ranks) -> None:
    """Write `timeline.png` of a step's phases on all ranks; all ranks must call it."""
    first = min(phase.started for phase in phases.values())
    mine = {name: (phase.started - first, phase.seconds) for name, phase in phases.items()}
    everyone = ranks.gather_list([mine])
    if ranks.is_first:
        _draw(folder / "timeline.png", everyone)


def _draw(path: Path, ranks: Sequence[Mapping[str, tuple[float, float]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.5 + 0.4 * len(ranks)), layout="constrained")
    ax = figure.subplots()
    for row, phases in enumerate(ranks):
        for (name, span), color in zip(phases.items(), _COLORS, strict=False):
            ax.broken_barh([span], (row - 0.4, 0.8), color=color, label=name if row == 0 else None)
    ax.set_yticks(range(len(ranks)), [f"rank {row}" for row in range(len(ranks))])
    ax.invert_yaxis()
    ax.set_xlabel("seconds since the rank's step began")
    ax.legend(frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(path, dpi=120, backend="agg")
