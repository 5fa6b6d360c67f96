"""The manifest of a checkpoint: every file with its size and sha256, and a sum of the manifest itself.

It is written last. A folder with a manifest whose files are all as it says is what was written, to the bit.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from repo_fast.checkpoints.files import FileSum, as_json, sum_of, write_json
from repo_fast.errors import InputError

MANIFEST = "manifest.json"
_FORMAT = 1


def seal(folder: Path, sums: Mapping[str, FileSum]) -> None:
    """Write the manifest of a folder. Raises `OSError`.

    Args:
        folder: Holds the files.
        sums: Of each, by its path in the folder.
    """
    content = {"format": _FORMAT, "files": {name: sums[name].as_json() for name in sorted(sums)}}
    write_json(folder / MANIFEST, content | {"sha256": _sum(content)})


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """The files that a folder is to have.

    Raises:
        Damaged: It is not what was written.
        InputError: It is of a later form, or may not be read by this user.
    """
    path = folder / MANIFEST
    try:
        _check_file(path)
        read = path.read_bytes()
        content = json.loads(read)
        intact = as_json(content) == read and content.pop("sha256") == _sum(content)
        form = content["format"]
        found = {name: FileSum(file["bytes"], file["sha256"]) for name, file in content["files"].items()}
    except FileNotFoundError as error:
        raise Damaged(MANIFEST, "is missing") from error
    except PermissionError as error:
        raise _not_allowed(path) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(MANIFEST, "cannot be read") from error
    if not intact:
        raise Damaged(MANIFEST, "is not what was written")
    for name in found:
        if not is_inside(name):
            raise Damaged(MANIFEST, f"names {name!r}, which is not in the checkpoint")
    if form > _FORMAT:
        raise InputError(f"{path} has the form {form}, expected at most {_FORMAT}: it is of a later repo_fast")
    return found


def is_inside(name: object) -> bool:
    """Whether a name that a file says is one of a file in that one's folder, or in one below it."""
    path = PurePath(name) if isinstance(name, str) else None
    return path is not None and path.parts != () and not path.is_absolute() and ".." not in path.parts


class Damaged(Exception):
    """A file of a checkpoint is not what was written.

    Attributes:
        file: Its path in the checkpoint.
        problem: What is wrong with it.
    """

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(f"{file} {problem}")
        self.file, self.problem = file, problem


def damages(folder: Path, read: Collection[str] | None = None) -> list[Damaged]:
    """Everything that is wrong with a folder that has a manifest.

    Args:
        folder: It.
        read: Which files are read whole; of others the sizes are compared. None: all are.
    """
    try:
        files = read_manifest(folder)
    except Damaged as error:
        return [error]
    found = []
    for name in files:
        try:
            check_sizes(folder, {name: files[name]})
            if read is None or name in read:
                check_sums(folder, files, [name])
        except Damaged as error:
            found.append(error)
    return found


def check_sizes(folder: Path, files: Mapping[str, FileSum]) -> None:
    """Raise `Damaged` where a file is missing, or is longer or shorter than it was; `InputError` where it may not be
    looked at."""
    for name, expected in files.items():
        try:
            size = _check_file(folder / name).st_size
        except PermissionError as error:
            raise _not_allowed(folder / name) from error
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Damaged(name, "is missing") from error
        except OSError as error:
            raise Damaged(name, f"cannot be read ({error.strerror})") from error
        if size != expected.bytes:
            raise Damaged(name, f"has {size} bytes, expected {expected.bytes}")


def _check_file(path: Path) -> os.stat_result:
    """Raise `OSError` for what is no file: a pipe would never end, and neither would some devices."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is not a file", str(path))
    return found


def check_sums(folder: Path, files: Mapping[str, FileSum], names: Iterable[str]) -> None:
    """Raise `Damaged` where one of the named files is not what was written; reads all of them. Raise `InputError` where
    one may not be read."""
    for name in names:
        try:
            _check_file(folder / name)
            found = sum_of(folder / name)
        except PermissionError as error:
            raise _not_allowed(folder / name) from error
        except OSError as error:
            raise Damaged(name, f"cannot be read ({error.strerror})") from error
        if found != files[name]:
            raise Damaged(name, "is not what was written: its sha256 differs")


def _not_allowed(path: Path) -> InputError:
    """It says nothing about what was written: a checkpoint of somebody else's may be whole."""
    return InputError(f"{path}: may not be read by this user, expected a checkpoint that is one's own, or readable")


def _sum(content: dict[str, Any]) -> str:
    """Of all that a manifest says, whatever its form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
