"""What an evaluation keeps on disk, so that a policy, a prompt's sample, a score is paid for once.

    cache/KEY/about.json            what the key stands for
    cache/KEY/samples.jsonl         the responses of one policy, as drawn for one set of prompts and settings
    cache/KEY/reward-KEY.jsonl      their scores by one scorer, in the order of the responses

Rows are appended in *units*, each of which is drawn or scored at once; one that a kill left incomplete is done again.
A key is a hash of everything that the rows depend on, so another setting is another file, and nothing is overwritten.
"""

import contextlib
import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repo_fast.models.trunk import load_config
from repo_fast.report.jsonl import open_log, read_records, write_record
from repo_fast.scoring import FunctionScorer, ScorerSpec


def key_of(what: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that differ where `what`, plain JSON values, differs."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(path: str) -> list:
    """What tells a model from another of the same name: its files' names, sizes and times, or its commit on the hub."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return [path, getattr(load_config(path), "_commit_hash", None)]
    stats = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return [str(folder.resolve()), *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]


def scorer_fingerprint(spec: ScorerSpec, name: str) -> list:
    """What tells a scorer from another: for a function the text of its module, not of what that imports."""
    if spec.kind == "model":
        return fingerprint(spec.path)
    source = inspect.getsourcefile(FunctionScorer(spec.path, name).function)
    text = Path(source).read_bytes() if source else b""
    return [spec.path, hashlib.sha256(text).hexdigest()]


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
    def appending(self) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
        """Yields what writes the rows of the next unit; what was left of an incomplete one is cut away first."""
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
