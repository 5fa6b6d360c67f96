"""Trials, and the book of what they found."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.measuring.machine import machine

PARTS = ("kills", "storage", "damage", "bad_inputs", "fuzzing", "ranks", "attacks")


@dataclass(frozen=True)
class Trial:
    """One thing that is tried.

    Attributes:
        name: Unique in its part.
        run: Given an empty folder, returns in a few words what was seen; raises `AssertionError` where that is not
            what has to be, and `Unavailable`.
    """

    name: str
    run: Callable[[Path], str]


class Unavailable(Exception):
    """This machine does not let it be tried, such as for want of a right to mount; says why."""


@dataclass(frozen=True)
class Found:
    """What became of a trial.

    Attributes:
        part, trial: Its names.
        outcome: "held", "failed" or "unavailable".
        seen: What was seen, or what was wrong.
        seconds: That it took.
    """

    part: str
    trial: str
    outcome: str
    seen: str
    seconds: float


class Book:
    """`trials.jsonl`: of which commit and machine, then a line a trial.

    Args:
        folder: Made if missing.

    Raises:
        SystemExit: It holds the trials of another commit.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "trials.jsonl"
        self.about = machine(torch.device("cpu"))
        if not self._path.exists():
            self._append(self.about)
        first, *rest = map(json.loads, self._path.read_text().splitlines())
        if first["commit"] != self.about["commit"]:
            raise SystemExit(
                f"{self._path} is of {first['commit']}, this is {self.about['commit']}: give another --out"
            )
        self.about = first
        self.found = [Found(**row) for row in rest]

    def has(self, part: str, trial: str) -> bool:
        return any((found.part, found.trial) == (part, trial) for found in self.found)

    def add(self, found: Found) -> None:
        self.found.append(found)
        self._append(asdict(found))

    def _append(self, row: dict) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
