"""The one exception type for bad input: it is shown to the user as a single line, without a traceback."""

import contextlib
from collections.abc import Iterator


def first_line(error: BaseException) -> str:
    """An error's message cut to one line; the name of its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message names the thing, its value, and what was expected; the entry points print it on one line and
    exit with a non-zero status. Anything that is *our* fault raises another type and keeps its traceback.
    """


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
