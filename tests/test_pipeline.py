"""The pipeline: what each stage starts from, what is skipped, what is refused; and, slowly, that it works."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from repo_fast import pipeline
from repo_fast.report.metrics import read_metrics
from tests.job_runs import DEMONSTRATIONS, OPTIONS, PROMPTS, Job, snapshot, write_lines

PAIRS = [
    {
        "prompt": prompt,
        "response_0": "sorry no",
        "response_1": "you make tea with bread",
        "better_response_id": 1,
        "safer_response_id": i % 2,
        "is_response_0_safe": True,
        "is_response_1_safe": i % 2 == 1,
    }
    for i, prompt in enumerate(PROMPTS)
]


@pytest.fixture
def words(job: Job, tmp_path: Path) -> list[str]:
    """A command line whose stages take a few steps each on the tests' tiny policy."""
    demonstrations = write_lines(
        tmp_path / "demonstrations.jsonl", [{"prompt": text, "response": answer} for text, answer in DEMONSTRATIONS]
    )
    pairs, prompts = write_lines(tmp_path / "pairs.jsonl", PAIRS), job.folder / "prompts.jsonl"
    supervised = {"batch_size": 2, "epochs": 1, "log": {"loggers": []}}
    repo = {key: value for key, value in OPTIONS.items() if key not in ("reward", "cost")}
    repo |= {
        "total_steps": 2,
        "data": {"prompts": str(prompts), "eval_prompts": str(prompts), "max_prompt_tokens": 40},
        "algorithm": {"name": "repo", "advantage": "rloo"},
        "evaluation": {"samples_per_prompt": 2},
    }
    configs = {
        "sft": supervised | {"model": {"path": str(job.folder / "policy")}, "data": {"train": str(demonstrations)}},
        "reward": supervised | {"data": {"train": str(pairs), "eval": str(pairs)}},
        "cost": supervised | {"data": {"train": str(pairs), "eval": str(pairs)}},
        "repo": repo,
    }
    line = ["--output_dir", str(tmp_path / "out")]
    for stage, config in configs.items():
        path = tmp_path / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(config))
        line += [f"--{stage}.config", str(path)]
    return line


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stages run in this process; the command of each, from the module's name on."""
    commands: list[list[str]] = []

    def run(module: str, words: list[str], ranks: int, threads: int) -> int:
        commands.append([module, *words])
        return importlib.import_module(module).main(words)

    monkeypatch.setattr(pipeline, "run_ranks", run)
    return commands


def test_each_stage_starts_from_what_came_before_and_complete_ones_are_skipped(words, started, tmp_path, capsys):
    out = tmp_path / "out"
    assert pipeline.main(words) == 0
    assert [command[0] for command in started] == [
        "repo_fast.sft", "repo_fast.score", "repo_fast.score", "repo_fast.train"
    ]  # fmt: skip
    configs = {stage: yaml.safe_load((out / stage / "config.yaml").read_text()) for stage in ("reward", "cost", "repo")}
    assert configs["reward"]["model"]["path"] == configs["cost"]["model"]["path"] == str(out / "sft/policy")
    assert (configs["reward"]["kind"], configs["cost"]["kind"]) == ("reward", "cost")
    assert configs["repo"]["policy"]["path"] == str(out / "sft/policy")
    assert configs["repo"]["reward"]["path"] == str(out / "reward/model")
    assert configs["repo"]["cost"]["path"] == str(out / "cost/model")
    printed = capsys.readouterr().out
    assert printed.count("| mean reward") == 3  # the run's own table, then the two judgements
    learned, ruled = ((out / f"repo/before_after_{name}.txt").read_text() for name in ("learned", "rules"))
    # To the rules, prompts that are not of the world have reward 0 and cost -1; to the learned models they have not.
    least = r"\| mean cost +\| +-1\.000 "
    assert re.search(least, ruled) and not re.search(least, learned)

    before = snapshot(out)
    assert pipeline.main(words) == 0
    assert len(started) == 4
    assert capsys.readouterr().out.count("skipped") == 4
    assert snapshot(out) == before


def test_a_stopped_stage_goes_on_and_what_follows_waits(words, started, tmp_path, capsys):
    assert pipeline.main([*words, "--reward.stop_after", "1"]) == 1
    assert [command[0] for command in started] == ["repo_fast.sft", "repo_fast.score"]
    assert [row["step"] for row in read_metrics(tmp_path / "out/reward/metrics.jsonl")] == [1]
    assert pipeline.main(words) == 0
    assert [command[0] for command in started[2:]] == ["repo_fast.score", "repo_fast.score", "repo_fast.train"]
    assert [row["step"] for row in read_metrics(tmp_path / "out/reward/metrics.jsonl")] == [1, 2, 3]
    assert "stage reward: going on" in capsys.readouterr().out


def test_another_configuration_or_another_start_is_refused_and_nothing_is_lost(words, started, tmp_path, capsys):
    out = tmp_path / "out"
    assert pipeline.main([*words, "--cost.stop_after", "1"]) == 1
    before = snapshot(out)
    assert pipeline.main([*words, "--reward.epochs", "2"]) == 2
    assert "stage reward" in (error := capsys.readouterr().err) and "epochs 1, this command has 2" in error
    record = json.loads((out / "sft/pipeline.json").read_text())
    (out / "sft/pipeline.json").write_text(json.dumps(record | {"id": "another"}))
    assert pipeline.main(words) == 2
    assert "stage reward" in (error := capsys.readouterr().err) and "made from another sft" in error
    (out / "sft/pipeline.json").write_text(json.dumps(record, indent=1))
    assert snapshot(out) == before


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--foo", "1"], "unknown option '--foo'"),
        (["--sft.epoch", "1"], "the nearest valid name is 'epochs'"),
        (["--other.epochs", "1"], "--cost.option"),
        (["--ranks", "0"], "--ranks is 0"),
        (["--ranks", "two"], "invalid int value: 'two'"),
        (["--sft.output_dir", "elsewhere"], "'--sft.output_dir' is the pipeline's to choose"),
        (["--repo.data.eval_prompts", "null"], "--repo.data.eval_prompts is null"),
        (["word"], "unexpected word 'word'"),
    ],
)
def test_bad_options_are_one_line_before_anything_starts(option, expected, started, tmp_path, capsys):
    assert pipeline.main(["--output_dir", str(tmp_path / "out"), *option]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error and error.count("\n") == 1
    assert not started and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_stage_whose_result_is_gone_is_made_again(words, started, tmp_path):
    assert pipeline.main(words) == 0
    shutil.rmtree(tmp_path / "out/cost/model")
    assert pipeline.main(words) == 0
    assert [command[0] for command in started[4:]] == ["repo_fast.score"]
    assert (tmp_path / "out/cost/model/config.json").is_file()


def test_a_broken_record_and_another_number_of_ranks_are_refused(words, started, tmp_path, capsys):
    record = tmp_path / "out/sft/pipeline.json"
    assert pipeline.main([*words, "--sft.stop_after", "1"]) == 1
    assert pipeline.main([*words, "--ranks", "2"]) == 2
    assert "was started on 1 ranks, expected --ranks 1" in capsys.readouterr().err
    for content, said in (
        ("{", "is not JSON"),
        ("[]", "is not as the pipeline"),
        ('{"id": "a"}', "is not as the pipeline"),
    ):
        record.write_text(content)
        assert pipeline.main(words) == 2
        assert f"pipeline.json {said}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(words, started, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    at = words.index("--output_dir") + 1
    assert pipeline.main([*words[:at], str(tmp_path / "file/out"), *words[at + 1 :]]) == 2
    assert re.fullmatch(r"error: .*file/out.*\n", capsys.readouterr().err)
    assert started == []


@pytest.mark.parametrize("status", [5, 143])
def test_a_stage_that_ends_early_ends_the_pipeline_with_its_status(status, words, tmp_path, monkeypatch, capsys):
    """Also after a signal, which `run_ranks` has waited for: nothing else is started."""
    calls = []

    def run(module: str, words: list[str], ranks: int, threads: int) -> int:
        calls.append((module, ranks, threads))
        return status

    monkeypatch.setattr(pipeline, "run_ranks", run)
    assert pipeline.main([*words, "--ranks", "2"]) == status
    assert calls == [("repo_fast.sft", 2, 1)]
    assert f"stage sft ended with exit status {status}; the same command goes on from there" in capsys.readouterr().out


@pytest.mark.slow
def test_the_embedded_pipeline_makes_good_models_and_a_safer_policy(tmp_path):
    command = [sys.executable, "-m", "repo_fast.pipeline", "--output_dir", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert finished.returncode == 0, finished.stderr[-3000:]
    reward, cost = (read_metrics(tmp_path / stage / "metrics.jsonl")[-1] for stage in ("reward", "cost"))
    assert reward["ranking_accuracy"] >= 0.90
    assert cost["safety_accuracy"] >= 0.95
    for table in ("learned", "rules"):
        text = (tmp_path / f"repo/before_after_{table}.txt").read_text()
        (row,) = [line for line in text.splitlines() if "strict violation" in line]
        before, after = (float(cell.split()[0]) for cell in row.split("|")[2:4])
        assert after < before, table
