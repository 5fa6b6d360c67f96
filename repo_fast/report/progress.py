"""What a run shows while it works: a live display on a terminal, one plain line a step everywhere else.

The display is decoration. A reader who goes away (`| head`, a closed terminal) must not end a training run, so writing
goes through a stream that falls silent when its target breaks. rich is imported only for the live display.
"""

import contextlib
import os
import re
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from repo_fast.report.jsonl import Value

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_RECENT_STEPS = 20


def printable(text: str) -> str:
    """A text without what a terminal would act on: names and texts of others may be in it. Spaces stand there instead,
    but newlines stay."""
    return _CONTROL.sub(" ", text)


class Progress:
    """The progress display of a run, to be used as a context manager.

    On a terminal it shows the phase, a bar, elapsed and remaining time, and the metrics of the last step, redrawn four
    times a second. Where the stream is no terminal (`isatty`), or a dumb one, each step is one line without control
    characters, and phases are not shown. Leaving the context, by an exception or not, restores the terminal.

    Args:
        total_steps: Steps of the whole run.
        start_step: Steps done before, by the run that this one resumes. The remaining time is estimated without them,
            from the median of the last 20 steps, which an evaluation or a checkpoint in between does not move.
        shown: The metrics of a step to show: name, label, format.
        stream: Where to write; standard output if None.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        shown: Sequence[tuple[str, str, str]],
        stream: TextIO | None = None,
    ):
        self._stream = _BreakableStream(stream or sys.stdout)
        self._total_steps, self._shown = total_steps, shown
        self._step = start_step
        self._phase = "start"
        self._metrics: Mapping[str, Value] = {}
        self._started = self._step_started = time.monotonic()
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        self._started = self._step_started = time.monotonic()
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, force_terminal=True)  # type: ignore[arg-type]
            self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def phase(self, name: str) -> None:
        """Says what the run does from now on: "generate", "score", "update", …"""
        self._phase = name

    def step(self, metrics: Mapping[str, Value]) -> None:
        """Says that a step is done, with its metrics as they go to the log; missing ones show as a dash."""
        now = time.monotonic()
        self._step_seconds.append(now - self._step_started)
        self._step_started = now
        self._step = int(metrics["step"])  # type: ignore[arg-type]
        self._metrics = metrics
        if self._live is None:
            fields = [f"step {self._step}/{self._total_steps}", *self._shown_metrics()]
            fields += [f"{self._step_seconds[-1]:.1f} s", f"ETA {self._eta()}"]
            self._stream.write("  ".join(fields) + "\n")
            self._stream.flush()

    def message(self, text: str) -> None:
        """Prints text (a warning, a table) above the display. Control characters but newlines become spaces."""
        clean = printable(text)
        if self._live is not None:
            from rich.text import Text

            self._live.console.print(Text(clean), soft_wrap=True)
        else:
            self._stream.write(clean + "\n")
            self._stream.flush()

    def _shown_metrics(self) -> list[str]:
        return [f"{label} {_format(self._metrics.get(name), spec)}" for name, label, spec in self._shown]

    def _eta(self) -> str:
        if not self._step_seconds:
            return "-"
        return _clock(median(self._step_seconds) * max(0, self._total_steps - self._step))

    def _render(self) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        bar = Table.grid(padding=(0, 2))
        elapsed = _clock(time.monotonic() - self._started)
        bar.add_row(
            f"[bold]step {self._step}/{self._total_steps}",
            ProgressBar(total=max(1, self._total_steps), completed=self._step, width=16),
            f"[cyan]{self._phase:<10}",
            f"elapsed {elapsed}",
            f"ETA {self._eta()}",
        )
        display = Table.grid()
        display.add_row(bar)
        display.add_row("  ".join(self._shown_metrics()).replace("lambda", "λ"))
        return display


class _BreakableStream:
    """A text stream that drops what it is given once its target is gone, and replaces what it can't encode."""

    def __init__(self, target: TextIO):
        self._target: TextIO | None = target
        self.encoding = getattr(target, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._guard(lambda target: target.isatty()) or False

    def fileno(self) -> int:
        if self._target is None:
            raise OSError("the stream is closed")
        return self._target.fileno()

    def write(self, text: str) -> int:
        encodable = text.encode(self.encoding, "replace").decode(self.encoding)
        self._guard(lambda target: target.write(encodable))
        return len(text)

    def flush(self) -> None:
        self._guard(lambda target: target.flush())

    def _guard(self, use):  # type: ignore[no-untyped-def]
        target = self._target
        if target is None:
            return None
        try:
            return use(target)
        except BrokenPipeError:
            self._target = None
            # What the target still buffers would fail once more when the interpreter flushes it at exit, and turn the
            # exit status of a good run into 120.
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, target.fileno())
                os.close(nowhere)
        except (OSError, ValueError):
            self._target = None
        return None


def _format(value: Value, spec: str) -> str:
    return format(value, spec) if isinstance(value, (int, float)) else "-"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
