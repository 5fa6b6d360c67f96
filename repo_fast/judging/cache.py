"""Answers of a chat endpoint, kept from when they arrive.

All are, whatever they say, so a run that was killed goes on where it was, and one that is repeated gives the same
judgments without a request. An answer is found again by a hash of its request: model, message and sampling parameters.
The url is left out, so that the same model may be served from elsewhere; models that differ behind one name need
different files.
"""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from repo_fast.errors import InputError, readable


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
    """The answers by the hash of their request, in memory and in an append-only file.

    Args:
        path: The file, one process's own; made where there is none.
        others: Files of other processes, whose answers count too. They are only read.

    Attributes:
        replies: The answers.
        paid: Tokens sent and answered, of all that the files have.

    Raises:
        InputError: A file cannot be used.
    """

    def __init__(self, path: Path, others: Iterable[Path] = ()) -> None:
        self.replies: dict[str, Reply] = {}
        self.paid = (0, 0)
        self._path = path
        for other in others:
            with readable(other), open(other, "rb") as file:
                self._load(file, other)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a+b") as file:
                file.seek(0)
                torn = self._load(file, path)
                if torn is not None:
                    # Or the next answer would be appended to the line that a kill tore.
                    file.truncate(torn)
        except OSError as error:
            raise InputError(f"{path} cannot be used ({error.strerror}), expected a file of answers") from None

    def _load(self, file: BinaryIO, path: Path) -> int | None:
        """Take what a file has; gives where its last line begins, if that is torn."""
        complete = 0
        for number, line in enumerate(file, start=1):
            try:
                if not line.endswith(b"\n") and line.startswith(_LINE_START[: len(line)]):
                    return complete
                record = json.loads(line)
                key, reply = record.pop("key"), Reply(**record)
                if not isinstance(key, str) or not isinstance(reply.answer, str):
                    raise TypeError
            except (ValueError, TypeError, KeyError, AttributeError):
                raise InputError(f"{path}, line {number}: {line[:60]!r}, expected an answer of a judge") from None
            self.replies[key] = reply
            self.paid = (self.paid[0] + reply.input_tokens, self.paid[1] + reply.output_tokens)
            complete += len(line)
        return None

    def add(self, key: str, reply: Reply) -> None:
        """Keep an answer. Once this returns, a kill of the process does not lose it."""
        with open(self._path, "ab") as file:
            file.write(json.dumps({"key": key} | dataclasses.asdict(reply)).encode() + b"\n")
        self.replies[key] = reply
