"""Answers of a chat endpoint, kept from when they arrive.

All are, whatever they say, so a run that was killed goes on where it was, and one that is repeated gives the same
judgments without a request. An answer is found again by a hash of its request: model, message and sampling parameters.
The url is left out, so that the same model may be served from elsewhere; models that differ behind one name need
different files.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from repo_fast.errors import InputError


@dataclass(frozen=True)
class Reply:
    """What the endpoint gave for one request: a line of the cache, beside its key."""

    answer: str
    finish_reason: str | None
    input_tokens: int
    output_tokens: int


# A file that ends otherwise is none that a kill left, and stays as it is.
_LINE_START = b'{"key": "'


class AnswerCache:
    """The answers by the hash of their request, in memory and in an append-only file."""

    def __init__(self, path: Path) -> None:
        self.replies: dict[str, Reply] = {}
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a+b") as file:
                file.seek(0)
                self._load(file)
        except OSError as error:
            raise InputError(f"{path} cannot be used ({error.strerror}), expected a file of answers") from None

    def _load(self, file: BinaryIO) -> None:
        complete = 0
        for number, line in enumerate(file, start=1):
            try:
                if not line.endswith(b"\n") and line.startswith(_LINE_START[: len(line)]):
                    # Or the next answer would be appended to the line that a kill tore.
                    file.truncate(complete)
                    return
                record = json.loads(line)
                key, reply = record.pop("key"), Reply(**record)
                if not isinstance(key, str) or not isinstance(reply.answer, str):
                    raise TypeError
            except (ValueError, TypeError, KeyError, AttributeError):
                raise InputError(f"{self._path}, line {number}: {line[:60]!r}, expected an answer of a judge") from None
            self.replies[key] = reply
            complete += len(line)

    def add(self, key: str, reply: Reply) -> None:
        """Keep an answer. Once this returns, a kill of the process does not lose it."""
        with open(self._path, "ab") as file:
            file.write(json.dumps({"key": key} | dataclasses.asdict(reply)).encode() + b"\n")
        self.replies[key] = reply
