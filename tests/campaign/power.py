"""The main job on a file system that forgets, when the power goes, all that was not brought to disk.

    POWER_BOOK=FOLDER python -m tests.campaign.power ...       as python -m repo_fast.train ...

Each `os.fsync` is written down: of a file its content, of a folder its names. `after_the_loss` builds from these what
POSIX promises: a name that its folder was not synced with is gone, and content of which the file was not synced with.
Real file systems keep more.
"""

import json
import os
import shutil
import stat
import sys
import time
from pathlib import Path

_BOOK = "POWER_BOOK"


def _watch(book: Path) -> None:
    """Write down every `os.fsync` of this process from now on."""
    fsync, number = os.fsync, 0
    log = (book / f"log-{os.getpid()}.jsonl").open("a")

    def watched(handle: int) -> None:
        nonlocal number
        fsync(handle)
        # As long as one is open, no other file gets its number.
        status = os.fstat(os.dup(handle))
        row = {"time": time.monotonic_ns(), "inode": status.st_ino}
        path = f"/proc/self/fd/{handle}"
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(handle) as entries:
                row["names"] = {entry.name: [entry.inode(), entry.is_dir()] for entry in entries}
        else:
            number += 1
            row["content"] = f"{os.getpid()}-{number}"
            shutil.copyfile(path, book / row["content"])
        log.write(json.dumps(row) + "\n")
        log.flush()

    os.fsync = watched


def after_the_loss(book: Path, before: Path, after: Path) -> None:
    """Build what is left of a folder.

    Args:
        book: Of the processes that wrote below it.
        before: The folder as it is; it was on disk, empty, at the start.
        after: Where to build it; it is made.
    """
    rows = [json.loads(line) for log in book.glob("log-*.jsonl") for line in log.read_text().splitlines()]
    names: dict[int, dict[str, list]] = {}
    contents: dict[int, Path] = {}
    for row in sorted(rows, key=lambda row: row["time"]):
        if "names" in row:
            names[row["inode"]] = row["names"]
        else:
            contents[row["inode"]] = book / row["content"]

    def build(inode: int, folder: Path) -> None:
        folder.mkdir()
        for name, (below, is_folder) in names.get(inode, {}).items():
            if is_folder:
                build(below, folder / name)
            elif below in contents:
                shutil.copyfile(contents[below], folder / name)
            else:
                (folder / name).touch()

    build(before.stat().st_ino, after)


if __name__ == "__main__":
    _watch(Path(os.environ[_BOOK]))
    from repo_fast.train import main

    sys.exit(main())
