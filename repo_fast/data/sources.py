"""Rows of local files, of the embedded world and of `datasets` names, and the fields and chats that are in them.

A source is one of

- a local file: `.jsonl` or `.jsonl.gz` (an object or a string a line), `.json` (a list of them), `.txt` (a text a
  line); blank lines hold nothing;
- a part of the corpus that ships with the package: `world:train` and `world:test` (prompts), `world:demonstrations`,
  `world:preferences`, and for these two `...-test`, on prompts that no other part but `world:test` has;
- anything else: a name for `datasets.load_dataset`, unless it looks like a path.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from repo_fast.errors import InputError

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".txt")
WORLD = "world:"


def check_limit(limit: int | None) -> None:
    """Raises InputError for a limit on the number of rows that leaves none."""
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1")


def read_rows(source: str, split: str, *, generate: int | None = None) -> Iterator[tuple[str, Any]]:
    """Iterates over the rows of a source.

    Args:
        source: See the module's docstring.
        split: For a `datasets` name only.
        generate: How many demonstrations or preferences of the embedded world to generate, None for its usual number.

    Yields:
        `(place, row)`; the place ("FILE line 3") goes into error messages.

    Raises:
        InputError: The source is missing or malformed.
    """
    path = Path(source).expanduser()
    if source.startswith(WORLD):
        return _world_rows(source, generate)
    if path.is_file():
        return _file_rows(path)
    if path.name.endswith(FILE_SUFFIXES) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(f"{source}: no such file")
    return _dataset_rows(source, split)


def _world_rows(source: str, generate: int | None) -> Iterator[tuple[str, Any]]:
    from repo_fast.world import corpus

    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "world:train": corpus.train_prompts,
        "world:test": corpus.test_prompts,
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
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{name}: neither a local file nor a dataset that could be loaded (split {split!r}): {reason}"
        ) from error
    for i, row in enumerate(rows):
        yield f"{name} [{split}] row {i}", row


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.name.endswith(FILE_SUFFIXES):
        raise InputError(f"{path}: unknown kind of file, expected one of {', '.join(FILE_SUFFIXES)}")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            if path.suffix == ".json":
                yield from _json_rows(path, file.read())
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    place = f"{path} line {number}"
                    yield place, line.rstrip("\r\n") if path.suffix == ".txt" else _parse(line, place)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: malformed JSON: {error.msg} (column {error.colno})") from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {error.lineno}: malformed JSON: {error.msg} (column {error.colno})") from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: holds a JSON {type(rows).__name__}, expected a list of objects or strings")
    for i, row in enumerate(rows):
        yield f"{path} item {i}", row


def string(value: Any, field: str, place: str) -> str:
    """A field's value, which may be blank.

    Raises:
        InputError: It is not a string.
    """
    if not isinstance(value, str):
        raise InputError(f"{place}: {field} is a {type(value).__name__}, expected a string")
    return value


def text(value: Any, field: str, place: str) -> str:
    """A field's value.

    Raises:
        InputError: It is not a string, or blank.
    """
    if not string(value, field, place).strip():
        raise InputError(f"{place}: {field} is blank")
    return value


def chat_messages(messages: Any, field: str, place: str) -> list[tuple[str, Any]]:
    """Role and content of each message of a chat, as they come.

    Raises:
        InputError: It is not a list of objects with role and content.
    """
    try:
        return [(message["role"], message["content"]) for message in messages]
    except (TypeError, KeyError) as error:
        raise InputError(f"{place}: {field} is not a list of objects with role and content") from error


def chat_turns(messages: Any, field: str, place: str, *, last: str) -> tuple[str, ...]:
    """The texts of a chat of user and assistant in turn.

    Args:
        messages: A list of objects with role and content.
        field: Its name, for errors.
        place: Of the row, for errors.
        last: Whose the last turn has to be: `user` or `assistant`.

    Returns:
        An odd number of texts for a user's last turn, an even one for the assistant's. None is blank but for an
        assistant's last one, which is the caller's to judge.

    Raises:
        InputError: It is no such chat. A system text is among the reasons: it could not be kept.
    """
    turns = chat_messages(messages, field, place)
    roles = [role for role, _ in turns]
    if not roles or roles != (["user", "assistant"] * len(roles))[: len(roles)] or roles[-1] != last:
        missing = f"no {last} turn at the end: " if roles[-1:] != [last] else ""
        raise InputError(
            f"{place}: {field} has the turns {roles}, {missing}expected user and assistant in turn, the user first "
            f"and the {last} last; system texts cannot be kept"
        )
    names = [f"{field} turn {i + 1} ({role})" for i, role in enumerate(roles)]
    *context, end = [content for _, content in turns]
    texts = [text(content, name, place) for content, name in zip(context, names, strict=False)]
    return *texts, (string if last == "assistant" else text)(end, names[-1], place)
