"""`python -m repo_fast.checkpoint`: what it says of checkpoints, and the policies that it makes of them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo_fast.checkpoint import main
from repo_fast.checkpoints.files import FileSum, write_json
from repo_fast.checkpoints.manifest import read_manifest, seal
from repo_fast.jobs.training_prompts import read_record
from tests.checkpoints.test_files import damage
from tests.job_runs import Job, edited_run, run, same_bits, snapshot, weights
from tests.supervised_runs import here, make_inputs

SMALL = ("--total_steps 2", "--checkpoint.every 1", "--checkpoint.keep 0", "--algorithm.advantage rloo")
SMALL += ("--data.ptx null", "--algorithm.ptx_coefficient 0")
KINDS = {
    "whole": (),
    "bfloat16": ("--engine.dtype bfloat16",),
    "adapters, ZeRO 1": ("--policy.lora.rank 3", "--engine.zero_stage 1"),
    "adapters in 4 bits, grown": (
        *("--policy.lora.rank 3", "--policy.quantize nf4"),
        *("--policy.pad_token <pad>", "--policy.pad_vocabulary_to 16"),
    ),
    "last layer": ("--policy.trainable_layers 1",),
}
WITHOUT_DEEPSPEED = """
import sys

sys.modules["deepspeed"] = None
from repo_fast.checkpoint import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def runs(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By kind: a run of two steps, each with a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    found = {name: folder / name.replace(" ", "-") for name in KINDS}
    for name, output_dir in found.items():
        assert job.here(output_dir, *SMALL, *KINDS[name]) == 0
    return found


@pytest.fixture
def copied(runs: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs["whole"], tmp_path / "run"))


def policy_files(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in snapshot(folder).items() if not name.endswith(".safetensors")}


@pytest.mark.parametrize("name", list(KINDS))
def test_the_policy_of_the_last_step_is_the_runs(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    exported = tmp_path / "exported"
    assert main([str(runs[name]), "--export", "2", str(exported)]) == 0
    theirs = runs[name] / "policy"
    assert read_record(str(exported)) == read_record(str(theirs)) is not None
    (exported / "training_prompts.json").unlink()
    assert policy_files(exported) == policy_files(theirs)
    for file in theirs.rglob("*.safetensors"):
        assert same_bits(load_file(exported / file.relative_to(theirs)), load_file(file)), file


def test_an_earlier_step_without_deepspeed(runs: dict[str, Path], tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    words = [sys.executable, "-c", WITHOUT_DEEPSPEED, str(runs["whole"]), "--export", "1", str(exported)]
    done = run(words)
    assert done.returncode == 0, done.stderr
    first, last = load_file(exported / "model.safetensors"), weights(runs["whole"])
    assert first.keys() == last.keys() and not same_bits(first, last)
    AutoModelForCausalLM.from_pretrained(exported)
    AutoTokenizer.from_pretrained(exported)


def test_exporting_says_nothing_of_what_it_does_not_use(runs: dict[str, Path], tmp_path: Path) -> None:
    """transformers imports DeepSpeed, where that is installed."""
    words = [sys.executable, "-m", "repo_fast.checkpoint", str(runs["whole"]), "--export", "1", str(tmp_path / "new")]
    own = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    ended = subprocess.run(words, env=own, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == (f"{tmp_path / 'new'}: the policy of step 1\n", "")


def test_a_fine_tuned_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    assert here("sft", inputs, tmp_path / "sft", "--stop_after 2") == 0
    assert here("cost", inputs, tmp_path / "cost", "--stop_after 1") == 0
    assert main([str(tmp_path / "sft"), "--export", "2", str(tmp_path / "exported")]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    capsys.readouterr()
    assert main([str(tmp_path / "cost"), "--export", "1", str(tmp_path / "score")]) == 2
    assert "is of a score model, expected one of repo_fast.train or repo_fast.sft" in capsys.readouterr().err


def test_what_is_listed(copied: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(copied)]) == 0
    assert main([str(copied / "checkpoints"), "--verify"]) == 0
    listed = capsys.readouterr().out
    assert len(re.findall(r"step-000001 +\| \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| +1 \| +0\.\d+ \|", listed)) == 2
    assert listed.count("all files are there") == listed.count("sound") == 2
    assert main([str(copied / "checkpoints" / "step-000002"), "--verify"]) == 0
    assert capsys.readouterr().out.count("sound") == 1


def test_one_that_the_run_removes_meanwhile(
    copied: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repo_fast.checkpoints import manifest

    damages = manifest.damages

    def removed_first(folder: Path, *arguments: Any) -> list:
        if folder.name == "step-000001":
            shutil.rmtree(folder)
        return damages(folder, *arguments)

    monkeypatch.setattr(manifest, "damages", removed_first)
    assert main([str(copied)]) == 0
    listed = capsys.readouterr().out
    assert "step-000002" in listed and "step-000001" not in listed


@pytest.mark.parametrize("words", [[], ["--verify"], ["--export", "1", "new"]])
@pytest.mark.parametrize("function", ["manifest.damages", "checkpoint.read_run"])
def test_one_that_the_run_removes_while_it_is_looked_at(
    copied: Path, words: list[str], function: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repo_fast.checkpoints import manifest
    from repo_fast.jobs import checkpoint, policy_export

    module, name = {"manifest": manifest, "checkpoint": checkpoint}[function.partition(".")[0]], function.split(".")[1]
    called = getattr(module, name)

    def removed(folder: Path, *arguments: Any) -> Any:
        if name == "read_run" and folder.name == "step-000001":
            shutil.rmtree(folder)
        found = called(folder, *arguments)
        if name == "damages" and folder.name == "step-000001":
            shutil.rmtree(folder)
        return found

    monkeypatch.setattr(module, name, removed)
    monkeypatch.setattr(policy_export, "read_run", removed if name == "read_run" else policy_export.read_run)
    monkeypatch.chdir(copied)
    capsys.readouterr()
    status, said = main([str(copied), *words]), capsys.readouterr()
    if "--export" in words:
        assert status == 2 and not (copied / "new").exists()
        assert re.fullmatch(
            r"error: checkpoint .*step-000001 is gone: its run, .* expected one that is there\n", said.err
        )
    else:
        assert status == 0 and "step-000002" in said.out and "step-000001" not in said.out


@pytest.mark.parametrize("content", [[], {}, None, {"step": 1, "ranks": "1", "config": {}, "model": {}, "state": {}}])
@pytest.mark.parametrize("words", [[], ["--export", "1", "new"]])
def test_what_is_of_no_run_is_one_line(
    copied: Path, content: Any, words: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sums are right: somebody made it so."""
    folder = copied / "checkpoints" / "step-000001"
    seal(folder, read_manifest(folder) | {"run.json": write_json(folder / "run.json", content)})
    monkeypatch.chdir(copied)
    capsys.readouterr()
    assert main([str(copied), *words]) == 2
    assert re.fullmatch(
        r"error: .*run.json is of no run: '(step|ranks)' is not there, or .*\n", capsys.readouterr().err
    )


def test_a_configuration_that_is_none_is_one_line(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with edited_run(copied, 1) as state:
        state["config"]["policy"] = {"path": "x"}
    capsys.readouterr()
    assert main([str(copied), "--export", "1", str(tmp_path / "new")]) == 2
    assert re.fullmatch(r"error: checkpoint .* is of no run of this repo_fast: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["manifest.json", "run.json", "policy/engine.json"])
@pytest.mark.parametrize("what", ["a pipe", "a device"])
def test_what_is_no_file_is_not_read(copied: Path, name: str, what: str, capsys: pytest.CaptureFixture) -> None:
    """Neither would end."""
    folder = copied / "checkpoints" / "step-000001"
    sums = read_manifest(folder)
    (folder / name).unlink()
    if what == "a pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    if name in sums:
        # As large as they say that they are.
        seal(folder, sums | {name: FileSum(0, "0" * 64)})
    assert main([str(copied), "--verify"]) == 3
    assert f"{name} cannot be read" in " ".join(capsys.readouterr().out.split())


def test_an_export_without_a_record_says_so(copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copied / "training_prompts.json").unlink()
    assert main([str(copied), "--export", "2", str(tmp_path / "new")]) == 0
    assert "there is no training_prompts.json beside the checkpoints: what" in caplog.text
    assert read_record(str(tmp_path / "new")) is None


def test_a_link_to_one(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "step-newest").symlink_to(copied / "checkpoints" / "step-000002")
    assert main([str(tmp_path / "kept"), "--export", "2", str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_what_is_beside_an_export_stays(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "exported.partial").mkdir()
    (tmp_path / "exported.partial" / "mine.txt").write_text("notes")
    assert main([str(copied), "--export", "2", str(tmp_path / "exported")]) == 2
    assert re.fullmatch(r"error: '.*exported.partial' exists, expected a new folder\n", capsys.readouterr().err)
    assert (tmp_path / "exported.partial" / "mine.txt").read_text() == "notes"


def test_a_model_that_changed_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its tokenizer goes into the folder, and its frozen weights."""
    inputs = make_inputs(tmp_path / "inputs")
    assert here("sft", inputs, tmp_path / "sft", "--stop_after 1") == 0
    model = Path(json.loads((tmp_path / "sft/checkpoints/step-000001/run.json").read_text())["config"]["model"]["path"])
    settings = model / "tokenizer_config.json"
    settings.write_text(settings.read_text() + " ")
    assert main([str(tmp_path / "sft"), "--export", "1", str(tmp_path / "exported")]) == 2
    assert "is of another model: tokenizer_config.json of model.path has changed since" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


def test_damage_is_listed(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What sizes show is said at once; the rest, where all is read. Nothing of it is exported."""
    for file, how in (("policy/shard-00000-of-00001.safetensors", "a bit"), ("run.json", "zeroes")):
        damage(copied / "checkpoints" / "step-000002" / file, how)
    damage(copied / "checkpoints" / "step-000001" / "policy" / "engine.json", "cut")
    (copied / "checkpoints" / "step-000003.partial").mkdir()
    before = snapshot(copied)
    assert main([str(copied)]) == 3
    listed = capsys.readouterr().out
    assert listed.count("damaged") == 2 and "policy/engine.json has" in listed and "run.json is not what" in listed
    assert "was not completed" in listed
    assert main([str(copied), "--verify"]) == 3
    listed = capsys.readouterr().out
    assert listed.count("damaged") == 3 and listed.count("its sha256 differs") == 2
    assert main([str(copied), "--export", "2", str(tmp_path / "exported")]) == 3
    assert capsys.readouterr().err.count("is damaged: ") == 2
    assert not (tmp_path / "exported").exists() and snapshot(copied) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}/policy"], "policy' has no checkpoints, expected the output_dir of a run, or one of its checkpoints"),
        (["{run}/nowhere"], "has no checkpoints, expected"),
        (
            ["{run}", "--export", "7", "{run}/new"],
            "--export '7' is no step that has a checkpoint, expected one",
        ),
        (["{run}", "--export", "2", "{run}/policy"], "policy' exists, expected a new folder"),
        (["{run}", "--export", "2", "."], "'.' exists, expected a new folder"),
        (["{run}", "--export", "2", "/"], "'/' exists, expected a new folder"),
        (["{run}", "--verify", "--export", "2", "{run}/new"], "not allowed with argument"),
        (["{run}", "--no-such-option"], "unrecognized arguments: --no-such-option"),
        ([], "the following arguments are required: folder"),
    ],
)
def test_bad_input(copied: Path, capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    before = snapshot(copied)
    capsys.readouterr()
    assert main([word.format(run=copied) for word in words]) == 2
    assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", capsys.readouterr().err)
    assert snapshot(copied) == before
