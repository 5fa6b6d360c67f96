"""Folders that are written aside and get their name once they are complete, and on disk."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to disk: they then outlive a power loss. Raises `OSError`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path, leave_out: Path | None = None) -> None:
    """Bring a folder, with all that is below it but one folder, to disk. Raises `OSError`."""
    for path in folder.iterdir():
        if path.is_symlink() or path == leave_out:
            continue
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
    sync(final.parent)
