"""Bad input ends a run with one line that says what is wrong, status 2, and nothing written."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from repo_fast import evaluate, score, sft
from repo_fast.errors import InputError
from repo_fast.jobs.launch import guarded
from repo_fast.ops import dispatch
from repo_fast.train import main
from tests.job_runs import PROMPTS, Job, metrics, write_lines
from tests.tiny import save_policy, save_sequence_classifier, word_tokenizer


def assert_refused(
    job: Job, output_dir: Path, capsys: pytest.CaptureFixture, message: str, *options: str, starts: bool = False
) -> None:
    """One line on stderr, status 2; and no output folder, unless the run can only find out in its first step."""
    capsys.readouterr()
    assert job.here(output_dir, *options) == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
    if starts:
        assert metrics(output_dir) == []
        assert not (output_dir / "policy").exists()
    else:
        assert not output_dir.exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--rollout.temprature 1",
            r"unknown option 'rollout\.temprature' .* nearest valid name is 'rollout\.temperature'",
        ),
        ("--total_steps zero", r"total_steps"),
        ("--profile 7", r"profile is 7, expected a step of the run, at most total_steps \(6\)"),
        ("--rollout.top_p 0", r"rollout\.top_p is 0\.0, expected a number in \(0, 1\]"),
        ("--data.prompts nowhere.jsonl", r"nowhere\.jsonl: no such file"),
        ("--data.ptx nowhere.jsonl", r"nowhere\.jsonl: no such file"),
        ("--data.max_prompt_tokens 3", r"all 5 prompts are longer than the limit of 3 tokens .* the shortest has \d"),
        (
            "--rollout.prompts_per_step 6",
            r"rollout\.prompts_per_step is 6, expected at most the 5 prompts of .*prompts",
        ),
        ("--update.ptx_batch_size 5", r"has 4 demonstrations .* expected at least update\.ptx_batch_size \(5\)"),
        *(
            (f"--policy.path {path}", f"'{path}' is neither the folder of a model nor a hub name")
            for path in ("./nowhere", "no/where/at/all", "/no/where", "~/no/where", "world:tinny", "tests/no_model")
        ),
        ("--reward.path tests.nowhere:reward", r"the reward function .*: module 'tests\.nowhere' cannot be imported"),
        ("--cost.path tests.scorers:nowhere", r"module 'tests\.scorers' has no function 'nowhere'"),
        ("--cost.path tests.scorers:not_a_function", r"module 'tests\.scorers' has no function 'not_a_function'"),
        ("--reward.path ./nowhere", r"reward.*'\./nowhere'"),
    ],
)
def test_refused_before_anything_is_written(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture, option: str, message: str
) -> None:
    assert_refused(job, tmp_path / "run", capsys, message, option)


def test_whatever_the_value_it_is_one_line_that_can_be_read(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    message = r"no\\nwhere\.jsonl: no such file"
    assert_refused(job, tmp_path / "run", capsys, message, "--data.prompts no\nwhere.jsonl")
    message = r"engine\.dtype.{500,900} … x{200,300}', expected one of auto, float32, bfloat16"
    assert_refused(job, tmp_path / "run", capsys, message, f"--engine.dtype {'x' * 100_000}")


def test_whose_values_a_command_line_without_a_configuration_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "repo_fast")
    words = ["--output_dir", str(tmp_path / "run"), "--data.prompts", "nowhere.jsonl"]
    said = "no --config is given: all that the command line does not say is as in 'tiny'"
    assert main(words) == 2 and said in caplog.text
    caplog.clear()
    assert main([*words, "--config=tiny"]) == 2 and said not in caplog.text


def test_a_configuration_of_another_job(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = job.folder / "job.yaml"
    for other, name in ((evaluate.main, "evaluate"), (sft.main, "sft"), (score.main, "score")):
        assert other(["--config", str(given), "--output_dir", str(tmp_path / "run")]) == 2
        expected = f"{given} is a configuration of `repo-fast train`, expected one of `repo-fast {name}`"
        assert capsys.readouterr().err == f"error: {expected}\n"
    # What is of no job is told by its nearest name.
    (tmp_path / "mine.yaml").write_text("polcy: {path: world:tiny}")
    assert main(["--config", str(tmp_path / "mine.yaml")]) == 2
    assert "unknown option 'polcy'" in capsys.readouterr().err


@pytest.mark.parametrize("earlier", [[], ["--config", "tiny"]], ids=["alone", "after another"])
def test_an_unknown_configuration(tmp_path: Path, capsys: pytest.CaptureFixture, earlier: list[str]) -> None:
    assert main([*earlier, "--config", "nowhere.yaml", "--output_dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: --config 'nowhere\.yaml' is neither a file nor .*: .*tiny, tiny-constraints\n", said)


def test_a_backend_that_cannot_run_here(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    message = r"engine\.ops_backend is 'triton': .*needs tensors on a CUDA or ROCm GPU, got tensors on cpu"
    assert_refused(job, tmp_path / "run", capsys, message, "--engine.ops_backend triton")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"prompts\.jsonl: empty, expected at least one prompt"),
        ("\n\n", r"prompts\.jsonl: empty, expected at least one prompt"),
        ('{"prompt": "tea"}\n\n{"prompt": \n', r"prompts\.jsonl line 3: malformed JSON"),
        ('{"prompt": "tea"}\n{"words": "tea"}\n', r"prompts\.jsonl line 2: no prompt field: found words"),
    ],
)
def test_malformed_prompts(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture, content: str, message: str) -> None:
    (tmp_path / "prompts.jsonl").write_text(content)
    assert_refused(job, tmp_path / "run", capsys, message, f"--data.prompts {tmp_path / 'prompts.jsonl'}")


def test_prompts_that_are_too_long_are_dropped_and_counted(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"prompt": text} for text in [*PROMPTS, "bread " * 60, "tea " * 60]]
    path = write_lines(tmp_path / "prompts.jsonl", rows)
    assert job.here(tmp_path / "run", f"--data.prompts {path}", "--total_steps 1") == 0
    assert f"{path}: 2 prompts dropped, longer than 40 tokens" in capsys.readouterr().out


def test_a_tokenizer_without_pad_token_works(job: Job, tmp_path: Path) -> None:
    save_policy(tmp_path / "policy", word_tokenizer(pad_token=None))
    assert job.here(tmp_path / "run", f"--policy.path {tmp_path / 'policy'}", "--total_steps 1") == 0
    assert len(metrics(tmp_path / "run")) == 1


def test_a_tokenizer_without_end_token(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = word_tokenizer(chat_template=False)
    tokenizer.eos_token = None
    save_policy(tmp_path / "policy", tokenizer)
    message = r"tokenizer of '.*policy' has no eos_token, expected one"
    assert_refused(job, tmp_path / "run", capsys, message, f"--policy.path {tmp_path / 'policy'}")


def test_a_tokenizer_with_more_tokens_than_the_model(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_policy(tmp_path / "policy", vocab=len(word_tokenizer()) - 1)
    message = r"tokenizer of '.*policy' has token id (\d+), expected ids below .* \1"
    assert_refused(job, tmp_path / "run", capsys, message, f"--policy.path {tmp_path / 'policy'}")


def test_a_score_model_of_unknown_architecture(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_sequence_classifier(tmp_path / "score")
    config = json.loads((tmp_path / "score" / "config.json").read_text())
    config |= {"model_type": "abacus", "architectures": ["AbacusForScore"]}
    (tmp_path / "score" / "config.json").write_text(json.dumps(config))
    assert_refused(job, tmp_path / "run", capsys, r"'.*score' .*abacus", f"--cost.path {tmp_path / 'score'}")


def test_a_score_model_without_a_score_head(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_policy(tmp_path / "score")
    assert_refused(
        job, tmp_path / "run", capsys, r"'.*score' .*'LlamaForCausalLM'", f"--reward.path {tmp_path / 'score'}"
    )


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("raises", r"the reward function 'tests\.scorers:raises' raised KeyError: 'no such word'"),
        ("returns_nan", r"returned nan for response 0, expected a finite number, at .* in size; the prompt begins '"),
        ("returns_too_few", r"returned 5 scores for 6 responses"),
        ("returns_a_number", r"returned a float, expected a list of 6 numbers"),
    ],
)
def test_a_scorer_that_is_wrong(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture, scorer: str, message: str
) -> None:
    assert_refused(job, tmp_path / "run", capsys, message, f"--reward.path tests.scorers:{scorer}", starts=True)


def test_losses_that_stay_not_finite_stop_the_run(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Rewards so large that gradients overflow: two skipped steps of the first rollout, one of the second."""
    options = ("--reward.path tests.scorers:huge", "--algorithm.score_clamp 3e38", "--update.max_skipped_steps 3")
    # Nothing is divided by the number of responses.
    options += ("--algorithm.reduction sum",)
    capsys.readouterr()
    assert job.here(tmp_path / "run", *options, "--checkpoint.every 1") == 2
    said = capsys.readouterr()
    assert re.fullmatch(
        r"error: 3 optimizer steps in a row had a non-finite loss or gradient, .*max_skipped_steps \(3\).*\n", said.err
    )
    assert "step 1: a loss or gradient was not finite" in said.out
    rows = metrics(tmp_path / "run")
    assert [(row["steps_skipped"], row["skipped_steps"]) for row in rows] == [(2, 2)]
    # A resumed run must remember them.
    run_state = json.loads((tmp_path / "run" / "checkpoints" / "step-000001" / "run.json").read_text())
    assert run_state["state"]["learner"]["skipped"] == [2, 2]


# ------------------------------------------------------------------------------------------------- through torchrun


def said_once(ended: subprocess.CompletedProcess, message: str) -> None:
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, ended.stderr
    assert re.fullmatch(rf"error: .*{message}.*", said[0])


def test_torchrun_with_an_unknown_key(job: Job, tmp_path: Path) -> None:
    said_once(job.torchrun(2, tmp_path / "run", "--rollouts.top_p 1"), r"unknown option 'rollouts\.top_p'")
    assert not (tmp_path / "run").exists()


def test_torchrun_with_a_scorer_that_raises_on_one_rank(job: Job, tmp_path: Path) -> None:
    """The other rank does not wait for it, and the first one says what happened although it did not happen there."""
    ended = job.torchrun(2, tmp_path / "run", "--cost.path tests.scorers:raises_on_rank_1_at_step_2")
    said_once(ended, r"raised OSError: the moderation service said 503")
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")],
)
def test_a_rank_without_memory_says_which_it_is(
    error: Exception, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> int:
        error.add_note("in the phase 'update' after step 2")
        raise error

    monkeypatch.setenv("RANK", "1")
    assert guarded(run) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: rank 1 ran out of memory, in the phase 'update' after step 2: .*\n", said)


def test_an_error_is_one_line_that_a_terminal_does_nothing_at(capsys: pytest.CaptureFixture) -> None:
    def run() -> int:
        raise InputError("a\x1b[31m\x9b2J\rfile\nthat is not there")

    assert guarded(run) == 2
    assert capsys.readouterr().err == r"error: a\x1b[31m\x9b2J\rfile\nthat is not there" + "\n"
