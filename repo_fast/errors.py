"""The one exception type for bad input: it is shown to the user as a single line, without a traceback."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

# Of a line that is printed (characters).
_LONGEST = 1200


def first_line(error: BaseException) -> str:
    """An error's message cut to one line; the name of its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line(error: object) -> str:
    """An error's message as it is printed: a value in it may have line breaks, what a terminal would act on, or be a
    whole file.

    Of a message that is too long to be read its beginning and end are left: what it is about, and what was expected.
    """
    said = "".join(character if character.isprintable() else _escaped(character) for character in str(error))
    return said if len(said) <= _LONGEST else f"{said[: _LONGEST // 2]} … {said[-_LONGEST // 4 :]}"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message names the thing, its value, and what was expected; the entry points print it on one line and
    exit with a non-zero status. Anything that is *our* fault raises another type and keeps its traceback.
    """


# What a disk that is full, read-only or broken raises.
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG}


def as_input_error(error: BaseException | None) -> InputError | None:
    """An error as something that the user can mend; None of one that is ours.

    Beside an `InputError` that is what a disk raises, also in Rust's libraries (safetensors, tokenizers), which put the
    number into the text. Where a file fails to be closed after it failed to be written, the first failure counts.
    """
    if error is None or isinstance(error, InputError):
        return error
    if isinstance(error, OSError):
        number, name = error.errno, error.filename
    else:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number, name = int(found[1]) if found else None, None
    if number not in _OF_THE_DISK:
        return None
    line = f"{name or 'a file'} cannot be read or written: {os.strerror(number)}; what was complete is as it was"
    return as_input_error(error.__context__) or InputError(line)


def is_panic(error: BaseException) -> bool:
    """Whether a library's Rust code gave up (tokenizers): what it raises then is no `Exception`, nor to be imported."""
    return type(error).__name__ == "PanicException"


class RankError(RuntimeError):
    """A rank cannot go on because of another one, which failed, is gone, or does not answer.

    The message says which one, and what; the entry points print it on one line.

    Args:
        message: It.
        by: The rank that says it, of those that know.
    """

    def __init__(self, message: str, by: int) -> None:
        super().__init__(message)
        self.by = by


def where(error: BaseException) -> str:
    """What a run was doing, as the notes of an error say that passed through it; empty where there are none."""
    return "".join(f", {note}" for note in getattr(error, "__notes__", ())[:1])


@contextlib.contextmanager
def at(place: str) -> Iterator[None]:
    """Put the place of a row ("FILE line 3") in front of what is wrong with it; "" is none."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}" if place else str(error)) from error


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise an `OSError` inside as an `InputError` that names the file or folder which cannot be read, or looked at.

    Args:
        path: It, where the error does not say which.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read: {error.strerror or first_line(error)}") from error
