"""What a run finds in its folder, and what others do there meanwhile: nothing is written over, lost, or begun anew in
silence."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from repo_fast.checkpoints.pieces import PieceReader
from repo_fast.collectives import Ranks
from repo_fast.engine import start_distributed, stop_distributed
from repo_fast.errors import InputError
from repo_fast.jobs import checkpoint, run
from repo_fast.report import folders
from repo_fast.report.folders import hold
from repo_fast.scoring import FunctionScorer
from tests.job_runs import FOUR_STEPS, Job, metrics, on_ranks, same_bits, snapshot, states, weights

ALONE = Ranks(0, 1, torch.device("cpu"))


def half(output_dir: Path) -> Path:
    """As the run was after its second step."""
    shutil.rmtree(output_dir / "policy")
    shutil.rmtree(output_dir / "checkpoints" / "step-000004")
    return output_dir


def refused(job: Job, capsys: pytest.CaptureFixture, output_dir: Path, resume: str, said: str) -> None:
    """The run ends with one line, and leaves the folder as it was."""
    before = snapshot(output_dir)
    capsys.readouterr()
    assert job.here(output_dir, *FOUR_STEPS, f"--resume {resume}") == 2
    assert re.fullmatch(rf"error: {said}\n", capsys.readouterr().err)
    assert snapshot(output_dir) == before


# -------------------------------------------------------------------------------------------------------- two at once


def test_two_are_not_in_one_folder(job: Job, whole: Path, copied: Path, capsys: pytest.CaptureFixture) -> None:
    with hold(half(copied), "output_dir"):
        refused(job, capsys, copied, "auto", "output_dir '.*' is in use by another process, expected one at a time.*")
    assert job.here(copied, *FOUR_STEPS, "--resume auto") == 0
    assert metrics(copied) == metrics(whole) and same_bits(weights(copied), weights(whole))
    # It is let go with the end of the run.
    hold(copied, "output_dir").close()


def test_two_do_not_begin_in_one_folder(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with hold(tmp_path / "run", "output_dir"):
        for resume in ("null", "auto"):
            refused(job, capsys, tmp_path / "run", resume, "output_dir '.*' is in use by another process.*")


def test_a_run_that_fails_lets_go(job: Job, tmp_path: Path, copied: Path) -> None:
    half(copied)
    assert job.here(copied, *FOUR_STEPS, "--resume auto", "--policy.path", "nowhere/at/all") == 2
    assert job.here(tmp_path / "new", *FOUR_STEPS, "--reward.path", "tests.jobs.test_two_runs:fails") == 2
    for folder in (copied, tmp_path / "new"):
        hold(folder, "output_dir").close()


def fails(prompts: list[str], responses: list[str]) -> list[float]:
    raise InputError("no rewards today")


def test_what_another_wrote_since_one_looked(
    job: Job, whole: Path, copied: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended before this one took the folder."""
    newest = half(copied) / "checkpoints" / "step-000004"

    def late(folder: Path, what: str):
        shutil.copytree(whole / "checkpoints" / "step-000004", newest)
        return hold(folder, what)

    monkeypatch.setattr(run, "hold", late)
    assert job.here(copied, *FOUR_STEPS, "--resume auto") == 2
    assert "another process wrote checkpoints in output_dir" in capsys.readouterr().err


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folders.fcntl, "flock", without)
    hold(tmp_path, "output_dir").close()
    assert "cannot be locked (Operation not supported): keep others out of it" in caplog.text


# ------------------------------------------------------------------------------------------------------- what is gone


def test_checkpoints_that_are_gone_beside_a_result(job: Job, copied: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(copied / "checkpoints")
    said = "--resume 'auto' finds no checkpoint in '.*', where there was one: there is .*/run/policy; expected .*"
    refused(job, capsys, copied, "auto", said)


def test_checkpoints_that_are_gone_beside_a_log(job: Job, copied: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(half(copied) / "checkpoints")
    # Of one every two steps, the first was there before the third.
    said = "--resume 'auto' finds no checkpoint in .* there is .*metrics.jsonl, up to step 4; expected .*"
    refused(job, capsys, copied, "auto", said)
    in_the_background(copied)
    with open(copied / "metrics.jsonl", "a") as log:
        log.write('{"step": 5}\n')
    refused(job, capsys, copied, "auto", said.replace("step 4", "step 5"))


def in_the_background(output_dir: Path) -> None:
    """As if a run had written its checkpoints so."""
    written = (output_dir / "config.yaml").read_text()
    assert "background: false" in written
    (output_dir / "config.yaml").write_text(written.replace("background: false", "background: true"))


def test_checkpoints_that_are_damaged_and_no_others(job: Job, copied: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoints = half(copied) / "checkpoints"
    os.rename(checkpoints / "step-000002", checkpoints / "step-000002.damaged")
    refused(job, capsys, copied, "auto", ".* where there was one: there is .*step-000002.damaged; expected .*")


def test_killed_before_its_first_checkpoint(
    job: Job, whole: Path, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log may have come to the second where the first was written in the background."""
    shutil.rmtree(half(copied) / "checkpoints")
    in_the_background(copied)
    assert job.here(copied, *FOUR_STEPS, "--resume auto") == 0
    assert (
        "stopped in or after step 4, before its first checkpoint: the run begins anew, and its log too" in caplog.text
    )
    assert metrics(copied) == metrics(whole) and states(copied, 4) == states(whole, 4)


def test_a_folder_that_may_not_be_read_is_not_empty(
    job: Job, copied: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    listdir = os.listdir

    def not_these(path: Path) -> list[str]:
        if Path(path).name == "checkpoints":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", not_these)
    refused(job, capsys, copied, "auto", ".*/checkpoints: cannot be read: Permission denied")


def test_a_file_that_may_not_be_read_is_not_damaged(
    job: Job, copied: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes = Path.read_bytes

    def not_these(path: Path) -> bytes:
        if path.name == "manifest.json" and not allowed:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    allowed = True
    monkeypatch.setattr(Path, "read_bytes", not_these)
    before = snapshot(copied)
    allowed = False
    assert job.here(copied, *FOUR_STEPS, "--resume auto") == 2
    allowed = True
    assert "step-000004/manifest.json: may not be read by this user, expected" in capsys.readouterr().err
    assert snapshot(copied) == before


def test_an_older_one_is_not_gone_on_from_beside_newer_ones(
    job: Job, copied: Path, capsys: pytest.CaptureFixture
) -> None:
    (copied / "config.yaml").unlink()
    older = copied / "checkpoints" / "step-000002"
    refused(job, capsys, copied, str(older), ".* which holds another run or newer checkpoints, expected a new folder.*")


def test_steps_that_the_log_lacks(job: Job, copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = half(copied) / "metrics.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    assert job.here(copied, *FOUR_STEPS, "--resume auto") == 0
    assert "metrics.jsonl ends at step 1, and the run goes on from a checkpoint of step 2" in caplog.text
    assert [row["step"] for row in metrics(copied)] == [1, 3, 4]


def test_files_that_go_while_a_checkpoint_is_made_sure_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a logger, in the folder of the run."""
    synced = []

    def sync(path: Path) -> None:
        if path.name == "gone":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        synced.append(path.name)

    (tmp_path / "below").mkdir()
    for name in ("gone", "here", "below/there"):
        (tmp_path / name).touch()
    monkeypatch.setattr(folders, "sync", sync)
    folders.sync_tree(tmp_path)
    assert sorted(synced) == sorted(["here", "there", "below", tmp_path.name])


def test_a_folder_that_may_be_passed_through_and_not_read(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As clusters have them above users' folders: what lies below can be written, and its name not be made sure of."""
    opened, refused = os.open, []

    def closed(path: Path, *rest: int) -> int:
        if path == tmp_path:
            refused.append(path)
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", closed)
    assert job.here(tmp_path / "mine", "--total_steps 1") == 0
    assert [path.name for path in (tmp_path / "mine/checkpoints").iterdir()] == ["step-000001"]
    (tmp_path / "policy.partial").mkdir()
    folders.publish(tmp_path / "policy.partial", tmp_path / "policy")
    assert (tmp_path / "policy").is_dir() and len(refused) == 2


def test_another_dtype_is_said_as_it_computes(job: Job, copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    half(copied)
    again = Path(shutil.copytree(copied, copied.with_name("again")))
    # What `auto` is on a CPU.
    assert job.here(copied, *FOUR_STEPS, "--resume auto", "--engine.dtype float32") == 0
    assert "engine.dtype" not in caplog.text
    assert job.here(again, *FOUR_STEPS, "--resume auto", "--engine.dtype bfloat16") == 0
    assert "going on with engine.dtype bfloat16, where checkpoint" in caplog.text


def test_scores_of_cut_responses_are_counted_by_step(
    job: Job, whole: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = FunctionScorer.score

    def cuts_one(self: FunctionScorer, *arguments: object) -> torch.Tensor:
        self.truncated += 1
        return score(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(FunctionScorer, "score", cuts_one)
    options = (*FOUR_STEPS, "--rollout.score_early false")
    assert job.here(tmp_path / "one", *options) == 0
    assert [row["truncated_scores"] for row in metrics(tmp_path / "one")] == [2, 2, 2, 2]
    assert job.here(tmp_path / "two", *options, "--stop_after 1") == 0
    assert job.here(tmp_path / "two", *options, "--resume auto") == 0
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")


# ------------------------------------------------------------------------------------------------------- on two ranks


def test_ranks_go_on_from_one_checkpoint(job: Job, whole: Path, tmp_path: Path) -> None:
    """Of hosts that do not see one folder each would find its own, or none."""
    for name, steps in (("seen-0", (2, 4)), ("seen-1", (2,)), ("seen-2", ())):
        for step in steps:
            shutil.copytree(
                whole / "checkpoints" / f"step-{step:06d}", tmp_path / name / "checkpoints" / f"step-{step:06d}"
            )
    first, second = on_ranks(2, "tests.jobs.test_two_runs:looks", tmp_path)
    assert first == second
    assert first["same"] == "agreed"
    expected = r"the ranks do not find the same checkpoint: rank 0 finds step-000004 \(sha256 \w{12}\), rank 1 "
    assert re.match(expected + r"step-000002 \(sha256 \w{12}\); expected one folder that all hosts see", first["other"])
    assert re.match(expected + "none; expected", first["none"])


def looks(folder: Path) -> dict[str, str]:
    ranks = start_distributed()
    said = {}
    for name, seen in {"same": "seen-0", "other": "seen-1", "none": "seen-2"}.items():
        mine = folder / (seen if ranks.rank else "seen-0")
        try:
            checkpoint.check_ranks_agree(checkpoint.find_resume("auto", mine), ranks)
            said[name] = "agreed"
        except InputError as error:
            said[name] = str(error)
    stop_distributed()
    return said


def test_a_rank_that_cannot_read_its_part_ends_all(job: Job, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    half(tmp_path / "run")
    words = job.words(tmp_path / "run", *FOUR_STEPS, "--resume auto")
    (tmp_path / "words.json").write_text(json.dumps(words))
    assert on_ranks(2, "tests.jobs.test_two_runs:reads_in_part", tmp_path) == [2, 2]
    # What the second said, the first prints: it waited for nobody.
    assert "error: no such piece" in (tmp_path / "said-0.txt").read_text()


def reads_in_part(folder: Path) -> int:
    from repo_fast.train import main

    def fails_to_read(self: PieceReader, *_: object) -> None:
        raise InputError("no such piece")

    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            patch.setattr(PieceReader, "read_into", fails_to_read)
        return main(json.loads((folder / "words.json").read_text()))
