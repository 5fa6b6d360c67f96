"""The date that a chat template writes is that of the run's start, wherever and whenever the run goes on."""

import datetime
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from repo_fast.config import EvaluateConfig, SftConfig, parse
from repo_fast.errors import InputError
from repo_fast.evaluate import main as evaluate
from repo_fast.jobs import run_date
from repo_fast.sft import main as sft
from repo_fast.train import main as train
from tests.families import FAMILIES, family_tokenizer
from tests.job_runs import edited_run, snapshot, write_lines
from tests.tiny import save_beaver, save_policy

START, LATER = "2024-07-26", "2024-07-27"


class Clock(datetime.date):
    """A calendar that tests turn."""

    day = START

    @classmethod
    def today(cls) -> datetime.date:
        return datetime.date.fromisoformat(cls.day)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(run_date.datetime, "date", Clock)
    monkeypatch.setattr(Clock, "day", START)
    return Clock


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dated` and `plain`, policies whose chat template writes the date or not; `cost`; prompts and demonstrations."""
    folder = tmp_path_factory.mktemp("dates")
    for name, family in (("dated", "llama-3"), ("plain", "chatml")):
        save_policy(folder / name, family_tokenizer(FAMILIES[family]))
    cost = {"score_type": "cost"}
    save_beaver(folder / "cost", tokenizer=family_tokenizer(FAMILIES["llama-3"]), config_overrides=cost)
    write_lines(folder / "prompts.jsonl", [{"prompt": "How?"}, {"prompt": "Why?"}])
    write_lines(folder / "shown.jsonl", [{"prompt": text, "response": "So."} for text in ("How?", "Why?", "Who?")])
    return folder


def sft_words(folder: Path, output_dir: Path, *words: str) -> list[str]:
    options = [
        "--model.path",
        str(folder / "dated"),
        "--data.train",
        str(folder / "shown.jsonl"),
        "--data.eval",
        "null",
    ]
    options += ["--batch_size", "1", "--epochs", "1", "--log.loggers", "[]", "--output_dir", str(output_dir)]
    return [*options, *words]


def kept(output_dir: Path, name: str = "config.yaml") -> str:
    return yaml.safe_load((output_dir / name).read_text())["date"]


def losses(output_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_has_the_date_of_its_start(folder: Path, tmp_path: Path, clock: type[Clock], capsys) -> None:
    assert sft(sft_words(folder, tmp_path / "whole")) == 0
    assert kept(tmp_path / "whole") == START
    assert sft(sft_words(folder, tmp_path / "run", "--stop_after", "1")) == 0
    clock.day = LATER
    other = Path(shutil.copytree(tmp_path / "run", tmp_path / "other"))
    assert sft(sft_words(folder, tmp_path / "run", "--resume", "auto")) == 0
    assert kept(tmp_path / "run") == START and losses(tmp_path / "run") == losses(tmp_path / "whole")
    # Another day is another configuration.
    before = snapshot(other)
    capsys.readouterr()
    assert sft(sft_words(folder, other, "--resume", "auto", "--date", LATER)) == 2
    assert f"another configuration: date is '{START}' there and '{LATER}' here" in capsys.readouterr().err
    assert snapshot(other) == before
    # It does matter.
    assert sft(sft_words(folder, tmp_path / "later")) == 0
    assert kept(tmp_path / "later") == LATER and losses(tmp_path / "later") != losses(tmp_path / "whole")


def test_a_checkpoint_from_before_dates_goes_on(folder: Path, tmp_path: Path, clock: type[Clock], caplog) -> None:
    assert sft(sft_words(folder, tmp_path / "run", "--stop_after", "1")) == 0
    with edited_run(tmp_path / "run", 1) as run:
        del run["config"]["date"]
    clock.day = LATER
    assert sft(sft_words(folder, tmp_path / "run", "--resume", "auto")) == 0
    assert caplog.text.count("is from before dates were kept") == 1
    assert kept(tmp_path / "run") == LATER


def test_policy_and_score_model_of_a_run_have_its_date(
    folder: Path, tmp_path: Path, clock: type[Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    from repo_fast.scoring import ModelScorer

    read = []
    forward = ModelScorer._forward
    monkeypatch.setattr(ModelScorer, "_forward", lambda self, row: read.extend(row) or forward(self, row))
    words = ["--policy.path", str(folder / "dated"), "--reward.path", "tests.scorers:reward"]
    words += ["--cost.path", str(folder / "cost"), "--data.prompts", str(folder / "prompts.jsonl")]
    words += ["--data.eval_prompts", "null", "--evaluation.well_formed", "null", "--total_steps", "1"]
    words += ["--rollout.prompts_per_step", "2", "--rollout.max_new_tokens", "3", "--log.loggers", "[]"]
    assert train([*words, "--date", "2020-02-29", "--output_dir", str(tmp_path / "run")]) == 0
    tokenizer = family_tokenizer(FAMILIES["llama-3"])
    texts = [tokenizer.decode(tokens) for tokens in read]
    assert texts and all("Today Date: 29 Feb 2020\n" in text for text in texts)


def test_an_evaluation_has_the_date_of_the_earlier_one(folder: Path, tmp_path: Path, clock: type[Clock]) -> None:
    """And its samples are found again; those of another date are others, where a template writes it."""

    def run(output_dir: Path, *words: str) -> set[str]:
        options = [word for name in ("dated", "plain") for word in ("--policy", f"{name}={folder / name}")]
        options += [
            "--prompts",
            str(folder / "prompts.jsonl"),
            "--reward.path",
            "tests.evaluation.test_evaluate:reward",
        ]
        options += ["--cost.path", str(folder / "cost"), "--samples_per_prompt", "1", "--resamples", "20"]
        options += ["--sampling.max_new_tokens", "3", "--output_dir", str(output_dir), *words]
        assert evaluate(options) == 0
        cache = tmp_path / "one" / "cache"
        return {str(path.relative_to(cache)) for path in cache.rglob("*.jsonl")}

    first = run(tmp_path / "one")
    # Of each policy samples, rewards and costs.
    assert len(first) == 6 and kept(tmp_path / "one", "evaluation.yaml") == START
    clock.day = LATER
    assert run(tmp_path / "one") == first and kept(tmp_path / "one", "evaluation.yaml") == START
    later = run(tmp_path / "two", "--cache_dir", str(tmp_path / "one" / "cache"))
    # Of `plain` the costs alone, whose model reads the date.
    assert len(later - first) == 4 and first < later
    given = run(tmp_path / "three", "--cache_dir", str(tmp_path / "one" / "cache"), "--date", START)
    assert given == later


@pytest.mark.parametrize("text", ["today", "20240726", "2024-02-30", "2024-7-26", "2024-W30-5"])
def test_a_date_is_a_day(text: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"date is '{text}', expected a day as YYYY-MM-DD")):
        parse(["--date", text], SftConfig)


def test_a_date_in_yaml_needs_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"date: {START}\n")
    assert parse(["--config", str(tmp_path / "own.yaml")], SftConfig).date == START


def test_a_file_of_an_earlier_evaluation_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "evaluation.yaml").write_text("a: [\n")
    words = ["--policies", '{"a": "b"}', "--output_dir", str(tmp_path), "--reward.path", "a:b", "--cost.path", "a:b"]
    with pytest.raises(InputError, match="evaluation.yaml is not valid YAML"):
        run_date.with_date(parse(words, EvaluateConfig))
