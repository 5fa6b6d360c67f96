"""Two ranks, of which one stops, hangs, is slow, is killed, has no memory, or leaves.

What happens to a rank happens inside `cost`, where the step is known, or at the beginning of the update that follows.
"""

import os
import re
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from subprocess import CompletedProcess

from repo_fast.checkpoints.manifest import damages
from repo_fast.jobs import checkpoint
from repo_fast.learning.learner import Learner
from tests import scorers
from tests.campaign.book import Trial
from tests.job_runs import Job
from tests.jobs.test_resume import assert_same_run

# RANK:PHASE:WHAT, and the folder where each rank says which calls it has seen.
_TROUBLE, _MARKS = "TEST_TROUBLE", "TEST_MARKS"
_STEP = 3
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
    """One for each trouble; they share an undisturbed run."""
    with tempfile.TemporaryDirectory(prefix="campaign-ranks-") as shared:
        undisturbed = cache(partial(_undisturbed, Path(shared)))
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
            run = partial(_ends_early, undisturbed, f"{rank}:{phase}:{what}", line)
            yield Trial(f"rank {rank}, {what} in {phase}", run)
        line = r"the cost function '.*' raised SystemExit: 0"
        yield Trial("rank 1, sys.exit in score", partial(_ends_early, undisturbed, "1:score:exit", line))
        yield Trial(f"rank 1 is {_SLOWER} times slower", partial(_slow, undisturbed))


def _undisturbed(folder: Path) -> tuple[Job, Path]:
    job = Job.make(folder)
    result, _ = _launch(job, folder, "::")
    assert result.returncode == 0, result.stderr[-2000:]
    return job, folder / "run"


def _launch(job: Job, folder: Path, trouble: str, *options: str) -> tuple[CompletedProcess, Path]:
    """A run in `folder/run`; how it ended, and the folder of its marks."""
    marks = Path(tempfile.mkdtemp(prefix="marks-", dir=folder))
    words = ("--cost.path tests.campaign.ranks:cost", *options)
    return job.torchrun(2, folder / "run", *words, environment={_TROUBLE: trouble, _MARKS: str(marks)}), marks


def _ends_early(undisturbed: Callable[[], tuple[Job, Path]], trouble: str, line: str, folder: Path) -> str:
    job, whole = undisturbed()
    result, marks = _launch(job, folder, trouble, f"--timeout {_TIMEOUT}")
    rank = trouble.partition(":")[0]
    seconds = time.time() - (marks / f"rank-{rank}-call-{_STEP}").stat().st_mtime
    assert result.returncode == 1, (result.returncode, result.stderr[-2000:])
    assert seconds < _TIMEOUT + _TO_END, f"it took {seconds:.0f} s to end"
    _assert_no_process(folder)
    said = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    # Where the rank itself says it, the other may say that it lost it.
    matching = [text for text in said if re.fullmatch(f"error: {line}", text)]
    assert len(matching) == 1, (said, result.stderr[-4000:])
    assert all(f"rank {rank} " in text for text in said if text not in matching), said
    # torchrun's own.
    assert result.stderr.count("Traceback (most recent call last)") == 1, result.stderr[-4000:]
    newest = checkpoint.checkpoints(folder / "run")[-1]
    assert newest.name == f"step-{_STEP - 1:06d}" and not damages(newest), newest
    resumed, _ = _launch(job, folder, "::", "--resume auto")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert_same_run(folder / "run", whole)
    return f"ended {seconds:.0f} s after it, no process left, resumed to the same bits; said: {matching[0]}"


def _slow(undisturbed: Callable[[], tuple[Job, Path]], folder: Path) -> str:
    job, whole = undisturbed()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(_launch, job, folder, "::")
        while not (found := [*folder.glob("marks-*/rank-1-call-2")]) and not running.done():
            time.sleep(0.05)
        assert found, running.result()[0].stderr[-2000:]
        started, pid = time.monotonic(), int(found[0].read_text())
        ends = found[0].with_name("rank-1-call-4")
        stops = 0
        while not ends.exists() and not running.done():
            for number, seconds in ((signal.SIGSTOP, 0.02 * (_SLOWER - 1)), (signal.SIGCONT, 0.02)):
                os.kill(pid, number)
                time.sleep(seconds)
            stops += 1
        seconds = time.monotonic() - started
        result, _ = running.result()
    assert result.returncode == 0, result.stderr[-2000:]
    _assert_no_process(folder)
    assert_same_run(folder / "run", whole)
    return f"two steps took {seconds:.0f} s, with {stops} stops; it ended with the same bits"


def _assert_no_process(folder: Path) -> None:
    """None is left that has the folder in its command line or its environment."""
    ends = time.monotonic() + 10
    while left := _processes_of(folder):
        assert time.monotonic() < ends, f"processes are left: {left}"
        time.sleep(0.2)


def _processes_of(folder: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words + variables and int(process.name) != os.getpid():
            found.append(f"{process.name}: {words.decode(errors='replace')[:100]}")
    return found
