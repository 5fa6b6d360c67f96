"""JSON-lines logs that survive a kill and read, after a resume, as if the run had never stopped.

A record is one flat JSON object a line with an integer `step`. Python writes floats with the fewest digits that read
back as the same float, so metrics can be compared bit by bit between two runs. JSON has no NaN and no infinity: such a
value is written as null, and the extra key `non_finite` keeps its name and what it was, e.g.
`{"step": 3, "loss": null, "non_finite": {"loss": "nan"}}`; reading restores it. Every line is flushed, so a killed run
loses at most the line it was writing: one without a newline at the end of the file, which readers skip.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, TextIO

from repo_fast.errors import InputError
from repo_fast.report.rewriting import rewriting

Value = float | int | str | list[int] | None


def write_record(file: TextIO, record: Mapping[str, Value]) -> None:
    """Appends one record as a line, and flushes it.

    Raises:
        TypeError: a value is not a plain Python number, string or None (a tensor, say).
        ValueError: the record has no integer `step`, or uses the reserved key `non_finite`.
        OSError: it cannot be written; with the file's name.
    """
    if not isinstance(record.get("step"), int):
        raise ValueError(f"a record's step is {record.get('step')!r}; expected an integer")
    if "non_finite" in record:
        raise ValueError("the key non_finite is reserved for the names of NaN and infinite values")
    non_finite = {name: str(v) for name, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    line: dict[str, object] = {name: None if name in non_finite else value for name, value in record.items()}
    if non_finite:
        line["non_finite"] = non_finite
    try:
        file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
    except OSError as error:
        error.filename = file.name
        raise


def write_log(path: Path, records: Iterable[Mapping[str, Value]]) -> None:
    """Writes a whole log at once, over an older one of that name."""
    path.unlink(missing_ok=True)
    with open_log(path, None) as file:
        for record in records:
            write_record(file, record)


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes rows without a step, over an older file of that name, which stays until the new one is whole."""
    with rewriting(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_records(path: Path) -> Iterator[dict[str, Value]]:
    """Yields the complete records of a log, NaN and infinities restored.

    Raises:
        InputError: the file is missing, or a complete line is not a record (named with its number).
    """
    for _, record in lines_and_records(path):
        for name, value in record.pop("non_finite", {}).items():
            record[name] = float(value)
        yield record


def last_step(path: Path) -> int:
    """The last step that a log has a record of; 0 where there is none.

    Raises:
        InputError: a complete line is not a record.
    """
    return max((record["step"] for _, record in lines_and_records(path)), default=0) if path.exists() else 0


def open_log(path: Path, resume_step: int | None) -> TextIO:
    """Opens a log for appending.

    Args:
        path: The file; its folder exists.
        resume_step: None for a new run: the file must not exist yet. Otherwise the last step that the resumed run keeps
            (0: none of them): later records, and a line torn by a kill, are cut away. What remains is written aside and
            renamed over the file, so that a kill in between loses nothing. A missing file starts empty.

    Returns:
        A UTF-8 text file. A lone surrogate, which a prompt read from JSON may hold, is written as its JSON escape.

    Raises:
        InputError: a new run found the file, or the file to resume has a malformed line (the file stays as it was).
    """
    if resume_step is None:
        try:
            return _open_text(path, "x")
        except FileExistsError:
            raise InputError(f"{path} exists already; expected a new output folder, or a resumed run") from None
    if path.exists():
        aside = path.with_name(path.name + ".tmp")
        with open(aside, "wb") as kept:
            for line, record in lines_and_records(path):
                if record["step"] <= resume_step:
                    kept.write(line)
            kept.flush()
            os.fsync(kept.fileno())
        os.replace(aside, path)
    return _open_text(path, "a")


def lines_and_records(path: Path, offset: int = 0, lines: int = 0) -> Iterator[tuple[bytes, dict]]:
    """Yields the complete lines of a log, and the record that each is, as it is written.

    Args:
        path: The log.
        offset, lines: How many bytes, and lines, of it are skipped.

    Raises:
        InputError: as for `read_records`.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; expected a JSON-lines log of a run") from None
    with file:
        file.seek(offset)
        for number, line in enumerate(file, start=lines + 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise InputError(f"{path}, line {number}: expected a JSON object with an integer step")
            yield line, record


def _open_text(path: Path, mode: Literal["x", "a"]) -> TextIO:
    return open(path, mode, encoding="utf-8", errors="backslashreplace", newline="\n")
