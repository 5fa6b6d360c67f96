"""A disk that is full or fails ends a run with one line, on all ranks; what it goes on from was brought to disk."""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

from repo_fast.errors import InputError, as_input_error
from repo_fast.report import folders
from repo_fast.report.samples import SampleLog
from tests.job_runs import Job, checkpoint_names, on_ranks

FULL = r"error: /dev/full cannot be read or written: No space left on device; what was complete is as it was\n"


def fill_the_log() -> None:
    """Of samples, from now on; also what is still to be written of it when it is closed."""
    SampleLog.__init__ = lambda self, output_dir, resume_step: setattr(self, "_file", open("/dev/full", "w"))


def train_on_a_full_disk(folder: Path) -> int:
    fill_the_log()
    return Job(folder).here(folder / "run", "--total_steps 1")


def test_a_log_that_cannot_be_written_is_one_line(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(SampleLog, "__init__", SampleLog.__init__)
    fill_the_log()
    capsys.readouterr()
    assert job.here(tmp_path / "run", "--total_steps 1") == 2
    assert re.fullmatch(FULL, capsys.readouterr().err)


def test_it_is_one_line_of_all_ranks(job: Job, tmp_path: Path) -> None:
    shutil.copy(job.folder / "job.yaml", tmp_path)
    assert on_ranks(2, "tests.jobs.test_disks:train_on_a_full_disk", tmp_path) == [2, 2]
    first, second = ((tmp_path / f"said-{rank}.txt").read_text() for rank in range(2))
    assert len(re.findall(FULL, first)) == 1
    assert "Traceback" not in first + second and "error" not in second


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EROFS, "?", "a.json"), "a.json cannot be read or written: Read-only file system; what was"),
        (OSError(errno.EIO, "?"), "a file cannot be read or written: Input/output error; what was complete is as it"),
        (
            RuntimeError("I/O error: No space (os error 28)"),
            "a file cannot be read or written: No space left on device",
        ),
        (InputError("total_steps is 0"), "total_steps is 0"),
        (FileNotFoundError(errno.ENOENT, "?", "a.json"), None),
        (RuntimeError("a shape (os error 2)"), None),
        (KeyError("rank"), None),
    ],
)
def test_what_a_disk_raises_is_told_from_what_is_ours(error: Exception, line: str | None) -> None:
    found = as_input_error(error)
    assert (found is None) if line is None else str(found).startswith(line)


def test_the_first_of_two_failures_counts() -> None:
    with pytest.raises(OSError) as closed:
        try:
            raise InputError("the checkpoint cannot be written")
        finally:
            raise OSError(errno.ENOSPC, "?")
    assert str(as_input_error(closed.value)) == "the checkpoint cannot be written"


def test_what_a_run_goes_on_from_is_on_disk_before_it_counts(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logs too, and their names: they would end before the checkpoint that a run goes on from."""
    synced: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watched(handle: int) -> None:
        fsync(handle)
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))

    def checked(old: Path, new: Path) -> None:
        if Path(new).name == "step-000002":
            inside = [path for path in Path(old).rglob("*")]
            logs = [tmp_path / "run" / name for name in ("metrics.jsonl", "samples.jsonl", "config.yaml")]
            missing = {str(path) for path in (*inside, old, *logs, tmp_path / "run", tmp_path)} - {*synced}
            assert not missing and len(inside) > 6
            synced.clear()
        rename(old, new)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(folders.os, "rename", checked)
    assert job.here(tmp_path / "run", "--stop_after 2") == 0
    assert str(tmp_path / "run" / "checkpoints") in synced


def test_a_checkpoint_that_a_kill_kept_from_going_goes_with_the_resume(job: Job, tmp_path: Path) -> None:
    assert job.here(tmp_path / "run", "--total_steps 2", "--checkpoint.every 1", "--checkpoint.keep 0") == 0
    assert checkpoint_names(tmp_path / "run") == ["step-000001", "step-000002"]
    shutil.rmtree(tmp_path / "run" / "policy")
    options = ("--total_steps 2", "--checkpoint.every 1", "--checkpoint.keep 1", "--resume auto")
    assert job.here(tmp_path / "run", *options) == 0
    assert checkpoint_names(tmp_path / "run") == ["step-000002"]
