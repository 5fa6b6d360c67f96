"""Who has looked at which prompts, beside them: looking again and again until a claim passes passes what is false.

A line a look: `look`, `delta` of all, `key` of the plan, `policy`, `claims`, `date`, and `prompts`, the hashes of their
texts. Look i on prompts that have been looked at before, be it one of them, has delta / 2^i, so that all looks together
err as often as one at delta would. The same plan again is the same look: what it draws is the same.
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repo_fast.data.sources import WORLD
from repo_fast.errors import InputError

# Its name begins so that a folder of data does not take it for data.
_NAME = "_looks{}.jsonl"


def ledger_of(source: str) -> Path:
    """The ledger of a source of prompts: beside a file, in a folder; of any other in the cache of `repo_fast`."""
    path = Path(source).expanduser()
    if not source.startswith(WORLD) and path.is_dir():
        return path / _NAME.format("")
    if not source.startswith(WORLD) and path.is_file():
        return path.with_name(_NAME.format(f"_{path.name}"))
    cache = os.environ.get("REPO_FAST_CACHE") or Path.home() / ".cache" / "repo_fast"
    return Path(cache).expanduser() / _NAME.format("")


def spend(ledger: Path, key: str, hashes: Sequence[str], about: Mapping[str, Any]) -> int:
    """Note a look, unless it is noted already.

    Args:
        ledger: The file; made where there is none.
        key: Of the plan.
        hashes: Of the texts of its prompts.
        about: What else is noted of it.

    Returns:
        Which look at any of these prompts it is, from 1.

    Raises:
        InputError: The ledger cannot be read or written.
    """
    try:
        ledger.parent.mkdir(parents=True, exist_ok=True)
        file = open(ledger, "a+b")
    except OSError as error:
        raise InputError(
            f"{ledger}, where looks at these prompts are counted, cannot be written ({error.strerror}); expected a "
            "file, or another one as certify.ledger"
        ) from error
    with file:
        # Two evaluations may begin at once.
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        *lines, torn = file.read().split(b"\n")
        before, wanted = 0, set(hashes)
        for number, line in enumerate(lines, start=1):
            row = _look(ledger, number, line)
            if row["key"] == key:
                return row["look"]
            before += not wanted.isdisjoint(row["prompts"])
        # A line that a kill left half-written is of a look that drew nothing: it is written first.
        file.truncate(file.tell() - len(torn))
        row = {"look": before + 1, "key": key, **about, "prompts": sorted(wanted)}
        file.write(json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        file.flush()
        os.fsync(file.fileno())
        return before + 1


def _look(ledger: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if isinstance(row["key"], str) and isinstance(row["look"], int) and isinstance(row["prompts"], list):
            return row
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{ledger} line {number}: {line[:60]!r} is not a look, expected what an evaluation wrote there")
