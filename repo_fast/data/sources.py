"""Rows of local files and folders, of the embedded world and of `datasets` names.

A source is one of

- a local file: `.jsonl` (an object or a string a line), `.json` (a list of them), `.txt` (a text a line), `.csv` (a
  header, then a row a line; an empty cell is null), each of them also as `.gz`, and `.parquet`; UTF-8, with or without
  a byte-order mark; blank lines hold nothing;
- a local folder of such files, read one after the other in the order of their names; where the names are of several
  splits (train-0.parquet, test-0.parquet), those of one split; a folder with folders in it is read by `datasets`;
- a part of the corpus that ships with the package: `world:train`, `world:test` and `world:certify` (prompts),
  `world:demonstrations`, `world:preferences`, and for these two `...-test`, on prompts that no other part has but
  `world:test` and `world:certify`;
- anything else: a name for `datasets.load_dataset`, unless it looks like a path.
"""

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

from repo_fast.errors import InputError, first_line

FILE_KINDS = ".jsonl, .json, .txt, .csv (also as .gz) or .parquet"
WORLD = "world:"
# What a file without types writes for the numbers and truth values of a label.
_LABELS = {"0": 0, "1": 1, "true": True, "false": False}
# Files that stand beside data and hold none; and the name of a split in the name of a file or folder.
NO_DATA = re.compile(r"[._].*|.*\.md|(readme|license)(\..*)?|dataset_infos?\.json", re.IGNORECASE)
_SPLIT = re.compile(r"(?<![a-z])(train|test|val|dev|eval)(ing|id|idation|uation)?(?![a-z])", re.IGNORECASE)


def check_limit(limit: int | None) -> None:
    """Raises InputError for a limit on the number of rows that leaves none."""
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1")


def read_rows(
    source: str, split: str, *, generate: int | None = None, labels: Collection[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Iterates over the rows of a source.

    Args:
        source: See the module's docstring.
        split: For a `datasets` name, and a folder with several splits.
        generate: How many demonstrations or preferences of the embedded world to generate, None for its usual number.
        labels: Columns of numbers 0 and 1 or of truth values: in a `.csv`, where everything is text, they become that.

    Yields:
        `(place, row)`; the place ("FILE line 3", "FILE row 3") goes into error messages.

    Raises:
        InputError: The source is missing or malformed.
    """
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise InputError(f"{source}: no such file: {first_line(error)}") from error
    if source.startswith(WORLD):
        return _world_rows(source, generate)
    try:
        if path.is_file():
            return _file_rows(path, labels)
        if path.is_dir():
            return _folder_rows(path, split, labels)
    except OSError as error:  # a name that is too long
        raise InputError(f"{source:.80}: no such file: {error.strerror}") from error
    if not may_be_on_the_hub(source):
        raise InputError(f"{source}: no such file")
    return _dataset_rows(source, split)


def may_be_on_the_hub(source: str) -> bool:
    """Whether what is no file or folder here may be a dataset's name: it does not look like a path."""
    return _kind(Path(source)) is None and not source.startswith((".", "/", "~")) and source.count("/") <= 1


def _world_rows(source: str, generate: int | None) -> Iterator[tuple[str, Any]]:
    from repo_fast.world import corpus

    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "world:train": corpus.train_prompts,
        "world:test": corpus.test_prompts,
        "world:certify": corpus.certify_prompts,
        "world:demonstrations": lambda: corpus.demonstrations(generate or 4096, seed=0),
        "world:demonstrations-test": lambda: corpus.demonstrations(generate or 256, seed=1, held_out=True),
        "world:preferences": lambda: corpus.preferences(generate or 20480, seed=0, held_out=False),
        "world:preferences-test": lambda: corpus.preferences(generate or 512, seed=1, held_out=True),
    }
    if source not in parts:
        raise InputError(f"{source}: no such part of the embedded world, expected one of {', '.join(parts)}")
    for i, row in enumerate(parts[source]()):
        yield f"{source} item {i}", row


def _dataset_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the loader's errors share no type, and the name is the user's whatever it raises
        raise InputError(
            f"{name}: neither a local file nor a dataset that could be loaded (split {split!r}): {first_line(error)}"
        ) from error
    for i, row in enumerate(rows):
        yield f"{name} [{split}] row {i}", row


def _kind(path: Path) -> str | None:
    """The suffix that says how a file is read, `.gz` aside; None for another kind of file."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        return ".parquet"
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in (".jsonl", ".json", ".txt", ".csv") else None


def _folder_rows(folder: Path, split: str, labels: Collection[str]) -> Iterator[tuple[str, Any]]:
    try:
        entries = sorted(path for path in folder.iterdir() if not NO_DATA.fullmatch(path.name))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {first_line(error)}") from error
    if any(path.is_dir() for path in entries):
        yield from _dataset_rows(str(folder), split)
        return
    if not entries:
        raise InputError(f"{folder}: a folder without data, expected files of the kinds {FILE_KINDS}")
    for path in entries:
        _check_kind(path)
    splits = [_split_of(path.name) for path in entries]
    if len(set(splits) - {None}) > 1:
        for path, found in zip(entries, splits, strict=True):
            if found is None:
                raise InputError(
                    f"{path}: of no split, in a folder with files of several: name a file, or a folder of one"
                )
        entries = [path for path, found in zip(entries, splits, strict=True) if found == _split_of(split)]
        if not entries:
            raise InputError(
                f"{folder}: no file of the split {split!r}, found {', '.join(sorted(set(map(str, splits))))}"
            )
    for path in entries:
        yield from _file_rows(path, labels)


def _split_of(name: str) -> str | None:
    found = _SPLIT.search(name)
    return found and found[1].lower()


def _check_kind(path: Path) -> str:
    kind = _kind(path)
    if kind is None:
        raise InputError(f"{path}: unknown kind of file, expected {FILE_KINDS}")
    return kind


def _file_rows(path: Path, labels: Collection[str]) -> Iterator[tuple[str, Any]]:
    kind = _check_kind(path)
    try:
        if kind == ".parquet":
            yield from _parquet_rows(path)
            return
        with (
            _open(path) as binary,
            io.TextIOWrapper(binary, "utf-8-sig", newline="" if kind == ".csv" else None) as file,
        ):
            if kind == ".json":
                yield from _json_rows(path, file.read())
            elif kind == ".csv":
                yield from _csv_rows(path, file, labels)
            else:
                yield from _line_rows(path, file, kind)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}{_undecodable_line(path)}: cannot be read, expected UTF-8: {first_line(error)}"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _undecodable_line(path: Path) -> str:
    """Where it is, as " line 3"; nothing where that cannot be told, of what was compressed and damaged."""
    with contextlib.suppress(OSError, EOFError, zlib.error), _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f" line {number}"
    return ""


def _line_rows(path: Path, file: IO[str], kind: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        # Files put together with `cat` have a byte-order mark in the middle.
        line = line.lstrip("\ufeff")
        if line.strip():
            place = f"{path} line {number}"
            yield place, line.rstrip("\r\n") if kind == ".txt" else _parse(line, place)


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if not text.strip():
        return
    rows = _parse(text, str(path), lines=True)
    if not isinstance(rows, list):
        raise InputError(f"{path}: holds a JSON {type(rows).__name__}, expected a list of objects or strings")
    for i, row in enumerate(rows):
        yield f"{path} item {i}", row


def _parse(text: str, place: str, lines: bool = False) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if lines else ""
        raise InputError(f"{place}{line}: malformed JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise InputError(f"{place}: malformed JSON: nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits, a key twice
        raise InputError(f"{place}: malformed JSON: {first_line(error)}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _csv_rows(path: Path, file: IO[str], labels: Collection[str]) -> Iterator[tuple[str, Any]]:
    # Its limit on a cell guards against a lost quotation mark, which `strict` finds at the end of the file.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(file, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise InputError(f"{path}: the header has a column twice: {', '.join(header)}")
        start = reader.line_num + 1
        for cells in reader:
            place, start = f"{path} line {start}", reader.line_num + 1
            if not any(cells):
                continue
            if len(cells) != len(header):
                raise InputError(f"{place}: {len(cells)} cells, expected the {len(header)} of the header")
            row: dict[str, Any] = {name: cell or None for name, cell in zip(header, cells, strict=True)}
            for name in labels:
                if row.get(name):
                    row[name] = _LABELS.get(row[name].strip().lower(), row[name])
            yield place, row
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: malformed CSV: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path} row {number}", row
                    number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error
