"""Damage to a checkpoint is noticed before anything of it is read, and the run goes on from the one before."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from repo_fast.collectives import Ranks
from repo_fast.errors import InputError
from repo_fast.jobs import checkpoint
from repo_fast.jobs.random_state import load_random_state
from tests.checkpoints.test_files import DAMAGES, damage, fill_disk
from tests.job_runs import FOUR_STEPS, Job, metrics, same_bits, snapshot, states, weights

ALONE = Ranks(0, 1, torch.device("cpu"))


def newest(output_dir: Path) -> Path:
    return output_dir / "checkpoints" / "step-000004"


def sound(resume: str, output_dir: Path) -> Path:
    found = checkpoint.find_resume(resume, output_dir)
    assert found is not None
    return checkpoint.first_sound(found, resume, output_dir, ALONE)


@pytest.mark.parametrize("how", list(DAMAGES))
def test_every_file_is_looked_at(copied: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    written = sorted(path.relative_to(newest(copied)) for path in newest(copied).rglob("*") if path.is_file())
    assert {path.name for path in written} > {"manifest.json", "run.json", "random-rank0.safetensors", "engine.json"}
    assert len(written) == 5
    for file in written:
        kept = (newest(copied) / file).read_bytes()
        damage(newest(copied) / file, how)
        with pytest.raises(InputError, match=f"checkpoint .* is damaged, expected another: {file} "):
            sound(str(newest(copied)), copied)
        caplog.clear()
        assert sound("auto", copied) == copied / "checkpoints" / "step-000002"
        said = "\n".join(record.getMessage() for record in caplog.records)
        assert re.search(
            "step-000004 is damaged \\(.*\\): it is called step-000004.damaged from now on, and .* step 2", said
        )
        aside = newest(copied).with_name("step-000004.damaged")
        (aside / file).write_bytes(kept)
        os.rename(aside, newest(copied))
        assert sound("auto", copied) == newest(copied)


def test_what_could_not_be_read_and_can_be_now(copied: Path) -> None:
    """As on a file system that was away for a moment: nothing is set aside."""
    before = snapshot(copied)
    with pytest.raises(InputError, match="step-000004 could not be read before, and can be now"):
        checkpoint.first_sound(copied / "checkpoints/step-000002", "auto", copied, ALONE)
    assert snapshot(copied) == before


def test_what_else_lies_in_a_checkpoint_is_not_read(copied: Path) -> None:
    """A pickle that would write a file, under names that were once read."""

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(copied / "attacked"),)

    for name in ("mp_rank_00_model_states.pt", "pytorch_model.bin", "optimizer.pt"):
        for folder in (newest(copied), newest(copied) / "policy"):
            torch.save(Attack(), folder / name)
    assert sound("auto", copied) == newest(copied)
    assert not (copied / "attacked").exists()


def test_a_run_goes_on_from_the_one_before(job: Job, whole: Path, copied: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(copied / "policy")
    damage(newest(copied) / "policy" / "shard-00000-of-00001.safetensors", "a bit")
    left = snapshot(newest(copied))
    assert job.here(copied, *FOUR_STEPS, "--resume auto") == 0
    assert metrics(copied) == metrics(whole)
    assert states(copied, 4) == states(whole, 4)
    assert same_bits(weights(copied), weights(whole))
    assert snapshot(newest(copied).with_name("step-000004.damaged")) == left


@pytest.mark.parametrize("file", ["run.json", "policy/engine.json"])
def test_none_is_left(job: Job, copied: Path, capsys: pytest.CaptureFixture, file: str) -> None:
    for folder in checkpoint.checkpoints(copied):
        damage(folder / file, "zeroes")
    before = snapshot(copied)
    capsys.readouterr()
    assert job.here(copied, *FOUR_STEPS, "--resume auto") == 2
    assert re.fullmatch(
        rf"error: --resume 'auto' finds damaged checkpoints alone, expected one that is not: .*{file}.*\n",
        capsys.readouterr().err,
    )
    # None has another name: the next one would start anew.
    assert snapshot(copied) == before


def test_a_full_disk_leaves_the_last_one(
    job: Job, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fill_disk(monkeypatch, "step-000004")
    assert job.here(tmp_path / "run", *FOUR_STEPS) == 2
    assert re.fullmatch(
        r"error: checkpoint .*step-000004 cannot be written: No space left on device; .*\n",
        capsys.readouterr().err,
    )
    monkeypatch.undo()
    assert sound("auto", tmp_path / "run").name == "step-000002"
    assert job.here(tmp_path / "run", *FOUR_STEPS, "--resume auto") == 0
    assert states(tmp_path / "run", 4) == states(whole, 4)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["step-000002", "step-000004"]


def test_one_of_before_is_said_to_be(copied: Path) -> None:
    """Those were DeepSpeed's, and had no manifest."""
    (newest(copied) / "manifest.json").unlink()
    (newest(copied) / "policy" / "state").mkdir()
    (newest(copied) / "policy" / "state" / "mp_rank_00_model_states.pt").write_bytes(b"")
    for resume in ("auto", str(newest(copied))):
        with pytest.raises(InputError, match="step-000004 is DeepSpeed's, as repo_fast wrote them before, expected"):
            sound(resume, copied)


def test_links_are_not_followed_by_what_is_written(job: Job, copied: Path, tmp_path: Path) -> None:
    """A run that came from elsewhere may have some."""
    shutil.rmtree(copied / "policy")
    precious = tmp_path / "precious"
    shutil.move(copied / "checkpoints" / "step-000002", precious)
    before = snapshot(precious)
    for name in ("checkpoints/step-000002", "checkpoints/step-000003.partial", "policy", "policy.partial"):
        (copied / name).symlink_to(precious)
    assert job.here(copied, *FOUR_STEPS, "--checkpoint.keep 1", "--resume auto") == 0
    assert snapshot(precious) == before and not (copied / "policy").is_symlink()


def test_a_file_that_is_a_link_is_refused(
    job: Job, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "precious").write_text("mine")
    (copied / "config.yaml").unlink()
    (copied / "config.yaml").symlink_to(tmp_path / "precious")
    capsys.readouterr()
    assert job.here(copied, *FOUR_STEPS, "--resume auto") == 2
    assert re.fullmatch(r"error: '.*config\.yaml' is a link to '.*precious', .*\n", capsys.readouterr().err)
    assert (tmp_path / "precious").read_text() == "mine"


def test_random_states_that_are_none_are_named(copied: Path) -> None:
    """Where the manifest was written to agree."""
    (newest(copied) / "random-rank0.safetensors").write_bytes(b"\x80\x04 a pickle, say, of some length")
    with pytest.raises(InputError, match=r"random-rank0\.safetensors cannot be read"):
        load_random_state(newest(copied), 0)
