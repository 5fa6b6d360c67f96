"""Runs many trainings, a few at a time, each in a process and folder of its own, and evaluates what they made.

What is complete is not run again.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from repo_fast.config import TrainConfig, parse, to_dict
from repo_fast.errors import InputError
from repo_fast.jobs.launch import guarded

# The name that evaluations give the policy that trainings started from.
START = "start"


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        folder: What it writes.
        options: Of `repo_fast.train`, without the folder.
        origin: What the paths in its options stand for: ids of models, hashes of files.
    """

    folder: Path
    options: Mapping[str, str]
    origin: Mapping[str, str] = field(default_factory=dict)

    @property
    def policy(self) -> Path:
        """What it makes."""
        return self.folder / "policy"


def run_all(runs: list[Run], jobs: int) -> None:
    """Run what is not complete, `jobs` at a time.

    Raises:
        InputError: A run's folder was made with another configuration or from other models, or a run failed; the others
            are finished first.
        SystemExit: A signal came, see `interruptible`.
    """
    for run in runs:
        _check_unchanged(run)
    todo = [run for run in runs if not run.policy.is_dir()]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them complete", flush=True)
    started, failed = time.monotonic(), []
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(_train, run): run for run in todo}
        for done, future in enumerate(as_completed(waiting), start=1):
            run, status = waiting[future], future.result()
            minutes = (time.monotonic() - started) / 60
            if not _children.stopped:
                print(f"{done}/{len(todo)} {run.folder}: {status}, {minutes:.1f} min in all", flush=True)
            if status != 0:
                failed.append(run)
    _children.exit_if_stopped()
    if failed:
        raise InputError(
            f"{len(failed)} of {len(todo)} runs failed, {failed[0].folder} for one: see "
            f"{failed[0].folder / 'log.txt'}; the same command tries only them again"
        )


def module_command(module: str, options: Mapping[str, str]) -> list[str]:
    """The command line of one of the package's modules."""
    return [sys.executable, "-m", module, *(word for key, value in options.items() for word in (f"--{key}", value))]


def call(command: list[str], quiet: bool = False) -> None:
    """Run a command to its end.

    Raises:
        InputError: It failed.
        SystemExit: A signal came, see `interruptible`.
    """
    status = _children.run(command, stdout=subprocess.DEVNULL if quiet else None)
    _children.exit_if_stopped()
    if status != 0:
        raise InputError(f"{' '.join(command[1:4])} ended with exit status {status}, expected 0")


def evaluate(policies: Mapping[str, str], output_dir: Path, options: Mapping[str, str]) -> dict:
    """Judge policies beside the start, one of them.

    Args:
        policies: Paths by name.
        output_dir: Folder of the report.
        options: Of `repo_fast.evaluate`, but for these.

    Returns:
        `report.json`.

    Raises:
        InputError, SystemExit: As `call`.
    """
    command = module_command("repo_fast.evaluate", {**options, "reference": START, "output_dir": str(output_dir)})
    call([*command, *(f"--policy={name}={path}" for name, path in policies.items())], quiet=True)
    return json.loads((output_dir / "report.json").read_text(encoding="utf-8"))


def interruptible(run: Callable[[], int]) -> int:
    """Call `run` as a command: Ctrl-C and SIGTERM ask its processes to save and end, and start no more.

    Returns:
        The exit status: what `run` gives, 2 for bad input, which is said in one line, or 128 + the signal.
    """
    before = {number: signal.signal(number, _children.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return guarded(run)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Children:
    """The processes under way."""

    def __init__(self) -> None:
        self.stopped = 0
        self._running: set[subprocess.Popen] = set()
        # Only held for moments, and by the threads that start processes: the handler can wait for it.
        self._lock = threading.Lock()

    def run(self, command: list[str], **options: Any) -> int:
        """Start a process and wait for it; returns its exit status, or 1 where a signal came first."""
        with self._lock:
            if self.stopped:
                return 1
            # A session of its own: Ctrl-C in a terminal would otherwise reach it twice.
            child = subprocess.Popen(command, env=_environment(), start_new_session=True, **options)
            self._running.add(child)
        status = child.wait()
        self._running.discard(child)
        return status

    def stop(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.stopped = number
        for child in list(self._running):
            child.terminate()

    def exit_if_stopped(self) -> None:
        if self.stopped:
            print("stopped; the same command goes on", flush=True)
            raise SystemExit(128 + self.stopped)


_children = _Children()


def _environment() -> dict[str, str]:
    """One thread, for that is as fast as two for models of this size, and runs are beside each other."""
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def _train(run: Run) -> int:
    """Start a run, or go on with it, and wait; returns the exit status."""
    run.folder.mkdir(parents=True, exist_ok=True)
    _record(run).write_text(json.dumps(_recorded(run), indent=1), encoding="utf-8")
    command = module_command("repo_fast.train", {**run.options, "output_dir": str(run.folder), "resume": "auto"})
    with open(run.folder / "log.txt", "ab") as log:
        return _children.run(command, stdout=log, stderr=subprocess.STDOUT)


def _record(run: Run) -> Path:
    return run.folder / "run.json"


def _recorded(run: Run) -> dict[str, dict[str, Any]]:
    """All that the run's result depends on: the resolved configuration, and what its paths hold."""
    words = [word for key, value in run.options.items() for word in (f"--{key}", value)]
    return {"configuration": to_dict(parse(words, TrainConfig)), "origin": dict(run.origin)}


def _check_unchanged(run: Run) -> None:
    path = _record(run)
    if not path.is_file():
        if run.policy.exists():
            raise InputError(f"{run.policy} is there and {path} is not, expected both, or neither")
        return
    # As JSON has it: without tuples.
    before, ours = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(_recorded(run)))
    for part in ours:
        for key in before[part].keys() | ours[part].keys():
            if before[part].get(key) != ours[part].get(key):
                raise InputError(
                    f"{run.folder} was made with {key} {before[part].get(key)}, this command has "
                    f"{ours[part].get(key)}; expected the same, another --output_dir, or that folder removed"
                )
