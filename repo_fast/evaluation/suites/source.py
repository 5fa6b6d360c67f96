"""What a suite is, and where its data is found: a file that is given, a package's data, or a `datasets` name."""

import importlib.metadata
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
class Package:
    """A package that has data, of which nothing is imported.

    Attributes:
        name: Of the distribution.
        module: Its top-level module.
        files: Paths in that.
    """

    name: str
    module: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Where the data of a suite is.

    Attributes:
        name: For the report: a package with its version and folder, the path of a file, or a `datasets` name.
        files: As `read_rows` takes each.
        packaged: Whether they are the package's.
    """

    name: str
    files: tuple[str, ...]
    packaged: bool = False


@dataclass(frozen=True)
class Suite:
    """A suite.

    Attributes:
        name: On the command line.
        origin: Where its data can be had, and its licence, for messages.
        read: Its prompts, in the order of its data.
        package: Which has its data; None: no one that is known.
        hub: The `datasets` name that is read where no package is installed; None: none.
        one_file: Whether a file may be given instead of the package's folder.
    """

    name: str
    origin: str
    read: Callable[[Source], Iterator[Entry]]
    package: Package | None = None
    hub: str | None = None
    one_file: bool = True

    def find(self, given: str | None) -> Source:
        """Where its data is.

        Args:
            given: A file or folder of it, the folder that the package is unzipped in, or a `datasets` name. None for
                the installed package, else the suite's own `datasets` name.

        Raises:
            InputError: It is not installed, or installed without these files. What a package lacks is not looked for
                on the hub.
        """
        path = None if given is None else _existing(given)
        if self.package is not None and (given is None or not self.one_file or (path is not None and path.is_dir())):
            folder = _installed(self.package.module) if given is None else _unzipped(given, self.package.module)
            if folder is not None:
                return _of_package(self.package, folder, self.origin, unzipped=given is not None)
            if self.hub is None:
                raise InputError(f"its data is not installed, expected {self.origin}")
        if given is not None:
            return Source(f"the hub's {given}" if path is None else str(path.resolve()), (given,))
        if self.hub is None:
            raise InputError(f"its data comes in no package, expected {self.origin}")
        return Source(f"the hub's {self.hub}", (self.hub,))


def _existing(given: str) -> Path | None:
    """The file or folder of that name here."""
    try:
        path = Path(given).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):
        # A name that is too long, or of no user.
        return None


def _installed(module: str) -> Path | None:
    """The folder of an installed module, without importing it."""
    try:
        found = importlib.util.find_spec(module)
    except ValueError:
        # A module that says nothing of itself.
        return None
    places = list(found.submodule_search_locations or ()) if found is not None else []
    return Path(places[0]) if places else None


def _unzipped(given: str, module: str) -> Path:
    folder = Path(given).expanduser()
    # Whoever names the module's own folder means the same.
    return folder / module if (folder / module).is_dir() else folder


def _of_package(package: Package, folder: Path, origin: str, *, unzipped: bool) -> Source:
    for file in package.files:
        if not (folder / file).is_file():
            expected = f"a folder with {package.module}/{package.files[0]}, or none: {origin}" if unzipped else origin
            raise InputError(f"{folder / file} is no file, expected {expected}")
    known = importlib.metadata.distributions(name=package.name, path=[str(folder.resolve().parent)])
    version = next((own.version for own in known), "of unknown version")
    files = tuple(str(folder / file) for file in package.files)
    return Source(f"{package.name} {version} ({folder.resolve()})", files, packaged=True)


def rows(origin: str, source: str, split: str, *columns: str) -> Iterator[tuple[str, dict[str, Any]]]:
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
        raise InputError(f"{first_line(error)}; expected {origin}") from error


def words(row: dict[str, Any], column: str, place: str) -> str:
    """A cell's text, not blank."""
    return text(row[column], column, place)
