"""Two ranks, of which one stops, hangs, is slow, is killed, has no memory, or leaves.

What happens to a rank happens inside `cost`, where the step is known, or at the beginning of the update that follows.
"""

import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from repo_fast.learning.learner import Learner
from tests import scorers
from tests.campaign.book import Trial
from tests.campaign.runs import Kind, Started, assert_equal, go_on, newest_step

# RANK:PHASE:WHAT, and the folder where each rank says which calls it has seen.
_TROUBLE, _MARKS = "TEST_TROUBLE", "TEST_MARKS"
_STEP = 3
_KIND = Kind(2, ("--cost.path tests.campaign.ranks:cost",))
_TIMEOUT = 40
# Beside the timeout: what torchrun leaves its workers after a SIGTERM, the roll call, and a machine that is busy.
_TO_END = 30 + 10 + 50
_SLOWER = 20

_calls = 0
_held: list[bytearray] = []


def cost(prompts: list[str], responses: list[str]) -> list[float]:
    """That of `tests.scorers`."""
    global _calls
    _calls += 1
    me = os.environ["RANK"]
    rank, phase, what = os.environ.get(_TROUBLE, "::").split(":")
    if _MARKS in os.environ:
        Path(os.environ[_MARKS], f"rank-{me}-call-{_calls}").write_text(str(os.getpid()))
    if me == rank and _calls == _STEP:
        if phase == "score":
            _WHAT[what]()
        else:
            _before_update(_WHAT[what])
    return scorers.cost(prompts, responses)


def _before_update(trouble: Callable[[], object]) -> None:
    update = Learner.update

    def troubled(self: Learner, *arguments: object) -> object:
        trouble()
        return update(self, *arguments)

    Learner.update = troubled  # type: ignore[method-assign]


def _signal(number: int) -> None:
    os.kill(os.getpid(), number)


def _hang() -> None:
    threading.Event().wait()


def _use_up_memory() -> None:
    """From now on this process is given no more, and has next to none left."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
    for size in (2**20, 2**16, 2**12):
        try:
            while True:
                _held.append(bytearray(size))
        except MemoryError:
            pass
    # For what says so.
    del _held[-16:]


_WHAT: dict[str, Callable[[], object]] = {
    "stop": partial(_signal, signal.SIGSTOP),
    "kill": partial(_signal, signal.SIGKILL),
    "hang": _hang,
    "memory": _use_up_memory,
    "exit": partial(sys.exit, 0),
}


def trials() -> Iterator[Trial]:
    """One for each trouble."""
    doing = f"in the phase '{{phase}}' after step {_STEP - 1}"
    late = f"does not answer: rank {{other}} waited .*, {doing}, .* within timeout \\({_TIMEOUT} s\\).*"
    gone = f"is gone: rank {{other}} lost its connection to it, {doing}.*"
    for rank, phase, what, said in (
        (1, "score", "stop", late),
        (0, "update", "stop", late),
        (1, "score", "hang", late),
        (1, "update", "kill", gone),
        (1, "update", "memory", f"ran out of memory, {doing}: .*"),
    ):
        line = f"rank {rank} {said.format(other=1 - rank, phase=phase)}"
        yield Trial(f"rank {rank}, {what} in {phase}", partial(_ends_early, f"{rank}:{phase}:{what}", line))
    line = r"the cost function '.*' raised SystemExit: 0, at .*"
    yield Trial("rank 1, sys.exit in score", partial(_ends_early, "1:score:exit", line))
    yield Trial(f"rank 1 is {_SLOWER} times slower", _slow)


def _start(folder: Path, trouble: str, *options: str) -> tuple[Started, Path]:
    """A run in `folder/run`, and the folder of its marks."""
    output_dir, marks = folder / "run", folder / "marks"
    marks.mkdir()
    environment = {_TROUBLE: trouble, _MARKS: str(marks)}
    return Started(_KIND.words(output_dir, *options), output_dir, environment), marks


def _ends_early(trouble: str, line: str, folder: Path) -> str:
    run, marks = _start(folder, trouble, f"--timeout {_TIMEOUT}")
    run.ends_with(1)
    rank = trouble.partition(":")[0]
    seconds = time.time() - (marks / f"rank-{rank}-call-{_STEP}").stat().st_mtime
    assert seconds < _TIMEOUT + _TO_END, f"it took {seconds:.0f} s to end"
    said = [text for text in run.said.splitlines() if text.startswith("error: ")]
    # Where the rank itself says it, the other may say that it lost it.
    matching = [text for text in said if re.fullmatch(f"error: {line}", text)]
    assert len(matching) == 1, (said, run.said[-4000:])
    assert all(f"rank {rank} " in text for text in said if text not in matching), said
    # torchrun's own.
    assert run.said.count("Traceback (most recent call last)") == 1, run.said[-4000:]
    kept = newest_step(folder / "run")
    assert kept == _STEP - 1, f"checkpoint {_STEP - 1} was complete, {kept} is left"
    assert "damaged" not in go_on(_KIND, folder / "run")
    assert_equal(folder / "run", _KIND)
    return f"ended {seconds:.0f} s after it, no process left, resumed to the same bits; said: {matching[0]}"


def _slow(folder: Path) -> str:
    run, marks = _start(folder, "::")
    first, last = marks / "rank-1-call-2", marks / "rank-1-call-4"
    run.until(first)
    started, pid, stops = time.monotonic(), int(first.read_text()), 0
    while not last.exists() and run.running:
        for number, seconds in ((signal.SIGSTOP, 0.02 * (_SLOWER - 1)), (signal.SIGCONT, 0.02)):
            os.kill(pid, number)
            time.sleep(seconds)
        stops += 1
    seconds = time.monotonic() - started
    run.ends_with(0)
    assert_equal(folder / "run", _KIND)
    return f"two steps took {seconds:.0f} s, with {stops} stops; it ended with the same bits"
