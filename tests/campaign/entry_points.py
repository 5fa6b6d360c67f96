"""Entry points called in a process of their own, which has imported them already: cold imports take seconds."""

import codecs
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.job_runs import fork_server

NOBODY = 65534
_LATER = ("evaluation.evaluator", "jobs.finetuning", "jobs.policy_export", "jobs.score_training", "scoring.expectation")
# A machine that is busy with other runs is slow; what hangs takes for ever.
LIMIT_SECONDS = 180


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status (128 + the signal that ended it), what it wrote, whether it was killed here."""

    status: int
    out: str
    err: str
    late: bool = False


def end_of(words: Sequence[str], folder: Path, *, as_nobody: bool = False, limit: float = LIMIT_SECONDS) -> Ended:
    """Run `python -m WORDS`, and kill it where it outlives the limit.

    Args:
        words: An entry point's module, and its command line.
        folder: Where it runs. What it says is written beside.
        as_nobody: Whether it has no right to read and write what root alone may.
        limit: How long it may take (seconds).
    """
    said = [folder.with_name(f"{folder.name}.{name}") for name in ("out", "err")]
    child = fork_server().Process(target=_call, args=(list(words), folder, *said, as_nobody))
    child.start()
    child.join(limit)
    late = child.exitcode is None
    if late:
        # With the processes that it started.
        os.killpg(child.pid, signal.SIGKILL)
        child.join()
    status = child.exitcode or 0
    return Ended(128 - status if status < 0 else status, *(path.read_text(errors="replace") for path in said), late)


def _call(words: list[str], folder: Path, out: Path, err: Path, as_nobody: bool) -> None:
    os.setsid()
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    module = importlib.import_module(words[0])
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{words[0]}.__main__")
    # What `python -m` says of itself.
    sys.argv = [str(module.__file__), *words[1:]]
    if as_nobody:
        # Whose right to read a library is not what is tried.
        for codec in ("utf-8-sig", "unicode-escape"):
            codecs.lookup(codec)
        for name in _LATER:
            importlib.import_module(f"repo_fast.{name}")
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    sys.exit(module.main())
