"""Runs many trainings, a few at a time, each in a process and folder of its own; what is complete is not run again."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from repo_fast.errors import InputError


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        folder: What it writes.
        options: Of `repo_fast.train`, without the folder.
    """

    folder: Path
    options: Mapping[str, str]

    @property
    def policy(self) -> Path:
        """What it makes."""
        return self.folder / "policy"


def run_all(runs: list[Run], jobs: int) -> None:
    """Run what is not complete, `jobs` at a time.

    Raises:
        InputError: A run's folder was made with other options, or a run failed; the others are finished first.
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
            print(f"{done}/{len(todo)} {run.folder}: {status}, {minutes:.1f} min in all", flush=True)
            if status != 0:
                failed.append(run)
    if failed:
        raise InputError(f"{len(failed)} runs failed, {failed[0].folder} for one: see {failed[0].folder / 'log.txt'}")


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


def _environment() -> dict[str, str]:
    """One thread, for that is as fast as two for models of this size, and runs are beside each other."""
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def _train(run: Run) -> int:
    run.folder.mkdir(parents=True, exist_ok=True)
    _record(run).write_text(json.dumps(dict(run.options), indent=1), encoding="utf-8")
    command = module_command("repo_fast.train", run.options | {"output_dir": str(run.folder), "resume": "auto"})
    with open(run.folder / "log.txt", "ab") as log:
        return subprocess.run(command, env=_environment(), stdout=log, stderr=subprocess.STDOUT).returncode


def _record(run: Run) -> Path:
    return run.folder / "options.json"


def _check_unchanged(run: Run) -> None:
    if not _record(run).is_file():
        return
    before = json.loads(_record(run).read_text(encoding="utf-8"))
    for key in before.keys() | run.options.keys():
        if before.get(key) != run.options.get(key):
            raise InputError(
                f"{run.folder} was made with {key} {before.get(key)}, this command has {run.options.get(key)}; "
                "expected the same, another --output_dir, or that folder removed"
            )
