"""Runs of before go on from their checkpoints, once these are converted; no pickle among them is executed."""

import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from repo_fast.checkpoint import main
from repo_fast.jobs.run import Run
from tests.job_runs import Job, metrics, same_bits, snapshot, states, weights

SMALL = ("--total_steps 4", "--checkpoint.every 2", "--checkpoint.keep 0", "--critics.shared_trunk true")


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, and in `before/` their checkpoints as DeepSpeed wrote them."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    save = Run.save_checkpoint

    def both(self: Run, **options: bool) -> None:
        for name, engine in self.trained().items():
            folder = output_dir / "before" / f"step-{self.step:06d}" / name
            engine._engine.save_checkpoint(str(folder), tag="state", save_latest=False)
        save(self, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save_checkpoint", both)
        assert job.here(output_dir, *SMALL) == 0
    for folder in (output_dir / "before").iterdir():
        for file in (output_dir / "checkpoints" / folder.name).iterdir():
            if file.is_file() and file.name != "manifest.json":
                shutil.copy(file, folder)
    return output_dir


@pytest.fixture
def before(whole: Path, tmp_path: Path) -> Path:
    """The run after two of its steps, with DeepSpeed's checkpoint alone."""
    copied = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(copied / "checkpoints")
    shutil.rmtree(copied / "policy")
    shutil.copytree(whole / "before" / "step-000002", copied / "checkpoints" / "step-000002")
    return copied


def test_a_run_of_before_goes_on(job: Job, whole: Path, before: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = before / "checkpoints" / "step-000002"
    left = snapshot(checkpoint)
    assert job.here(before, *SMALL, "--resume auto") == 2
    said = (
        r"error: checkpoint .*step-000002 is DeepSpeed's, .*: python -m repo_fast\.checkpoint .* --convert makes .*\n"
    )
    assert re.fullmatch(said, capsys.readouterr().err)
    assert main([str(before)]) == 0
    assert "DeepSpeed's, of before: --convert" in capsys.readouterr().out
    assert main([str(before), "--convert"]) == 0
    assert snapshot(checkpoint.with_name("step-000002.deepspeed")) == left
    assert main([str(before), "--verify"]) == 0
    listed = capsys.readouterr().out
    assert "sound" in listed and "was converted" in listed
    assert job.here(before, *SMALL, "--resume auto") == 0
    assert metrics(before) == metrics(whole)
    assert same_bits(weights(before), weights(whole)) and states(before, 4) == states(whole, 4)
    assert main([str(before), "--convert"]) == 2
    assert "--convert finds no checkpoint that DeepSpeed wrote" in capsys.readouterr().err


def test_killed_while_it_is_converted(whole: Path, before: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repo_fast.jobs import conversion

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "complete", killed)
    with pytest.raises(KeyboardInterrupt):
        main([str(before), "--convert"])
    monkeypatch.undo()
    assert not (before / "checkpoints" / "step-000002").exists()
    assert main([str(before), "--convert"]) == 0
    assert states(before, 2).keys() == states(whole, 2).keys()


def test_one_that_cannot_be_converted_keeps_its_name(before: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repo_fast.jobs import conversion

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    left = snapshot(before)
    monkeypatch.setattr(conversion, "convert_engine", fails)
    assert main([str(before), "--convert"]) == 2
    assert snapshot(before) == left


def test_half_converted_is_not_begun_anew(job: Job, before: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = before / "checkpoints" / "step-000002"
    os.rename(checkpoint, checkpoint.with_name("step-000002.deepspeed"))
    left = snapshot(before)
    assert job.here(before, *SMALL, "--resume auto") == 2
    assert "its conversion was not finished, expected one of repo_fast's own: " in capsys.readouterr().err
    assert snapshot(before) == left


@pytest.mark.parametrize(
    "name", ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"]
)
def test_nothing_of_a_pickle_is_executed(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    file = before / "checkpoints" / "step-000002" / "policy" / "state" / name
    torch.save(torch.load(file, weights_only=False) | {"attack": Attack()}, file)
    assert main([str(before), "--convert"]) == 2
    assert re.fullmatch(rf"error: '.*{name}' cannot be read: Weights only load failed.*\n", capsys.readouterr().err)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("kind", ["optim_states", "model_states"])
def test_a_damaged_one_is_not_made_a_sound_one(before: Path, capsys: pytest.CaptureFixture, kind: str) -> None:
    """torch reads it without a word."""
    file = before / "checkpoints" / "step-000002" / "policy" / "state" / f"zero_pp_rank_0_mp_rank_00_{kind}.pt"
    with zipfile.ZipFile(file) as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size)
    content = bytearray(file.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 64
    file.write_bytes(content)
    torch.load(file, weights_only=False)
    left = snapshot(before)
    assert main([str(before), "--convert"]) == 2
    said = rf"error: '.*{kind}\.pt' is damaged: the sum of its record '{largest.filename}' differs, expected .*\n"
    assert re.fullmatch(said, capsys.readouterr().err)
    assert snapshot(before) == left


@pytest.mark.parametrize(
    ("place", "said"),
    [
        # In the directory of the file: the first byte of a name, and what says that a record is a folder.
        (46, r"is damaged \(.*\), expected what was written"),
        (38, r"is damaged: its record '.*' is no file, expected what was written"),
    ],
)
def test_a_damaged_directory_of_one(before: Path, place: int, said: str, capsys: pytest.CaptureFixture) -> None:
    file = before / "checkpoints" / "step-000002" / "policy" / "state" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + place] ^= 0x90 if place == 46 else 0x10
    file.write_bytes(content)
    assert main([str(before), "--convert"]) == 2
    assert re.fullmatch(rf"error: '.*' {said}\n", capsys.readouterr().err)


def test_what_deepspeed_did_not_write_so_is_one_line(before: Path, capsys: pytest.CaptureFixture) -> None:
    state = before / "checkpoints" / "step-000002" / "policy" / "state"
    torch.save({"module": {}}, state / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert main([str(before), "--convert"]) == 2
    assert re.fullmatch(r"error: '.*state' is not what DeepSpeed 0\.19 writes: .*\n", capsys.readouterr().err)
