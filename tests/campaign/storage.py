"""Power that goes, disks that are full or read-only, a clock that jumps."""

import contextlib
import ctypes
import fcntl
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from tests.campaign.book import Trial, Unavailable
from tests.campaign.power import after_the_loss
from tests.campaign.runs import (
    BACKGROUND,
    STEPS,
    Kind,
    Started,
    assert_equal,
    go_on,
    newest_step,
    undisturbed,
)

_IMAGE_BYTES = 256 * 2**20
# Of linux/ext4's ioctls, and what it does with the journal: nothing.
_EXT4_SHUTDOWN = 0x8004587D
_WITHOUT_THE_JOURNAL = 2
# Of linux/sched.h and sys/mount.h: a namespace for mounts, and that others do not see them.
_NEW_MOUNTS, _RECURSIVELY_PRIVATE = 0x00020000, 0x4000 | 0x40000

KINDS = {"one rank": Kind(1), "in the background": Kind(1, (BACKGROUND,)), "two ranks": Kind(2)}


def trials() -> Iterator[Trial]:
    """The power goes 18 times on paper and 9 times on ext4, disks are full or turn read-only; the clock jumps."""
    for number, (name, kind) in enumerate(KINDS.items()):
        for again in range(6):
            trial = partial(_power_goes, 10 * number + again, kind)
            yield Trial(f"the power goes, {name}, {again + 1}", trial)
        for again in range(3):
            trial = partial(_disk_stops, 100 + 10 * number + again, kind)
            yield Trial(f"the disk stops and forgets, {name}, {again + 1}", trial)
        for share in (0.3, 0.6, 0.9):
            yield Trial(f"a full disk, {name}, at {share:.0%} of its bytes", partial(_full_disk, share, kind))
        yield Trial(f"a disk that turns read-only, {name}", partial(_turns_read_only, kind))
    yield Trial("a disk that is read-only from the start", _read_only)
    for jump in (-86400, 86400):
        yield Trial(f"the clock jumps by {jump // 3600} hours at each step", partial(_clock_jumps, jump))


def _power_goes(seed: int, kind: Kind, folder: Path) -> str:
    """The run goes on from what was brought to disk."""
    root, book, after = folder / "disk", folder / "book", folder / "after"
    root.mkdir()
    book.mkdir()
    # Before the other, which would go on meanwhile.
    undisturbed(kind)
    # That the folder itself is there is not asked of a run.
    run = Started(kind.words(root / "run", module="tests.campaign.power"), root / "run", {"POWER_BOOK": str(book)})
    run.until_a_moment_of(STEPS + 1, kind, random.Random(seed))
    run.kill()
    saved = newest_step(root / "run")
    after_the_loss(book, root, after)
    kept = newest_step(after / "run")
    # Between a rename and the sync of its folder there is one more in name.
    assert saved - 1 <= kept <= saved, f"checkpoint {saved} was complete, {kept} is left"
    said = go_on(kind, after / "run")
    assert "damaged" not in said, said[-2000:]
    assert_equal(after / "run", kind)
    return f"at checkpoint {saved}; {kept} left, went on to the same bits"


@contextlib.contextmanager
def _disk(folder: Path, megabytes: float | None = None) -> Iterator[Path]:
    """A file system of its own in memory, mounted at a folder."""
    folder.mkdir()
    size = [] if megabytes is None else ["-o", f"size={int(megabytes * 1024)}k"]
    _mount("-t", "tmpfs", *size, "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@cache
def _mounts_of_our_own() -> None:
    """From here on what this process and its children mount goes with them, however they end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS) or libc.mount(b"none", b"/", None, _RECURSIVELY_PRIVATE, None):
        raise Unavailable(f"no namespace for mounts: {os.strerror(ctypes.get_errno())}")


def _mount(*words: str) -> None:
    _mounts_of_our_own()
    try:
        done = subprocess.run(["mount", *words], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Unavailable("no mount") from error
    if done.returncode:
        raise Unavailable(f"cannot mount: {done.stderr.strip()}")


def _full_disk(share: float, kind: Kind, folder: Path) -> str:
    """One line, and what was saved is as it was; with more room it goes on."""
    whole, _ = undisturbed(kind)
    # Less than it takes while it prunes, and more than it ends with.
    most = sum(path.stat().st_blocks * 512 for path in whole.rglob("*")) / 2**20
    with _disk(folder / "disk", share * most) as disk:
        output_dir = disk / "run"
        run = Started(kind.words(output_dir), output_dir, said=folder / "said.txt")
        status = run.end()
        line = _one_error(run, status, "No space left")
        kept = newest_step(output_dir)
        _mount("-o", "remount,size=1g", str(disk))
        go_on(kind, output_dir)
        assert_equal(output_dir, kind)
    return f"exit status {status}, {line!r}; went on from step {kept} to the same bits"


class _Ext4:
    """A file system in a file. A context: mounted inside.

    Args:
        folder: Empty; it is mounted at one in it.
    """

    def __init__(self, folder: Path) -> None:
        self._image, self.root = folder / "image", folder / "disk"
        self.root.mkdir()
        with self._image.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        subprocess.run(["mkfs.ext4", "-q", str(self._image)], check=True)

    def __enter__(self) -> "_Ext4":
        _mount("-o", "loop,errors=remount-ro", str(self._image), str(self.root))
        return self

    def __exit__(self, *error: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.root)], check=True)

    def stop(self) -> None:
        """Let it take and give nothing any more, and forget what it had not written."""
        handle = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, _EXT4_SHUTDOWN, struct.pack("I", _WITHOUT_THE_JOURNAL))
        finally:
            os.close(handle)

    def fail(self) -> None:
        """Let it meet an error, after which it is read-only."""
        source = subprocess.run(
            ["findmnt", "--noheadings", "--output", "SOURCE", str(self.root)],
            capture_output=True,
            text=True,
            check=True,
        )
        Path("/sys/fs/ext4", Path(source.stdout.strip()).name, "trigger_fs_error").write_text("campaign")

    def again(self) -> None:
        """Mount it anew, as after a restart of the machine."""
        subprocess.run(["umount", str(self.root)], check=True)
        # It mends what its journal does not; 1: it did.
        checked = subprocess.run(["e2fsck", "-p", str(self._image)], capture_output=True, text=True)
        assert checked.returncode in (0, 1), checked.stdout
        self.__enter__()


def _disk_stops(seed: int, kind: Kind, folder: Path) -> str:
    """As when its cable is drawn: a clear end; and it goes on from what the file system's journal has."""
    with _Ext4(folder) as disk:
        output_dir = disk.root / "run"
        # Before the other, which would go on meanwhile.
        undisturbed(kind)
        run = Started(kind.words(output_dir), output_dir, said=folder / "said.txt")
        # It has to be at work yet.
        run.until_a_moment_of(STEPS - 1, kind, random.Random(seed))
        disk.stop()
        status = run.end()
        line = _one_error(run, status, "Input/output error")
        disk.again()
        kept = newest_step(output_dir)
        assert "damaged" not in go_on(kind, output_dir)
        assert_equal(output_dir, kind)
    return f"exit status {status}, {line!r}; went on from step {kept} to the same bits"


def _turns_read_only(kind: Kind, folder: Path) -> str:
    """In the middle of the run, as after an error of the disk's."""
    with _Ext4(folder) as disk:
        output_dir = disk.root / "run"
        run = Started(kind.words(output_dir), output_dir, said=folder / "said.txt")
        run.until_it_writes("checkpoints/step-000004")
        disk.fail()
        status = run.end()
        # What was begun before it fails to be brought to disk.
        line = _one_error(run, status, "Read-only file system", "Input/output error")
        disk.again()
        kept = newest_step(output_dir)
        assert kept >= 3, f"checkpoint 3 was complete, {kept} is left"
        go_on(kind, output_dir)
        assert_equal(output_dir, kind)
    return f"exit status {status}, {line!r}; went on from step {kept} to the same bits"


def _read_only(folder: Path) -> str:
    with _disk(folder / "disk") as disk:
        _mount("-o", "remount,ro", str(disk))
        run = Started(Kind(1).words(disk / "run"), disk / "run", said=folder / "said.txt")
        status = run.end()
        line = _one_error(run, status, "Read-only file system")
        assert not [*disk.iterdir()]
    return f"exit status {status}, {line!r}"


def _clock_jumps(jump: int, folder: Path) -> str:
    """Of the seconds since 1970, as a machine's do when it is set; nothing that is computed or kept notices."""
    kind, output_dir = Kind(2), folder / "run"
    environment = {"CLOCK_JUMP": str(jump)}
    run = Started(kind.words(output_dir, "--stop_after 4", module="tests.campaign.clock"), output_dir, environment)
    run.ends_with(0)
    again = Started(kind.words(output_dir, "--resume auto", module="tests.campaign.clock"), output_dir, environment)
    again.ends_with(0)
    assert_equal(output_dir, kind)
    return "stopped and went on to the same bits"


def _one_error(run: Started, status: int, *expected: str) -> str:
    """The line that says what ended a run: of its ranks there is one, and no traceback; torchrun's own comes after."""
    lines = [line for line in run.said.splitlines() if line.startswith("error: ")]
    assert status, f"exit status 0: {run.said[-2000:]}"
    assert len(lines) == 1, f"{len(lines)} lines of errors: {run.said[-3000:]}"
    assert any(text in lines[0] for text in expected), lines[0]
    assert "Traceback" not in run.said.partition("torch/distributed/elastic")[0], run.said[-3000:]
    return lines[0]
