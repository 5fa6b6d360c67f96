"""Runs many trainings, a few at a time, each in a process and folder of its own; what is complete is not run again."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from repo_fast.errors import InputError


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        folder: What it writes.
        options: Of `repo_fast.train`, without the folder.
        origin: What else it depends on: ids of the models at the paths in its options.
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
        InputError: A run's folder was made with other options or from other models, or a run failed; the others are
            finished first.
        SystemExit: Ctrl-C or SIGTERM; the runs under way were asked to save and end, and have.
    """
    for run in runs:
        _check_unchanged(run)
    todo = [run for run in runs if not run.policy.is_dir()]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them complete", flush=True)
    started, failed = time.monotonic(), []
    trainings = _Trainings()
    with trainings.ended_by_signals(), ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(trainings.train, run): run for run in todo}
        for done, future in enumerate(as_completed(waiting), start=1):
            run, status = waiting[future], future.result()
            minutes = (time.monotonic() - started) / 60
            if not trainings.stopped:
                print(f"{done}/{len(todo)} {run.folder}: {status}, {minutes:.1f} min in all", flush=True)
            if status != 0:
                failed.append(run)
    if trainings.stopped:
        print("stopped; the same command goes on", flush=True)
        raise SystemExit(128 + trainings.stopped)
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
    """
    finished = subprocess.run(command, env=_environment(), stdout=subprocess.DEVNULL if quiet else None)
    if finished.returncode != 0:
        raise InputError(f"{' '.join(command[1:4])} ended with exit status {finished.returncode}, expected 0")


class _Trainings:
    """The processes under way, so that a signal ends them, and starts no more."""

    def __init__(self) -> None:
        self.stopped = 0
        self._children: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def train(self, run: Run) -> int:
        """Start a run, or go on with it, and wait; returns the exit status, or 1 where a signal came first."""
        run.folder.mkdir(parents=True, exist_ok=True)
        command = module_command("repo_fast.train", {**run.options, "output_dir": str(run.folder), "resume": "auto"})
        with open(run.folder / "log.txt", "ab") as log:
            with self._lock:
                if self.stopped:
                    return 1
                _record(run).write_text(json.dumps(_recorded(run), indent=1), encoding="utf-8")
                # A session of its own: Ctrl-C in a terminal would otherwise reach it twice.
                child = subprocess.Popen(
                    command, env=_environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
                self._children.add(child)
            status = child.wait()
            with self._lock:
                self._children.discard(child)
            return status

    @contextmanager
    def ended_by_signals(self) -> Iterator[None]:
        """Inside, Ctrl-C and SIGTERM ask all trainings to save and end."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.stopped = number
            for child in list(self._children):
                child.terminate()

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _environment() -> dict[str, str]:
    """One thread, for that is as fast as two for models of this size, and runs are beside each other."""
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def _record(run: Run) -> Path:
    return run.folder / "run.json"


def _recorded(run: Run) -> dict[str, dict[str, str]]:
    return {"options": dict(run.options), "origin": dict(run.origin)}


def _check_unchanged(run: Run) -> None:
    path = _record(run)
    if not path.is_file():
        if run.policy.exists():
            raise InputError(f"{run.policy} is there and {path} is not, expected both, or neither")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for part, ours in _recorded(run).items():
        for key in before[part].keys() | ours.keys():
            if before[part].get(key) != ours.get(key):
                raise InputError(
                    f"{run.folder} was made with {key} {before[part].get(key)}, this command has {ours.get(key)}; "
                    "expected the same, another --output_dir, or that folder removed"
                )
