"""Folders that are written aside and get their name once they are complete."""

import os
from pathlib import Path


def publish(aside: Path, final: Path) -> None:
    """Give a folder its name, its files readable by whom the umask says.

    safetensors writes files that only their owner can read, whatever the umask: on a cluster nobody else could load
    the model.

    Args:
        aside: The folder, complete.
        final: Its name; nothing of it exists.

    Raises:
        OSError: It cannot be renamed.
    """
    plain = aside / ".plain"
    plain.touch()
    mode = plain.stat().st_mode & 0o777
    plain.unlink()
    for path in aside.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode & 0o777 | mode)
    os.rename(aside, final)
