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
from collections.abc import Iterator, Sequence
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

    Args:
        aside: The folder, complete.
        final: Its name; nothing of it exists.

    Raises:
        OSError: It cannot be brought to disk, or renamed.
    """
    _settle(aside)
    os.rename(aside, final)
    sync_names(final.parent)


def replace(aside: Path, final: Path) -> None:
    """As `publish`, where one before it may have the name. That goes once the new one is on disk, and not before; where
    the process ends between the two, `put_back` gives it its name again.

    Raises:
        OSError: The new one cannot be brought to disk, or renamed. The one before has its name.
    """
    _settle(aside)
    put_back(final)
    before = _before(final)
    if _is_there(final):
        os.rename(final, before)
    try:
        os.rename(aside, final)
    except OSError:
        put_back(final)
        raise
    sync_names(final.parent)
    remove(before)


def put_back(final: Path) -> None:
    """Undo what a `replace` that was killed had begun. Raises `OSError`."""
    before = _before(final)
    if _is_there(final):
        remove(before)
    elif _is_there(before):
        os.rename(before, final)


def _before(final: Path) -> Path:
    # A name that nobody else gives.
    return final.with_name(f".{final.name}.replaced")


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _settle(folder: Path) -> None:
    """Let others read what is in a folder, and bring it to disk.

    safetensors writes files that only their owner can read, whatever the umask: on a cluster nobody else could load
    the model.
    """
    plain = folder / ".plain"
    plain.touch()
    mode = plain.stat().st_mode & 0o777
    plain.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode & 0o777 | mode)
    # A machine that loses power after the rename could keep the new name, and not what it is of.
    sync_tree(folder)


def remove(folder: Path) -> None:
    """Remove a folder, or what else has its name, if anything has. Of a link, the link alone.

    What cannot be removed stays.
    """
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def check_no_links(output_dir: Path, folders: Sequence[str], unread: Sequence[str] = ()) -> None:
    """Raise `InputError` where what is to be written would be led out of its folder by a link, or wait at a pipe.

    Args:
        output_dir: It; its own files are looked at.
        folders: The names of those in it that are written into. What else lies there is others', such as wandb, which
            has links.
        unread: The same, of those whose files are not looked at.
    """
    written = [output_dir / name for name in (*folders, *unread)]
    for path in _all_files(output_dir, folders):
        is_folder = path.is_dir()
        # A link to a folder, beside those that are written into, is replaced, or nobody's.
        if path.is_symlink() and not (is_folder and path.parent == output_dir and path not in written):
            raise InputError(
                f"{str(path)!r} is a link to {os.readlink(path)!r}, expected a {'folder' if is_folder else 'file'}: "
                "what is written would go there"
            )
        if path.is_fifo():
            raise InputError(f"{str(path)!r} is a pipe, expected a file")


def _all_files(output_dir: Path, folders: Sequence[str]) -> Iterator[Path]:
    """A folder's own, and what is below some of those in it."""
    if output_dir.is_dir():
        yield from output_dir.iterdir()
    for name in folders:
        yield from (output_dir / name).rglob("*")
