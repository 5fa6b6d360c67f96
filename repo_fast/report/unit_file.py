"""Rows on disk in *units*, each of which is drawn or scored at once; one that a kill left incomplete is done again."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repo_fast.report.jsonl import open_log, read_records, write_record


class UnitFile:
    """Rows on disk, in units.

    Args:
        path: The file; its folder exists.
        sizes: How many rows each unit has. There may be more units in the file.
    """

    def __init__(self, path: Path, sizes: Sequence[int]) -> None:
        self.path, self.sizes = path, sizes

    def complete(self) -> int:
        """How many units are there, from the first on."""
        rows = Counter(row["step"] for row in read_records(self.path)) if self.path.is_file() else Counter()
        done = 0
        while done < len(self.sizes) and rows[done] == self.sizes[done]:
            done += 1
        return done

    @contextlib.contextmanager
    def appending(self, writes: bool = True) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
        """Yields what writes the rows of the next unit; what was left of an incomplete one is cut away first.

        Args:
            writes: False on the ranks that go along: what they are given goes nowhere.
        """
        if not writes:
            yield lambda rows: None
            return
        done = self.complete()
        with open_log(self.path, resume_step=done - 1) as file:

            def append(rows: Sequence[Mapping[str, Any]]) -> None:
                nonlocal done
                for row in rows:
                    write_record(file, {"step": done, **row})
                done += 1

            yield append

    def read(self) -> list[dict[str, Any]]:
        """All rows, in order. All units have to be complete."""
        return [row for row in read_records(self.path) if row["step"] < len(self.sizes)]
