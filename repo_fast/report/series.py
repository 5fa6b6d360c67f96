"""The numbers of a log over its steps, and fewer of them where a picture has no room for all."""

import math
from array import array
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from repo_fast.report.jsonl import lines_and_records

# Points in a picture: more would lie on each other, and their texts make a page large.
MOST_POINTS = 200


class Columns:
    """The numbers of a log that grows, by column. What was read of it is not read again.

    A log that was written anew, as a resumed run does, is read from its beginning.

    Args:
        path: The log; it need not be there yet. A link is as good as nothing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget(None)

    def _forget(self, file: tuple[int, int] | None) -> None:
        self._file, self._bytes, self._lines, self._last = file, 0, 0, b""
        self._values: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))

    def refresh(self) -> None:
        """Read what is new.

        Raises:
            InputError: A complete line is no record.
        """
        if not self._path.is_file() or self._path.is_symlink():
            return self._forget(None)
        found = self._path.stat()
        if self._file != (found.st_dev, found.st_ino) or not self._is_longer():
            self._forget((found.st_dev, found.st_ino))
        for line, record in lines_and_records(self._path, self._bytes, self._lines):
            for name, value in record.items():
                if isinstance(value, int | float):
                    column = self._values[name]
                    # In the lines before, the column was missing.
                    column.extend([math.nan] * (self._lines - len(column)))
                    column.append(value)
            self._bytes, self._lines, self._last = self._bytes + len(line), self._lines + 1, line
        return None

    def _is_longer(self) -> bool:
        """Whether what was read is there still: a file system gives the number of one that is gone to a later file."""
        with open(self._path, "rb") as file:
            file.seek(self._bytes - len(self._last))
            return file.read(len(self._last)) == self._last

    def names(self) -> list[str]:
        """The columns that have a number, in the order of the log."""
        return list(self._values)

    def __getitem__(self, name: str) -> np.ndarray:
        """A column, float64 [N]; NaN where it is missing or not finite."""
        values = np.full(self._lines, np.nan)
        if name in self._values:
            column = np.frombuffer(self._values[name], dtype=np.float64)
            values[: len(column)] = np.where(np.isfinite(column), column, np.nan)
        return values


@dataclass(frozen=True)
class Thinned:
    """A column in N groups of consecutive steps.

    Attributes:
        first, last: float64 [N]. The first and the last step of each group.
        mean, low, high: float64 [N]. Of its finite values; NaN without any.
        group: How many steps are one; 1: nothing was left out.
    """

    first: np.ndarray
    last: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    group: int


def thin(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> Thinned:
    """No more than so many groups of a column, equal ones but for the last.

    Args:
        steps, values: float64 [M], M > 0; NaN where there is no value.
        most: Of groups.
    """
    group = -(-len(steps) // most)
    starts = np.arange(0, len(steps), group)
    finite = np.isfinite(values)
    counts = np.add.reduceat(finite.astype(np.int64), starts)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    low = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
    some = counts > 0
    return Thinned(
        first=steps[starts],
        last=steps[np.append(starts[1:], len(steps)) - 1],
        mean=np.divide(sums, counts, out=np.full(len(starts), np.nan), where=some),
        low=np.where(some, low, np.nan),
        high=np.where(some, high, np.nan),
        group=group,
    )


def running_window(points: int) -> int:
    """Over how many points noisy ones are averaged."""
    return 2 * (points // 40) + 3


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite values in a centred window, which is cut at both ends; NaN where there are none."""
    finite = np.isfinite(values)
    ones = np.ones(window)
    counts = np.convolve(finite, ones, mode="same")
    sums = np.convolve(np.where(finite, values, 0.0), ones, mode="same")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
