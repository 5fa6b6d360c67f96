"""How much of a machine a process may take: where batch systems and containers limit it, less than there is."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_MEMBERSHIPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# In a control group's folder: what its processes may take, what they have, and what of that is files the system can
# let go of (a line of `memory.stat`); in version 2 of control groups, and in version 1.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def host_memory() -> tuple[int, int]:
    """Bytes that this process can still take, and all that it could if nothing else ran.

    Of the machine, which is all that psutil knows, or of the narrowest control group that the process is in.
    """
    machine = psutil.virtual_memory()
    free, most = machine.available, machine.total
    for folder in _groups():
        for limit, used, files in _FILES:
            # A group without a limit says "max".
            with contextlib.suppress(OSError, ValueError):
                own = int((folder / limit).read_text())
                free, most = min(free, own), min(most, own)
                left = own - int((folder / used).read_text()) + _statistic(folder, files)
                free = min(free, max(left, 0))
    return free, most


def host_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _groups() -> Iterator[Path]:
    """The folders of this process's control groups that may limit memory, and of those that they are in."""
    with contextlib.suppress(OSError):
        for line in _MEMBERSHIPS.read_text(errors="surrogateescape").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root = _GROUPS / controllers
                folder = root / path.lstrip("/")
                yield folder
                yield from (above for above in folder.parents if above.is_relative_to(root))


def _statistic(folder: Path, name: str) -> int:
    """0 where the group does not say."""
    with contextlib.suppress(OSError):
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return next((int(value) for key, value in lines if key == name), 0)
    return 0
