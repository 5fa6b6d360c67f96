"""Reads prompts and demonstrations from local files, the embedded world, or a `datasets` name.

A source is one of

- a local file: `.jsonl` or `.jsonl.gz` (an object or a string a line), `.json` (a list of them), `.txt` (a prompt a
  line); blank lines hold nothing;
- `world:train`, `world:test`, `world:demonstrations`: the corpus that ships with the package;
- anything else: a name for `datasets.load_dataset`, unless it looks like a path.

The fields of PKU-SafeRLHF (`prompt`), alpaca (`instruction`, `input`, `output`), chats (`messages`) and the usual names
of question-answering sets are understood. A row that cannot be represented is an error with its place, never
skipped: a prompt that is silently missing is a constraint that silently does not hold.
"""

import gzip
import json
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repo_fast.errors import InputError

log = logging.getLogger(__name__)

PROMPT_FIELDS = ("prompt", "instruction", "messages", "question", "query", "text")
RESPONSE_FIELDS = ("response", "completion", "output", "answer", "messages")
FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".txt")
WORLD = "world:"
WORLD_DEMONSTRATIONS = 4096


@dataclass(frozen=True)
class Prompt:
    """A prompt as the user wrote it.

    Attributes:
        id: Its index after de-duplication: stable for a given source.
        text: Without template, never blank.
        category: The source's `category`, where it has one.
    """

    id: int
    text: str
    category: str | None = None


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response to imitate, both without template and never blank."""

    prompt: str
    response: str


def load_prompts(source: str, *, split: str = "train", limit: int | None = None) -> list[Prompt]:
    """Reads the distinct prompts of a source, in its order. The number of duplicates is logged.

    Args:
        source: See the module's docstring.
        split: For a `datasets` name only.
        limit: Stop after this many distinct prompts.

    Returns:
        At least one prompt; `prompts[i].id == i`.

    Raises:
        InputError: The source is missing, empty or malformed, or a row has no usable prompt.
    """
    _check_limit(limit)
    prompts: dict[str, Prompt] = {}
    n_rows = 0
    for place, row in _rows(source, split):
        n_rows += 1
        text = _prompt_of(row, place)
        if text not in prompts:
            category = row.get("category") if isinstance(row, dict) else None
            prompts[text] = Prompt(len(prompts), text, category if isinstance(category, str) else None)
            if len(prompts) == limit:
                break
    if not prompts:
        raise InputError(f"{source}: empty, expected at least one prompt")
    log.info("%s: %d prompts (%d duplicates dropped)", source, len(prompts), n_rows - len(prompts))
    return list(prompts.values())


def load_demonstrations(source: str, *, split: str = "train", limit: int | None = None) -> list[Demonstration]:
    """Reads prompts with the responses to imitate (SFT, the PTX loss), in the order of the source.

    Rows whose response is blank (alpaca has a few) teach nothing: they are left out, and their number is logged.

    Args:
        source: See the module's docstring.
        split: For a `datasets` name only.
        limit: Stop after this many demonstrations.

    Returns:
        At least one demonstration.

    Raises:
        InputError: The source is missing, empty or malformed, or a row has no usable prompt or response.
    """
    _check_limit(limit)
    demonstrations: list[Demonstration] = []
    n_blank = 0
    for place, row in _rows(source, split, n_generated=limit or WORLD_DEMONSTRATIONS):
        prompt, response = _prompt_of(row, place), _response_of(row, place)
        if not response.strip():
            n_blank += 1
            continue
        demonstrations.append(Demonstration(prompt, response))
        if len(demonstrations) == limit:
            break
    if not demonstrations:
        raise InputError(f"{source}: no demonstrations ({n_blank} rows, all with a blank response)")
    log.info("%s: %d demonstrations (%d with a blank response left out)", source, len(demonstrations), n_blank)
    return demonstrations


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1")


def _rows(source: str, split: str, n_generated: int = WORLD_DEMONSTRATIONS) -> Iterator[tuple[str, Any]]:
    """Yields (place, row): the place goes into error messages."""
    path = Path(source).expanduser()
    if source.startswith(WORLD):
        return _world_rows(source, n_generated)
    if path.is_file():
        return _file_rows(path)
    if path.name.endswith(FILE_SUFFIXES) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(f"{source}: no such file")
    return _dataset_rows(source, split)


def _world_rows(source: str, n_generated: int) -> Iterator[tuple[str, Any]]:
    from repo_fast.world import corpus

    parts = {
        "world:train": corpus.train_prompts,
        "world:test": corpus.test_prompts,
        "world:demonstrations": lambda: corpus.demonstrations(n_generated, seed=0),
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


def _prompt_of(row: Any, place: str) -> str:
    if isinstance(row, str):
        return _text(row, "prompt", place)
    field = _field(row, PROMPT_FIELDS, "prompt", place)
    value = row[field]
    if field == "messages" or (field == "prompt" and isinstance(value, list)):
        return _text(_turns(value, field, place)["user"], f"{field} (user)", place)
    text = _text(value, field, place)
    if field == "instruction" and row.get("input"):
        # Safe RLHF joins alpaca's two fields with one space, and its models were trained on that.
        text = f"{text} {_text(row['input'], 'input', place)}"
    return text


def _response_of(row: Any, place: str) -> str:
    field = _field(row, RESPONSE_FIELDS, "response", place)
    value = row[field]
    if field == "messages":
        turns = _turns(value, field, place)
        if "assistant" not in turns:
            raise InputError(f"{place}: messages have no assistant turn, expected one after the user's")
        value = turns["assistant"]
    if not isinstance(value, str):
        raise InputError(f"{place}: {field} is a {type(value).__name__}, expected a string")
    return value


def _field(row: Any, known: tuple[str, ...], what: str, place: str) -> str:
    if not isinstance(row, dict):
        raise InputError(f"{place}: a {type(row).__name__}, expected an object with a {what} field")
    for field in known:
        # A table that joins several sets has all their columns in every row, and null in most.
        if row.get(field) is not None:
            return field
    found = ", ".join(row) or "none"
    raise InputError(f"{place}: no {what} field: found {found}; expected one of {', '.join(known)}")


def _text(value: Any, field: str, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{place}: {field} is a {type(value).__name__}, expected a string")
    if not value.strip():
        raise InputError(f"{place}: {field} is blank")
    return value


def _turns(messages: Any, field: str, place: str) -> dict[str, Any]:
    """The content of a chat of one user turn and at most one answer, by role."""
    try:
        turns = [(message["role"], message["content"]) for message in messages]
    except (TypeError, KeyError) as error:
        raise InputError(f"{place}: {field} is not a list of objects with role and content") from error
    roles = [role for role, _ in turns]
    if roles not in (["user"], ["user", "assistant"]):
        raise InputError(
            f"{place}: {field} has the turns {roles}, expected one user turn and at most one answer: "
            "earlier turns and system texts cannot be kept"
        )
    return dict(turns)
