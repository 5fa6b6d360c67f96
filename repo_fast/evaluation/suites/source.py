"""What a suite is, and where its data is found: a file that is given, a package's data, or a `datasets` name."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repo_fast.data.cells import text
from repo_fast.data.sources import read_rows
from repo_fast.errors import InputError, first_line


@dataclass(frozen=True)
class Entry:
    """A prompt of a suite, as its adapter reads it.

    Attributes:
        text: What is asked; never blank.
        harmful: Whether it asks for harm.
        category: The suite's own.
        place: Where it was read, for errors.
        alike: Texts that it shares with prompts which are no independent ones beside it: a behaviour under several
            templates, the name of a pair.
    """

    text: str
    harmful: bool
    category: str
    place: str
    alike: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """A suite.

    Attributes:
        name: On the command line.
        origin: Where its data can be had, and its licence, for messages.
        read: Its prompts, in the order of its data, from what is given, or from where it is found by itself.
    """

    name: str
    origin: str
    read: Callable[[str | None], Iterator[Entry]]


def data_files(suite: str, origin: str, given: str | None, package: str, *files: str) -> list[Path]:
    """Data of a package, by path: nothing of it is imported.

    Args:
        suite, origin: As `Suite` has them, for messages.
        given: A folder that the package was unzipped in; None for one that is installed.
        package: Its top-level module.
        files: Paths in it.

    Raises:
        InputError: It is not installed, or a file is not there.
    """
    if given is not None:
        folder = Path(given).expanduser()
        # Whoever names the module's own folder means the same.
        folder = folder / package if (folder / package).is_dir() else folder
        expected = f"a folder with {package}/{files[0]}, or none: {origin}"
    else:
        try:
            found = importlib.util.find_spec(package)
        except ValueError:
            # A module that says nothing of itself.
            found = None
        places = list(found.submodule_search_locations or ()) if found is not None else []
        if not places:
            raise InputError(f"suite {suite!r}: its data is not installed, expected {origin}")
        folder, expected = Path(places[0]), origin
    paths = [folder / file for file in files]
    for path in paths:
        if not path.is_file():
            raise InputError(f"suite {suite!r}: {path} is no file, expected {expected}")
    return paths


def is_folder(given: str | None) -> bool:
    """Whether what is given is a folder here."""
    try:
        return given is not None and Path(given).expanduser().is_dir()
    except (OSError, RuntimeError):
        # A name that is too long, or of no user.
        return False


def rows(suite: str, origin: str, source: str, split: str, *columns: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, or of a `datasets` name, each with its place; every one has these columns.

    Raises:
        InputError: The source is not there or malformed, or a row lacks a column.
    """
    try:
        for place, row in read_rows(source, split):
            for column in columns:
                if not isinstance(row, dict) or row.get(column) is None:
                    found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
                    raise InputError(f"{place}: no {column!r} (it has: {found})")
            yield place, row
    except InputError as error:
        raise InputError(f"suite {suite!r}: {first_line(error)}; expected {origin}") from error


def words(row: dict[str, Any], column: str, place: str) -> str:
    """A cell's text, not blank."""
    return text(row[column], column, place)
