"""Who has looked at which prompts, beside them: looking again and again until a claim passes passes what is false.

A line a look: `look`, `delta` of all looks, `key` of what was looked at, `policy`, `claims`, `date`, and `prompts`, the
hashes of their texts. Look i on prompts that have been looked at before, be it one of them, has delta / 2^i, so that
all looks together err as often as one at delta would. The same plan again is the same look, as long as what comes of it
is the same: a line with `rows` keeps a hash of that. Responses that were drawn without a claim are a look too, where
the cache has them.

It finds accidents, not those who delete it.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from repo_fast.data.sources import WORLD
from repo_fast.errors import InputError

# Hidden, so that neither we nor `datasets` take it for data.
_NAME = ".repo_fast_looks.jsonl"


def ledger_of(source: str) -> Path:
    """The ledger of a source of prompts: beside a file, in a folder; of any other among the user's state files."""
    path = Path(source).expanduser()
    if not source.startswith(WORLD) and path.exists():
        path = path.resolve()
        return (path if path.is_dir() else path.parent) / _NAME
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state).expanduser() / "repo_fast" / _NAME.removeprefix(".repo_fast_")


class Ledger:
    """The looks in a file, which is made where there is none.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def drawn(self) -> set[str]:
        """Names of the cache's folders with responses that looks are noted for."""
        with self._open() as (_, rows):
            return {name for row in rows for name in row.get("drawn", ())}

    def spend(self, key: str, delta: float, hashes: Sequence[str], about: Mapping[str, Any]) -> int:
        """Note a look, unless it is noted already.

        Args:
            key: Of what is looked at.
            delta: Of all looks at these prompts.
            hashes: Of the texts of the prompts.
            about: What else is noted of it.

        Returns:
            Which look at any of these prompts it is, from 1.

        Raises:
            InputError: The file cannot be read or written, or earlier looks had another delta.
        """
        with self._open() as (file, rows):
            for row in rows:
                if row["key"] == key and "rows" not in row:
                    return row["look"]
            return self._note(file, rows, key, delta, hashes, about)

    def settle(self, key: str, delta: float, hashes: Sequence[str], about: Mapping[str, Any], found: str) -> int:
        """Note what came of a look: where that is something else than before, it was another look.

        Args:
            key, delta, hashes, about: As for `spend`, which was called.
            found: A hash of the responses and their scores.

        Returns:
            Which look it is.
        """
        with self._open() as (file, rows):
            looks = [row["look"] for row in rows if row["key"] == key and "rows" not in row]
            results = {row["rows"]: row["look"] for row in rows if row["key"] == key and "rows" in row}
            if found in results:
                return results[found]
            fresh = [look for look in looks if look not in results.values()]
            look = fresh[0] if fresh else self._note(file, rows, key, delta, hashes, about)
            _append(file, {"look": look, "key": key, "rows": found, "prompts": []})
            return look

    def _note(
        self,
        file: IO[bytes],
        rows: Sequence[Mapping[str, Any]],
        key: str,
        delta: float,
        hashes: Sequence[str],
        about: Mapping[str, Any],
    ) -> int:
        before = [row for row in rows if not set(hashes).isdisjoint(row["prompts"])]
        for row in before:
            if row["delta"] != delta:
                raise InputError(
                    f"certify.delta is {delta:g}, and look {row['look']} at these prompts, in {self.path}, was of "
                    f"{row['delta']:g}; expected that, which all looks at them share, or fresh prompts"
                )
        look = len(before) + 1
        _append(file, {"look": look, "key": key, "delta": delta, **about, "prompts": sorted(set(hashes))})
        return look

    @contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], list[dict[str, Any]]]]:
        """The file, this process's alone, at its end, and what is in it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "a+b")
        except OSError as error:
            raise InputError(
                f"{self.path}, where looks at these prompts are counted, cannot be written ({error.strerror}): "
                "expected a file, or another as certify.ledger"
            ) from error
        with file:
            # Two evaluations may begin at once.
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            *lines, tail = file.read().split(b"\n")
            rows = [self._row(number, line) for number, line in enumerate(lines, start=1)]
            if tail.startswith(b'{"look": ') and not tail.endswith(b"}"):
                # A kill left it half-written: nothing was drawn for it, since it is written first.
                file.truncate(file.tell() - len(tail))
            elif tail:
                rows.append(self._row(len(lines) + 1, tail))
                file.write(b"\n")
            yield file, rows

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
            known = isinstance(row["key"], str) and isinstance(row["look"], int) and isinstance(row["prompts"], list)
            if known and ("rows" in row or isinstance(row["delta"], float)):
                return row
        except (ValueError, KeyError, TypeError):
            pass
        raise InputError(
            f"{self.path} line {number}: {line[:60]!r} is not a look, expected what an evaluation wrote there"
        )


def _append(file: IO[bytes], row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
    file.flush()
    os.fsync(file.fileno())
