"""A run does not go on from a checkpoint with other data or models than it started from, unless it is told to."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from repo_fast.config import TrainConfig, parse
from repo_fast.data.sampler import PromptSampler
from repo_fast.errors import InputError
from repo_fast.jobs import fingerprints
from tests.job_runs import FOUR_STEPS, Job, edited_run, metrics, snapshot, write_lines
from tests.supervised_runs import here, make_inputs
from tests.tiny import save_beaver, save_policy

GO_ON = "--resume_changed_data true"


def add_line(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0]]))


def swap_lines(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[::-1]))


def assert_refused(status: int, capsys: pytest.CaptureFixture, message: str) -> None:
    assert status == 2
    assert re.fullmatch(rf"error: checkpoint .* is of other inputs: {message}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["sft", "cost"])
def test_supervised_jobs(tmp_path: Path, capsys: pytest.CaptureFixture, caplog, kind: str) -> None:
    inputs, run = make_inputs(tmp_path / "inputs"), tmp_path / "run"
    file = inputs / ("sft.jsonl" if kind == "sft" else "pairs.jsonl")
    assert here(kind, inputs, run, "--stop_after 2") == 0
    assert here(kind, inputs, run, "--resume auto --stop_after 3") == 0
    before, as_it_was = snapshot(run), file.read_bytes()
    # A change that leaves the numbers of examples and bytes.
    swap_lines(file)
    capsys.readouterr()
    message = (
        rf"{file.name} of data\.train has changed since the run started, and 1 more; expected the same, or --resume"
    )
    assert_refused(here(kind, inputs, run, "--resume auto"), capsys, message)
    assert snapshot(run) == before
    other = Path(shutil.copytree(run, tmp_path / "other"))
    assert here(kind, inputs, other, f"--resume auto {GO_ON}") == 0
    assert f"{file.name} of data.train has changed; {file.name} of data.eval has changed" in caplog.text
    assert [row["step"] for row in metrics(other)] == [1, 2, 3, 4, 5]
    # What it went on with is what it has now.
    assert here(kind, inputs, other, "--resume auto") == 0
    file.write_bytes(as_it_was)
    assert here(kind, inputs, run, "--resume auto") == 0


def test_more_examples_than_there_were(tmp_path: Path, capsys: pytest.CaptureFixture, caplog) -> None:
    inputs, run = make_inputs(tmp_path / "inputs"), tmp_path / "run"
    assert here("sft", inputs, run, "--data.eval null --stop_after 1") == 0
    add_line(inputs / "sft.jsonl")
    capsys.readouterr()
    assert_refused(here("sft", inputs, run, "--data.eval null --resume auto"), capsys, "sft.jsonl of data.train")
    assert here("sft", inputs, run, f"--data.eval null --resume auto {GO_ON}") == 0
    # Eight examples, twice, in threes.
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6]
    # It goes on as a run of six steps does.
    assert "going on with 6 steps in all, where checkpoint" in caplog.text and "is of a run of 5: " in caplog.text
    assert here("sft", inputs, tmp_path / "six", "--data.eval null") == 0
    rates = [[row["learning_rate"] for row in metrics(folder)] for folder in (run, tmp_path / "six")]
    assert rates[0][1:] == rates[1][1:]
    epochs = [row["epoch"] for row in metrics(run)]
    assert epochs == sorted(epochs)


def test_a_checkpoint_beyond_the_last_step_of_fewer_examples(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    inputs, run = make_inputs(tmp_path / "inputs"), tmp_path / "run"
    assert here("sft", inputs, run, "--data.eval null") == 0
    file = inputs / "sft.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    capsys.readouterr()
    assert here("sft", inputs, run, f"--data.eval null --resume auto {GO_ON}") == 2
    assert "is of step 5, expected at most 2, where this run ends" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "name", "change"),
    [
        ("data.prompts", "prompts.jsonl", swap_lines),
        ("data.eval_prompts", "held_out.jsonl", swap_lines),
        ("data.ptx", "demonstrations.jsonl", swap_lines),
        ("policy.path", "policy/model.safetensors", lambda path: retrain(path.parent)),
        ("policy.path", "policy/chat_template.jinja", lambda path: path.write_text(path.read_text() + "\n")),
        ("cost.path", "cost/tokenizer_config.json", lambda path: path.write_text("{}")),
    ],
)
def test_the_main_job(
    option: str, name: str, change: Callable[[Path], object], capsys: pytest.CaptureFixture, started: Path
) -> None:
    file, before = started / name, snapshot(started / "run")
    as_it_was = file.read_bytes()
    try:
        change(file)
        capsys.readouterr()
        status = Job(started).here(started / "run", *options_of(started), "--resume auto")
        assert_refused(status, capsys, re.escape(f"{file.name} of {option} has changed"))
    finally:
        file.write_bytes(as_it_was)
    assert snapshot(started / "run") == before


def test_held_out_prompts_stay_in_any_case(started: Path, capsys: pytest.CaptureFixture) -> None:
    """What differs between two sets of them would be told as the run's doing."""
    file, before = started / "held_out.jsonl", snapshot(started / "run")
    as_it_was = file.read_bytes()
    try:
        swap_lines(file)
        capsys.readouterr()
        assert Job(started).here(started / "run", *options_of(started), "--resume auto", GO_ON) == 2
    finally:
        file.write_bytes(as_it_was)
    said = r"held_out\.jsonl of data\.eval_prompts has changed .* also with --resume_changed_data true"
    assert re.fullmatch(rf"error: checkpoint .* {said}\n", capsys.readouterr().err)
    assert snapshot(started / "run") == before


def test_another_model_is_gone_on_with_and_said(started: Path, tmp_path: Path, caplog) -> None:
    run = Path(shutil.copytree(started / "run", tmp_path / "run"))
    cost = Path(shutil.copytree(started / "cost", tmp_path / "cost"))
    retrain(started / "cost")
    try:
        assert Job(started).here(run, *options_of(started), "--resume auto", GO_ON) == 0
    finally:
        shutil.rmtree(started / "cost")
        shutil.move(cost, started / "cost")
    assert "model.safetensors of cost.path has changed" in caplog.text
    assert "a model is another: what was measured before does not compare" in caplog.text


def test_the_embedded_policy_is_made_anew_by_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repo_fast.world import policy

    first = fingerprints.of_model("world:tiny")
    folder = Path(shutil.copytree(policy.tiny_policy(), tmp_path / "policy"))
    monkeypatch.setattr(policy, "tiny_policy", lambda: folder)
    assert fingerprints.of_model("world:tiny") == first
    retrain(folder)
    assert fingerprints.of_model("world:tiny") != first


def retrain(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def options_of(folder: Path) -> list[str]:
    held_out, cost = f"--data.eval_prompts {folder / 'held_out.jsonl'}", f"--cost.path {folder / 'cost'}"
    return [held_out, cost, "--total_steps 2", "--evaluation.samples_per_prompt 1"]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that a main job reads, and `run`, one step of two."""
    folder = tmp_path_factory.mktemp("started")
    job = Job.make(folder)
    write_lines(folder / "held_out.jsonl", [{"prompt": "tea"}, {"prompt": "bread"}])
    save_beaver(folder / "cost", config_overrides={"score_type": "cost"})
    assert job.here(folder / "run", *options_of(folder), "--stop_after 1") == 0
    return folder


def test_a_checkpoint_from_before_goes_on_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs, run = make_inputs(tmp_path / "inputs"), tmp_path / "run"
    assert here("sft", inputs, run, "--stop_after 1") == 0
    with edited_run(run, 1) as state:
        del state["inputs"], state["config"]["resume_changed_data"]
    swap_lines(inputs / "sft.jsonl")
    assert here("sft", inputs, run, "--resume auto") == 0
    assert caplog.text.count("is from before data were fingerprinted") == 1


def test_folders_of_data_and_what_has_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part").mkdir()
    write_lines(tmp_path / "part" / "one.jsonl", [{"prompt": "tea"}])
    write_lines(tmp_path / "two.jsonl", [{"prompt": "tea"}])
    (tmp_path / "README.md").write_text("no data")
    found = fingerprints.of_data(str(tmp_path), "train")
    assert sorted(found) == ["part/one.jsonl", "two.jsonl"] and len(set(found.values())) == 1
    assert fingerprints.of_data("world:train", "train") == {}
    embedded = fingerprints.fingerprints(parse([], TrainConfig))
    assert {key: sorted(files) for key, files in embedded.items()} == {
        "policy.path": ["model.safetensors", "tokenizer.json"]
    }

    import datasets

    table = datasets.Dataset.from_list([{"prompt": "tea"}], split="test")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {("owner/set", "test"): table}[name, split])
    assert fingerprints.of_data("owner/set", "test") == {"owner/set [test]": table._fingerprint}
    # The loader's error is told where the data are read.
    assert fingerprints.of_data("owner/other", "test") == {}
    # What looks like a file is not looked for on the hub, which takes long without a network.
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("looked for on the hub"))
    assert [fingerprints.of_data(name, "test") for name in ("nowhere.jsonl", "./nowhere", "a/b/c")] == [{}] * 3


def test_what_is_there_and_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "prompts.jsonl").write_text("{}")
    monkeypatch.setattr(fingerprints, "open", closed, raising=False)
    for of in (
        lambda: fingerprints.of_data(str(tmp_path / "prompts.jsonl"), "train"),
        lambda: fingerprints.of_data(str(tmp_path), "train"),
    ):
        with pytest.raises(InputError, match=r"prompts\.jsonl: cannot be read: Permission denied"):
            of()


@pytest.mark.parametrize("path", ["~no-such-user/model", "x" * 300])
def test_a_path_that_cannot_be_is_left_to_what_reads_it(path: str) -> None:
    assert fingerprints.of_model(path) == {}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' models are large files beside these."""
    monkeypatch.setattr(fingerprints, "_PIECE", 64)


@pytest.mark.parametrize("whole", [True, False])
def test_another_training_is_seen(tmp_path: Path, small_pieces: None, whole: bool) -> None:
    save_policy(tmp_path)
    first = fingerprints.of_model(str(tmp_path), whole=whole)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= first.keys()
    assert fingerprints.of_model(str(tmp_path), whole=whole) == first
    retrain(tmp_path)
    second = fingerprints.of_model(str(tmp_path), whole=whole)
    assert {name for name in first if first[name] != second[name]} == {"model.safetensors"}


def flip_one_bit(file: Path) -> None:
    """Between the pieces that runs of before read."""
    content = bytearray(file.read_bytes())
    before = fingerprints.of_model(str(file.parent), whole=False)
    for place in range(len(content) // 2, len(content)):
        content[place] ^= 1
        file.write_bytes(content)
        if fingerprints.of_model(str(file.parent), whole=False) == before:
            return
        content[place] ^= 1
    raise AssertionError("every byte is in a piece")


@pytest.fixture
def of_its_own(job: Job, tmp_path: Path, small_pieces: None) -> tuple[Path, tuple[str, ...]]:
    """A policy that may be changed, and a run of it, `run`, two of four steps long; the run's options."""
    policy = Path(shutil.copytree(job.folder / "policy", tmp_path / "policy"))
    words = (f"--policy.path {policy}", *FOUR_STEPS)
    assert job.here(tmp_path / "run", *words, "--stop_after 2") == 0
    return policy, (*words, "--resume auto")


def test_a_bit_of_the_reference_is_seen(
    job: Job, tmp_path: Path, of_its_own: tuple, capsys: pytest.CaptureFixture
) -> None:
    """Its weights are in no checkpoint: the run would go on to another KL."""
    policy, words = of_its_own
    flip_one_bit(policy / "model.safetensors")
    capsys.readouterr()
    assert_refused(job.here(tmp_path / "run", *words), capsys, r"model\.safetensors of policy\.path has changed")


def test_a_run_of_before_whose_files_were_read_in_pieces_goes_on(
    job: Job, tmp_path: Path, of_its_own: tuple, capsys: pytest.CaptureFixture
) -> None:
    policy, words = of_its_own
    with edited_run(tmp_path / "run", 2) as state:
        del state["inputs_whole"]
        state["inputs"]["policy.path"] = fingerprints.of_model(str(policy), whole=False)
    other = Path(shutil.copytree(tmp_path / "run", tmp_path / "other"))
    assert job.here(tmp_path / "run", *words) == 0
    retrain(policy)
    capsys.readouterr()
    assert_refused(job.here(other, *words), capsys, r"model\.safetensors of policy\.path has changed")


def test_an_epoch_of_another_number_of_prompts_starts_anew() -> None:
    first = PromptSampler(10, 4, seed=0)
    for _ in range(4):
        first.next()
    second = PromptSampler(7, 4, seed=0)
    second.load_state_dict(first.state_dict(), changed=True)
    # Each of the seven once: a whole epoch, the one after that which was under way.
    drawn = [index for _ in range(7) for index in second.next()]
    assert [sorted(drawn[start : start + 7]) for start in (0, 7, 14, 21)] == [list(range(7))] * 4
    assert second.state_dict()["epoch"] == first.state_dict()["epoch"] + 1 + 3
