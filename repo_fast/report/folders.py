"""Folders that are one process's while it writes them; and those that are written aside, and get their name once they
are complete, and on disk.

One that came from elsewhere may have links in it. What these lead to is nobody's to change.
"""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from repo_fast.errors import InputError

_log = logging.getLogger(__name__)

# Whoever writes a folder of results holds it. It stays there when it is let go.
LOCK_FILE = "lock"


def hold(folder: Path, what: str) -> TextIO:
    """Make a folder this process's, until what is returned is closed or the process ends, however it does.

    Args:
        folder: It; made where there is none.
        what: How it is called in messages, as `output_dir`.

    Raises:
        InputError: Another process has it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # For appending: nothing is written, and a file of that name which is not ours keeps its content.
        lock = open(folder / LOCK_FILE, "a")
    except OSError as error:
        raise InputError(f"{what} {str(folder)!r} cannot be written: {error.strerror}, expected a folder") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            lock.close()
            raise InputError(
                f"{what} {str(folder)!r} is in use by another process, expected one at a time: wait for it, or give "
                "another folder"
            ) from None
        # Some file systems of clusters have no locks: better to run there than not.
        _log.warning("%s %s cannot be locked (%s): keep others out of it", what, folder, error.strerror)
    return lock


def sync(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to disk: they then outlive a power loss. Raises `OSError`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_names(folder: Path) -> None:
    """Bring the names in a folder to disk. Raises `OSError`.

    One that may be passed through and not read, as clusters have them above users' folders, is passed over.
    """
    with contextlib.suppress(PermissionError):
        sync(folder)


def sync_tree(folder: Path, leave_out: Path | None = None) -> None:
    """Bring a folder, with all that is below it but one folder, to disk. Raises `OSError`.

    What goes meanwhile, or may not be read, is passed over: it is not what a run writes.
    """
    for path in folder.iterdir():
        if path.is_symlink() or path == leave_out:
            continue
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if path.is_dir():
                sync_tree(path)
            elif path.is_file():
                sync(path)
    sync(folder)


def publish(aside: Path, final: Path) -> None:
    """Give a folder its name, once it is on disk, its files readable by whom the umask says.

    safetensors writes files that only their owner can read, whatever the umask: on a cluster nobody else could load
    the model.

    Args:
        aside: The folder, complete.
        final: Its name; nothing of it exists.

    Raises:
        OSError: It cannot be brought to disk, or renamed.
    """
    plain = aside / ".plain"
    plain.touch()
    mode = plain.stat().st_mode & 0o777
    plain.unlink()
    for path in aside.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode & 0o777 | mode)
    # A machine that loses power after the rename could keep the new name, and not what it is of.
    sync_tree(aside)
    os.rename(aside, final)
    sync_names(final.parent)


def remove(folder: Path) -> None:
    """Remove a folder, or what else has its name, if anything has. Of a link, the link alone.

    What cannot be removed stays.
    """
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def check_no_links(output_dir: Path, folders: Sequence[str]) -> None:
    """Raise `InputError` where a file in a folder that is to be written is a link: it would lead what is written out.

    Args:
        output_dir: It; its own files are looked at.
        folders: The names of those in it that files are written over in. What else lies there is others', such as
            wandb, which has links.
    """
    own = output_dir.iterdir() if output_dir.is_dir() else ()
    for path in (*own, *(path for name in folders for path in (output_dir / name).rglob("*"))):
        if path.is_symlink() and not path.is_dir():
            raise InputError(
                f"{str(path)!r} is a link to {os.readlink(path)!r}, expected a file: what is written would go there"
            )
