"""Checkpoints that are written while training goes on are those that are waited for, and none counts too early."""

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from repo_fast.engine.saved import Unsaved
from repo_fast.jobs import checkpoint
from tests.checkpoints.test_files import fill_disk
from tests.job_runs import Job, metrics, on_ranks, run, same_bits, states, weights

SMALL = ("--total_steps 4", "--checkpoint.every 1", "--checkpoint.keep 0")
BACKGROUND = (*SMALL, "--checkpoint.background true")


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, whose checkpoints were waited for."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    assert job.here(output_dir, *SMALL) == 0
    return output_dir


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is written from now on, and the thread that it is written in, each a tenth of a second late."""
    written, write = [], Unsaved.write

    def late(self: Unsaved, folder: Path) -> dict:
        time.sleep(0.1)
        written.append((folder.parent.name.removesuffix(".partial"), threading.current_thread().name))
        return write(self, folder)

    monkeypatch.setattr(Unsaved, "write", late)
    return written


def assert_same(ours: Path, theirs: Path) -> None:
    assert metrics(ours) == metrics(theirs) and same_bits(weights(ours), weights(theirs))
    names = [[path.name for path in checkpoint.checkpoints(folder)] for folder in (ours, theirs)]
    assert names[0] == names[1] == [f"step-{step:06d}" for step in range(1, 5)]
    for step in range(1, 5):
        assert states(ours, step) == states(theirs, step)


def test_they_are_the_same(job: Job, whole: Path, tmp_path: Path, threads: list[tuple[str, str]]) -> None:
    assert job.here(tmp_path / "run", *BACKGROUND) == 0
    # All but the last.
    assert {name for name, thread in threads if thread.startswith("checkpoint")} == {
        f"step-00000{n}" for n in (1, 2, 3)
    }
    assert_same(tmp_path / "run", whole)


def test_where_memory_is_short_they_are_waited_for(
    job: Job,
    tmp_path: Path,
    threads: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    short = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: short)
    assert job.here(tmp_path / "run", *BACKGROUND, "--total_steps 3") == 0
    assert not any(thread.startswith("checkpoint") for _, thread in threads)
    assert capsys.readouterr().out.count("host memory is short of a copy") == 1


def test_what_cannot_be_written_ends_the_run(
    job: Job, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fill_disk(monkeypatch, "step-000002")
    capsys.readouterr()
    assert job.here(tmp_path / "run", *BACKGROUND) == 2
    assert re.fullmatch(
        r"error: checkpoint .*step-000002 cannot be written: No space left on device; .*\n", capsys.readouterr().err
    )
    monkeypatch.undo()
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["step-000001"]
    assert job.here(tmp_path / "run", *BACKGROUND, "--resume auto") == 0
    assert_same(tmp_path / "run", whole)


def test_a_signal_waits_for_it(
    job: Job, whole: Path, tmp_path: Path, threads: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import scorers

    monkeypatch.setattr(scorers, "at_call", lambda call: os.kill(os.getpid(), signal.SIGTERM) if call == 2 else None)
    assert job.here(tmp_path / "run", *BACKGROUND) == 128 + signal.SIGTERM
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["step-000001", "step-000002"]
    monkeypatch.setattr(scorers, "at_call", lambda call: None)
    assert job.here(tmp_path / "run", *BACKGROUND, "--resume auto") == 0
    assert_same(tmp_path / "run", whole)


KILLED_WHILE_WRITING = """
import os, signal, sys, time
from repo_fast.engine.saved import Unsaved
from repo_fast.train import main

write = Unsaved.write

def killed(self, folder):
    if folder.parent.name.startswith("step-000002") and folder.name == "reward_critic":
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, folder)

Unsaved.write = killed
main(sys.argv[1:])
"""


def test_killed_while_it_is_written(job: Job, whole: Path, tmp_path: Path) -> None:
    killed = run([sys.executable, "-c", KILLED_WHILE_WRITING, *job.words(tmp_path / "run", *BACKGROUND)])
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["step-000001"]
    assert (tmp_path / "run" / "checkpoints" / "step-000002.partial").is_dir()
    assert job.here(tmp_path / "run", *BACKGROUND, "--resume auto") == 0
    assert_same(tmp_path / "run", whole)


def both_ways(folder: Path) -> list[int]:
    """On each rank: a run of each kind."""
    from repo_fast import engine

    engine.stop_distributed = lambda: None
    job = Job(folder)
    return [job.here(folder / name, *options) for name, options in (("waited", SMALL), ("background", BACKGROUND))]


@pytest.mark.slow
def test_on_two_ranks(job: Job, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text((job.folder / "job.yaml").read_text())
    assert on_ranks(2, f"{__name__}:both_ways", tmp_path) == [[0, 0], [0, 0]]
    assert_same(tmp_path / "background", tmp_path / "waited")
