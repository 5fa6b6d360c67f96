"""What a run cannot do shows before its first step, in every job, as one line; and what it writes others can read."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    GPT2Config,
    PreTrainedTokenizerBase,
)

from repo_fast.config.sections import check_fields
from repo_fast.errors import InputError
from repo_fast.jobs.checkpoint import check_output_folder
from repo_fast.jobs.training_prompts import INSIDE, Source, write_record
from repo_fast.report.folders import LOCK_FILE, publish, put_back, replace
from tests.job_runs import Job, edited_run, metrics, write_lines
from tests.supervised_runs import here, make_inputs
from tests.tiny import save_beaver, save_policy, save_sequence_classifier, word_tokenizer

LONG = "how do i make tea " * 9


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def save_other(folder: Path, config, seed: int = 0) -> Path:
    """A policy of another architecture, with the tokenizer of the tests."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_gpt2(folder: Path, positions: int) -> Path:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": len(word_tokenizer())}
    return save_other(folder, GPT2Config(**sizes, n_positions=positions, bos_token_id=1, eos_token_id=2))


def save_gpt2_reward(folder: Path, positions: int) -> Path:
    path = save_gpt2(folder, positions)
    config = AutoModelForCausalLM.from_pretrained(path).config
    config.num_labels, config.pad_token_id = 1, 0
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    return path


def evaluate(job: Job, path: Path, output_dir: Path, *options: str) -> int:
    from repo_fast.evaluate import main

    words = ["--policy", f"one={path}", "--prompts", str(job.folder / "prompts.jsonl"), "--output_dir", str(output_dir)]
    words += ["--reward.path", "tests.scorers:reward", "--cost.path", "tests.scorers:cost"]
    return main([*words, *options])


def jobs(folder: Path, job: Job) -> dict[str, Callable[[Path, Path], int]]:
    """What starts each job on a policy's folder, with an output folder."""
    return {
        "sft": lambda path, out: here("sft", folder, out, f"--model.path {path}"),
        "reward": lambda path, out: here("reward", folder, out, f"--model.path {path}"),
        "train": lambda path, out: job.here(out, f"--policy.path {path}"),
        "evaluate": lambda path, out: evaluate(job, path, out),
    }


@pytest.mark.parametrize("name", ["sft", "reward", "train", "evaluate"])
def test_a_policy_that_lacks_weights_starts_no_job(
    name: str, inputs: Path, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_policy(tmp_path / "policy")
    weights = {key: value for key, value in load_file(path / "model.safetensors").items() if "layers.1.mlp" not in key}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    assert jobs(inputs, job)[name](path, tmp_path / "out") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "lacks 3 weights of its architecture" in said[-1] and said[-1].startswith("error: ")


@pytest.mark.parametrize("name", ["sft", "reward", "train", "evaluate"])
def test_sequences_beyond_a_table_of_positions_start_no_job(
    name: str, inputs: Path, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jobs(inputs, job)[name](save_gpt2(tmp_path / "policy", 10), tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "expected at most the 10 positions" in said and "Traceback" not in said
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_score_model_s_table_of_positions_counts_too(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_gpt2_reward(tmp_path / "reward", 12)
    assert job.here(tmp_path / "out", f"--reward.path {path}") == 2
    assert "cut to reward.max_tokens: up to" in capsys.readouterr().err


def test_an_evaluation_s_score_model_has_to_have_positions_too(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_gpt2_reward(tmp_path / "reward", 24)
    assert evaluate(job, job.folder / "policy", tmp_path / "out", "--reward.path", str(path)) == 2
    assert "expected at most the 24 positions" in capsys.readouterr().err


def test_what_a_score_model_s_template_has_no_place_for_shows_at_the_start(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = word_tokenizer(chat_template=False)
    rows = [{"prompt": "tea"}, {"prompt": "bread", "system": "please"}, {"prompt": "make tea"}]
    prompts = write_lines(tmp_path / "prompts.jsonl", rows)
    options = (f"--reward.path {save_beaver(tmp_path / 'reward', tokenizer=tokenizer)}", f"--data.prompts {prompts}")
    assert job.here(tmp_path / "out", *options) == 2
    said = capsys.readouterr().err
    assert "prompts.jsonl line 2: template 'safe-rlhf' has no place for a system text" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file/below", "/proc/nothing"])
def test_a_folder_that_cannot_be_made_is_one_line(
    place: str, inputs: Path, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for name, start in jobs(inputs, job).items():
        assert start(inputs / "policy", tmp_path / place if place[0] != "/" else Path(place)) == 2, name
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "settings", ['{"num_return_sequences": 3}', "[]", '{"eos_token_id": "2"}', '{"eos_token_id": [[2]]}']
)
def test_generation_settings_that_cannot_be_are_one_line(
    settings: str, inputs: Path, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_policy(tmp_path / "policy")
    (path / "generation_config.json").write_text(settings)
    for name in ("train", "evaluate"):
        assert jobs(inputs, job)[name](path, tmp_path / name) == 2, name
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ")


def test_end_tokens_beyond_the_tokenizer_are_no_words(inputs: Path, tmp_path: Path) -> None:
    """As its text, each would be "None", which then ended answers."""
    from repo_fast.data import PromptTemplate

    tokenizer = word_tokenizer(["answer", "None"])
    template = PromptTemplate(tokenizer, "auto", None, [99999])
    assert tokenizer.convert_ids_to_tokens(template.encode_response("answer None")) == ["answer", "None", "</s>"]
    path = save_policy(tmp_path / "policy")
    (path / "generation_config.json").write_text('{"eos_token_id": -1}')
    assert here("sft", inputs, tmp_path / "out", f"--model.path {path}", "--epochs 1") == 0


def test_what_the_end_of_a_run_cannot_do_shows_at_its_start(
    inputs: Path, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    for name, start in jobs(inputs, job).items():
        if name != "evaluate":
            assert start(inputs / "policy", tmp_path / name) == 2
            said = capsys.readouterr().err
            assert "the run could not end: writing the model fails ([Errno 28] No space left on device)" in said
            assert [path.name for path in (tmp_path / name).iterdir()] == [LOCK_FILE]
    monkeypatch.undo()
    assert job.here(tmp_path / "train") == 0, "the same command cannot be given again"
    monkeypatch.setattr("repo_fast.jobs.run.plot_panels", full)
    assert job.here(tmp_path / "plots") == 2
    assert "drawing a plot fails" in capsys.readouterr().err


def test_settings_that_could_not_be_written_do_not_lose_a_run(inputs: Path, tmp_path: Path) -> None:
    """Published Vicuna and Llama 2 folders have a temperature and no do_sample: saving failed, after the last step."""
    path = save_policy(tmp_path / "policy")
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))
    before = os.umask(0o027)
    try:
        assert here("sft", inputs, tmp_path / "out", f"--model.path {path}") == 0
    finally:
        os.umask(before)
    written = json.loads((tmp_path / "out" / "policy" / "generation_config.json").read_text())
    assert written["do_sample"] is True and written["temperature"] == 0.9
    # As the umask says, whatever safetensors does.
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    # (DeepSpeed leaves a script that can be run.)
    assert {oct(stat.S_IMODE(file.stat().st_mode) & ~0o100) for file in files} == {"0o640"}
    assert {"model.safetensors", "random-rank0.safetensors"} <= {file.name for file in files}


def test_a_folder_is_published_readable_and_whole(tmp_path: Path) -> None:
    (tmp_path / "aside" / "adapter").mkdir(parents=True)
    save_file({"a": torch.zeros(3)}, tmp_path / "aside" / "adapter" / "a.safetensors")
    (tmp_path / "aside" / "run.sh").write_text("true")
    (tmp_path / "aside" / "run.sh").chmod(0o700)
    before = os.umask(0o022)
    try:
        publish(tmp_path / "aside", tmp_path / "final")
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "final").rglob("*") if file.is_file()}
    assert modes == {"a.safetensors": 0o644, "run.sh": 0o744}
    assert not (tmp_path / "aside").exists()


def test_one_that_has_the_name_stays_until_the_next_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, aside = tmp_path / "policy", tmp_path / "policy.partial"

    def written(folder: Path, text: str) -> None:
        folder.mkdir()
        (folder / "weights").write_text(text)

    def quota(handle: int) -> None:
        raise OSError(122, "Disk quota exceeded")

    written(final, "first")
    written(aside, "second")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", quota)
        with pytest.raises(OSError, match="quota"):
            replace(aside, final)
    assert (final / "weights").read_text() == "first"
    renamed = os.rename

    def once(source: Path, target: Path) -> None:
        if source == aside:
            raise OSError(5, "Input/output error")
        renamed(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", once)
        with pytest.raises(OSError, match="Input/output"):
            replace(aside, final)
    assert (final / "weights").read_text() == "first"
    replace(aside, final)
    assert (final / "weights").read_text() == "second" and [*tmp_path.iterdir()] == [final]
    # Killed between the two renames: what was there comes back; after the second, it goes.
    final.rename(tmp_path / ".policy.replaced")
    put_back(final)
    assert (final / "weights").read_text() == "second" and [*tmp_path.iterdir()] == [final]
    written(tmp_path / ".policy.replaced", "first")
    put_back(final)
    assert (final / "weights").read_text() == "second" and [*tmp_path.iterdir()] == [final]


@pytest.mark.parametrize("name", ["plots", "evaluations", "tensorboard", "profile", "checkpoints", "plots/below"])
def test_what_is_written_is_not_led_into_another_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "run" / "plots").mkdir(parents=True)
    path = tmp_path / "run" / name
    if path.is_dir():
        path.rmdir()
    path.symlink_to(tmp_path / "precious")
    with pytest.raises(
        InputError, match=f"{name}' is a link to '.*precious', expected a folder: what is written would"
    ):
        check_output_folder("auto", tmp_path / "run")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="metrics.jsonl' is a pipe, expected a file"):
        check_output_folder("auto", tmp_path)


@pytest.mark.parametrize("name", ["warnings.jsonl", "evaluations.jsonl", "eval_before.jsonl", "report.html"])
def test_what_would_be_written_over_is_refused_before_anything_is(
    inputs: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / name).write_text("mine")
    assert here("sft", inputs, tmp_path) == 2
    assert f"holds {name!r} and no run, which would write over it, expected a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_model_s_own_record_is_not_written_over(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_record(tmp_path, INSIDE, (Source("data.prompts", "p.jsonl", None, ("0" * 16,)),))
    before = (tmp_path / "training_prompts.json").read_bytes()
    assert here("sft", inputs, tmp_path) == 2
    assert "holds 'training_prompts.json', which says what the model in that folder was" in capsys.readouterr().err
    assert (tmp_path / "training_prompts.json").read_bytes() == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "plots/loss.png", "evaluations/step-000001.jsonl"])
def test_what_is_written_is_not_led_out_of_its_folder(tmp_path: Path, name: str) -> None:
    """Links of others, as wandb makes them, are theirs."""
    path = tmp_path / "run" / name
    for own in (path, tmp_path / "run" / "wandb" / "debug.log"):
        own.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "run" / "wandb" / "debug.log").symlink_to(tmp_path / "log")
    (tmp_path / "run" / "latest").symlink_to(tmp_path)
    check_output_folder("auto", tmp_path / "run")
    path.symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match=f"{name}' is a link to '.*precious', expected a file"):
        check_output_folder("auto", tmp_path / "run")


BLOOM = BloomConfig(
    hidden_size=32, n_layer=2, n_head=4, vocab_size=len(word_tokenizer()), bos_token_id=1, eos_token_id=2
)


@pytest.mark.slow
def test_an_architecture_that_cannot_be_packed_trains(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On two ranks with every weight sharded, where each must make as many calls; and as on one."""
    path = save_other(tmp_path / "policy", BLOOM)
    options = (f"--policy.path {path}", "--total_steps 2")
    two = job.torchrun(2, tmp_path / "two", *options)
    assert two.returncode == 0, two.stderr[-4000:]
    assert (
        "attention of the policy: padded rows, eager; packed: BloomForCausalLM has an attention of its own"
        in two.stdout
    )
    assert len(metrics(tmp_path / "two")) == 2
    # The reference is the policy of the first step: a KL above rounding would say that the two are run otherwise.
    assert abs(metrics(tmp_path / "two")[0]["kl"]) < 1e-6


def test_what_sft_learns_of_a_padded_architecture(inputs: Path, tmp_path: Path) -> None:
    """Its first loss is the mean cross-entropy of response tokens, as transformers gives it for each by itself."""
    from repo_fast.data import PromptTemplate, load_demonstrations

    path = save_other(tmp_path / "policy", BLOOM)
    template, model = PromptTemplate(word_tokenizer()), AutoModelForCausalLM.from_pretrained(path).eval()
    assert here("sft", inputs, tmp_path / "out", f"--model.path {path}", "--batch_size 7", "--epochs 1") == 0
    total, count = 0.0, 0
    for shown in load_demonstrations(str(inputs / "sft.jsonl")):
        prompt, response = template.encode_prompt(shown.prompt), template.encode_response(shown.response)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        total -= float(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())
        count += len(response)
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_changed_file_is_noticed_whatever_its_suffix_looks_like(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reader takes suffixes in capitals."""
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "A.JSONL"
    file.write_bytes((inputs / "sft.jsonl").read_bytes())
    source = f"--data.train {tmp_path / 'data'}"
    assert here("sft", inputs, tmp_path / "run", source, "--stop_after 1") == 0
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    assert here("sft", inputs, tmp_path / "run", source, "--resume auto") == 2
    assert "A.JSONL of data.train has changed" in capsys.readouterr().err


def test_a_checkpoint_from_before_there_was_a_choice_goes_on_as_it_ran(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert here("sft", inputs, tmp_path / "run", "--stop_after 1", "--data.train_on last") == 0
    with edited_run(tmp_path / "run", 1) as run:
        del run["config"]["data"]["train_on"], run["config"]["data"]["fields"]
    assert here("sft", inputs, tmp_path / "run", "--resume auto") == 0
    assert caplog.text.count("is from before data.train_on") == 1
    assert "train_on: last" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_score_model_without_sdpa_is_checked_as_it_is_made(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from repo_fast.score import main

    path = save_other(tmp_path / "policy", BLOOM)
    assert here("reward", inputs, tmp_path / "out", f"--model.path {path}", "--epochs 1") == 0
    assert main(["--check", str(tmp_path / "out" / "model"), "--kind", "reward"]) == 0


def test_a_decoder_s_score_model_with_prefixed_names_is_one_line(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_sequence_classifier(tmp_path / "reward")
    weights = {f"module.{key}": value for key, value in load_file(path / "model.safetensors").items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    assert job.here(tmp_path / "out", f"--reward.path {path}") == 2
    assert "has no score head" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["~nosuchuser/x.jsonl", f"{'x' * 300}.jsonl"])
def test_a_source_that_cannot_be_a_file_is_one_line(
    name: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here("sft", inputs, tmp_path / "out", f"--data.train {name}") == 2
    assert "no such file" in capsys.readouterr().err.strip().splitlines()[-1]


def test_no_mapping_of_columns_is_one_line() -> None:
    with pytest.raises(InputError, match="data.fields is None, expected columns with a role each"):
        check_fields("data.fields", None)
