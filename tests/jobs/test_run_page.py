"""The page of a run, written by runs: at each checkpoint and at the end; and what one that cannot be written does."""

import errno
import os
from pathlib import Path

import pytest

from repo_fast.report.run_page import RunPage
from tests.job_runs import Job, checkpoint_names
from tests.supervised_runs import here, make_inputs


def test_a_run_writes_its_page_at_each_checkpoint_and_at_its_end(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, write, found = tmp_path / "run", RunPage.write, []

    def note(page: RunPage) -> None:
        write(page)
        found.append((tuple(checkpoint_names(run)), (run / "policy").is_dir()))

    monkeypatch.setattr(RunPage, "write", note)
    assert job.here(run, f"--total_steps 4 --data.eval_prompts {job.folder}/prompts.jsonl --stop_after 2") == 0
    assert found == [(("step-000002",), False)] * 2
    assert "step 2 of 4" in (run / "report.html").read_text()
    assert job.here(run, f"--total_steps 4 --data.eval_prompts {job.folder}/prompts.jsonl --resume auto") == 0
    assert found[2:] == [(("step-000002", "step-000004"), False), (("step-000002", "step-000004"), True)]
    html = (run / "report.html").read_text()
    for text in ("step 4 of 4", "Strict violation", "Multiplier λ", "Before and after", 'href="before_after.txt"'):
        assert text in html
    assert "cannot be shown" not in html


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_supervised_runs_write_theirs(kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert here(kind, make_inputs(tmp_path / "inputs"), run) == 0
    html = (run / "report.html").read_text()
    assert "Training loss" in html and "Held-out loss" in html and "cannot be shown" not in html
    assert ("Held-out ranking accuracy" in html) == (kind == "reward")


def test_a_page_that_fails_ends_no_run(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(page: RunPage) -> None:
        raise KeyError("a column")

    monkeypatch.setattr(RunPage, "write", fails)
    assert job.here(tmp_path / "run", "--total_steps 2") == 0
    assert "report.html is not written: KeyError: 'a column'" in capsys.readouterr().out
    assert (tmp_path / "run" / "policy").is_dir()


def test_a_disk_that_is_full_is_one_line_and_the_checkpoint_is_there(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fills(page: RunPage) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "report.html.tmp")

    with monkeypatch.context() as patch:
        patch.setattr(RunPage, "write", fills)
        assert job.here(tmp_path / "run", "--total_steps 4") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "report.html.tmp cannot be read or written: No space left on device" in said
    assert checkpoint_names(tmp_path / "run") == ["step-000002"]
    assert job.here(tmp_path / "run", "--total_steps 4 --resume auto") == 0
    assert "step 4 of 4" in (tmp_path / "run" / "report.html").read_text()
