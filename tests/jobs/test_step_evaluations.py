"""Evaluations while training change none of its numbers, outlive a kill, and are what `repo_fast.evaluate` makes of the
same weights; the best policy is kept, and warnings are said and can end a run."""

import json
import shutil
from pathlib import Path

import pytest

from repo_fast.engine import start_distributed
from repo_fast.jobs import checkpoint
from repo_fast.jobs.step_evaluations import StepEvaluations
from repo_fast.jobs.training_prompts import read_record
from repo_fast.report.best import Best, read_best, write_best
from repo_fast.report.jsonl import read_records
from repo_fast.rollout.units import Unit
from tests import scorers
from tests.job_runs import Job, metrics, on_ranks, same_bits, snapshot, weights

# 5 prompts in blocks of 2, 2 responses each: 6 units.
UNITS = 6
SMALL = (
    *("--total_steps 4", "--evaluation.samples_per_prompt 2", "--rollout.batch_size 2", "--algorithm.advantage rloo"),
    *("--data.ptx null", "--algorithm.ptx_coefficient 0"),
)
EVERY = ("--evaluation.every 2", "--checkpoint.keep_best strict_violation")


def small(job: Job) -> tuple[str, ...]:
    return (*SMALL, f"--data.eval_prompts {job.folder / 'prompts.jsonl'}")


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps at once, evaluated after two and four."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    assert job.here(output_dir, *small(job), *EVERY, "--checkpoint.keep 1") == 0
    return output_dir


def rows(output_dir: Path) -> list[dict]:
    return list(read_records(output_dir / "evaluations.jsonl"))


def evaluated(output_dir: Path) -> dict[str, bytes]:
    """Everything that is written of evaluations and warnings."""
    found = snapshot(output_dir / "evaluations") | snapshot(output_dir / "best_policy")
    return found | {
        name: (output_dir / name).read_bytes() for name in ("evaluations.jsonl", "warnings.jsonl", "eval_after.jsonl")
    }


@pytest.mark.parametrize("before_and_after", [True, False])
def test_they_change_nothing(job: Job, whole: Path, tmp_path: Path, before_and_after: bool) -> None:
    """With a reward that draws from Python's and numpy's random states."""
    assert job.here(tmp_path / "run", *(small(job) if before_and_after else SMALL)) == 0
    assert metrics(tmp_path / "run") == metrics(whole)
    assert same_bits(weights(tmp_path / "run"), weights(whole))
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()
    assert (tmp_path / "run" / "eval_before.jsonl").exists() == before_and_after


def test_what_is_written(whole: Path) -> None:
    assert [row["step"] for row in rows(whole)] == [0, 2, 4]
    assert all("interference_rate" in row and "mean_reward_error" in row for row in rows(whole))
    assert sorted(snapshot(whole / "evaluations")) == ["step-000002.jsonl", "step-000004.jsonl"]
    for row in rows(whole)[1:]:
        responses = list(read_records(whole / "evaluations" / f"step-{row['step']:06d}.jsonl"))
        assert len(responses) == 10 and {response["step"] for response in responses} == {row["step"]}
        assert row["mean_reward"] == pytest.approx(sum(response["reward"] for response in responses) / 10)
        assert row["kl"] == pytest.approx(sum(response["kl"] for response in responses) / 10)
    assert (whole / "plots" / "evaluations.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def unsafe(job: Job, tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """Three steps of four, each evaluated, all as unsafe: the first is the best. The run, and its options."""
    words = (*small(job), "--cost.path tests.scorers:always_unsafe", "--checkpoint.every 1", "--checkpoint.keep 1")
    evaluated = ("--evaluation.every 1", "--checkpoint.keep_best strict_violation")
    assert job.here(tmp_path / "run", *words, *evaluated, "--stop_after 3") == 0
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["step-000001", "step-000003"]
    return tmp_path / "run", (*words, "--resume auto")


def test_a_better_policy_is_not_lost_to_other_steps_of_evaluation(job: Job, unsafe: tuple, capsys) -> None:
    """The checkpoint of a step does not know its evaluation."""
    run, words = unsafe
    found = rows(run)
    found[-1]["strict_violation"] = 0.25
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    write_best(run / "best_policy", Best(3, "strict_violation", 0.25, 1.0))
    before = snapshot(run / "best_policy")
    capsys.readouterr()
    assert job.here(run, *words, "--evaluation.every 4", "--checkpoint.keep_best strict_violation") == 0
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3, 4]
    assert snapshot(run / "best_policy") == before
    said = " ".join(capsys.readouterr().out.split())
    # Speed is that of this start alone.
    assert "has no policy" not in said
    assert "Medians of 1 steps" in said


def test_the_best_by_another_measure_is_looked_for_before_checkpoints_go(job: Job, unsafe: tuple, capsys) -> None:
    run, words = unsafe
    capsys.readouterr()
    options = ("--evaluation.every 1", "--checkpoint.keep_best mean_cost", "--stop_after 3")
    assert job.here(run, *words, *options) == 0
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step-000001", "step-000003"]
    assert read_best(run / "best_policy") == Best(1, "mean_cost", 1.0, 1.0)
    assert "has no policy" not in capsys.readouterr().out


def test_the_best_policy_and_its_checkpoint_are_kept(whole: Path) -> None:
    best = min(rows(whole)[1:], key=lambda row: row["strict_violation"])
    about = json.loads((whole / "best_policy" / "best_evaluation.json").read_text())
    assert (about["step"], about["measure"], about["value"]) == (
        best["step"],
        "strict_violation",
        best["strict_violation"],
    )
    assert about["value_at_start"] == rows(whole)[0]["strict_violation"]
    # keep 1.
    kept = {f"step-{step:06d}" for step in (best["step"], 4)}
    assert {path.name for path in checkpoint.checkpoints(whole)} == kept
    assert read_record(str(whole / "best_policy")) == read_record(str(whole / "policy")) is not None


def test_killed_while_evaluating(job: Job, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No unit is drawn twice, and nothing differs from a run that was not killed."""

    # Twice before, two steps, three units.
    def killed(call: int) -> None:
        if call == 8:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    monkeypatch.setattr(scorers, "at_call", killed)
    with pytest.raises(KeyboardInterrupt):
        job.here(run, *small(job), *EVERY, "--checkpoint.keep 1")
    partial = run / "evaluations" / "step-000002.partial.jsonl"
    assert [row["step"] for row in read_records(partial)] == [0, 0, 1, 1, 2]
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step-000002"]
    # Torn in the middle of the next unit.
    with open(partial, "a") as file:
        file.write('{"step": 3, "prompt_id": 0}\n{"step": 3, "prom')

    monkeypatch.setattr(scorers, "at_call", lambda call: None)
    monkeypatch.setattr(scorers, "calls", 0)
    assert job.here(run, *small(job), *EVERY, "--checkpoint.keep 1", "--resume auto") == 0
    # The rest of step 2, steps 3 and 4, the evaluation of step 4, and after.
    assert scorers.calls == UNITS - 3 + 2 + UNITS + 1
    assert metrics(run) == metrics(whole)
    assert same_bits(weights(run), weights(whole))
    assert evaluated(run) == evaluated(whole)


def test_a_resume_from_before_takes_nothing_of_what_came_after(job: Job, whole: Path, tmp_path: Path) -> None:
    """A later evaluation, units, and a better policy, all of weights that this run has not."""
    run = tmp_path / "run"
    assert job.here(run, *small(job), *EVERY, "--stop_after 3") == 0
    shutil.rmtree(run / "checkpoints" / "step-000003")
    later = {"step": 4, "strict_violation": -1.0}
    with open(run / "evaluations.jsonl", "a") as file:
        file.write(json.dumps(later) + "\n")
    (run / "evaluations" / "step-000004.partial.jsonl").write_text('{"step": 0, "response": "of other weights"}\n')
    about = {"step": 4, "measure": "strict_violation", "value": -1.0}
    (run / "best_policy" / "best_evaluation.json").write_text(json.dumps(about))
    (run / "best_policy" / "model.safetensors").write_bytes(b"of other weights")
    assert job.here(run, *small(job), *EVERY, "--resume auto") == 0
    assert metrics(run) == metrics(whole)
    assert evaluated(run) == evaluated(whole)
    assert (run / "best_policy-before-resume" / "model.safetensors").read_bytes() == b"of other weights"


def test_the_last_step_is_evaluated_and_a_measure_may_be_chosen_late(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was evaluated before counts: its best has no policy, and is said."""
    run, options = tmp_path / "run", (*SMALL[1:], *small(job)[-1:], "--total_steps 3", "--evaluation.every 2")
    assert job.here(run, *options, "--stop_after 2") == 0
    (run / "evaluations.jsonl").write_text(
        "".join(json.dumps(row | {"mean_reward": 100.0 if row["step"] else 1.0}) + "\n" for row in rows(run))
    )
    capsys.readouterr()
    assert job.here(run, *options, "--resume auto", "--checkpoint.keep_best mean_reward", "--stop_after 2") == 0
    best = json.loads((run / "best_policy" / "best_evaluation.json").read_text())
    assert (best["step"], best["value"]) == (2, 100.0) and best["value_at_start"] < 100
    assert job.here(run, *options, "--resume auto", "--checkpoint.keep_best mean_reward") == 0
    assert [row["step"] for row in rows(run)] == [0, 2, 3]
    assert json.loads((run / "best_policy" / "best_evaluation.json").read_text()) == best
    assert "best policy so far: mean_reward 100 at step 2 (at the start" in capsys.readouterr().out


def test_units_of_before_the_data_changed_are_drawn_anew(job: Job, tmp_path: Path) -> None:
    units = [Unit(0, [], 0)]
    for keep in (True, False):
        partial = tmp_path / str(keep) / "evaluations" / "step-000002.partial.jsonl"
        partial.parent.mkdir(parents=True)
        partial.write_text("{}\n")
        StepEvaluations(tmp_path / str(keep), units, start_distributed(), 2, keep_units=keep).close()
        assert partial.exists() == keep


def test_an_evaluation_of_the_best_policy_draws_the_same(job: Job, tmp_path: Path) -> None:
    from repo_fast.evaluate import main

    scored = ("--reward.path", "repo_fast.scoring.refusals:refusal", "--cost.path", "tests.scorers:cost")
    run, prompts = tmp_path / "run", str(job.folder / "prompts.jsonl")
    by = [" ".join(scored[:2]), *EVERY, "--seed 3", "--total_steps 2", "--policy_optimizer.learning_rate 0.01"]
    assert job.here(run, *small(job), *by) == 0
    words = ["--policy", f"best={run / 'best_policy'}", "--prompts", prompts, "--seed", "3", *scored]
    words += ["--samples_per_prompt", "2", "--sampling.max_new_tokens", "8", "--sampling.batch_size", "2"]
    assert main([*words, "--output_dir", str(tmp_path / "evaluation")]) == 0
    lines = (tmp_path / "evaluation" / "samples.jsonl").read_text().splitlines()
    again = [row for row in map(json.loads, lines) if row["sample"] < 2]
    keys = ("prompt_id", "prompt", "response", "reward", "cost", "response_length")
    ours = list(read_records(run / "evaluations" / "step-000002.jsonl"))
    assert len({row["response"] for row in ours}) > 5
    assert [[row[key] for key in keys] for row in again] == [[row[key] for key in keys] for row in ours]


def test_a_reward_that_rises_at_the_expense_of_another_ends_the_run(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = (
        *("--reward.path tests.scorers:rising", "--evaluation.second_reward.path tests.scorers:falling"),
        *("--evaluation.every 2", "--evaluation.stop_on [exploitation]", "--checkpoint.every 0"),
    )
    assert job.here(run, *small(job), *options) == 5
    said = capsys.readouterr().out
    assert "warning (exploitation) at step 2: mean_reward from" in said
    assert "stopped after step 2 of 4 by the warning 'exploitation'; go on with --resume auto, without it in" in said
    warned = list(read_records(run / "warnings.jsonl"))
    assert [(row["step"], row["rule"], row["about"]) for row in warned] == [(2, "exploitation", "mean_second_reward")]
    assert warned[0]["mean_second_reward"] < warned[0]["mean_second_reward_at_start"]
    assert not (run / "policy").exists()
    assert {"evaluations.png", "safety.png"} <= {path.name for path in (run / "plots").iterdir()}
    assert "second_reward" in next(read_records(run / "eval_before.jsonl"))


def test_a_constraint_that_cannot_be_met_is_warned_of_and_the_run_goes_on_when_asked(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = (
        *("--cost.path tests.scorers:always_unsafe", "--algorithm.multiplier_max 1", "--total_steps 17"),
        *("--evaluation.kl_bound 1e-9", "--checkpoint.every 0", "--data.eval_prompts null"),
    )
    assert job.here(run, *SMALL[1:], *options, "--evaluation.stop_on [multiplier]") == 5
    assert [row["step"] for row in metrics(run)] == list(range(1, 16))
    warned = (run / "warnings.jsonl").read_bytes()
    rules = [(row["step"], row["rule"]) for row in read_records(run / "warnings.jsonl")]
    assert rules[-1] == (15, "multiplier") and "kl" in {rule for _, rule in rules}
    # Said once each time that it begins.
    assert len(rules) == len(set(rules)) < 15
    # Asked to stop by it, it does not go on by itself.
    assert job.here(run, *SMALL[1:], *options, "--evaluation.stop_on [multiplier]", "--resume auto") == 5
    assert len(metrics(run)) == 15 and (run / "warnings.jsonl").read_bytes() == warned
    assert "lambda at its maximum" in capsys.readouterr().out
    assert job.here(run, *SMALL[1:], *options, "--resume auto") == 0
    assert len(metrics(run)) == 17
    assert [row["rule"] for row in read_records(run / "warnings.jsonl")].count("multiplier") == 1


def frozen_run(folder: Path) -> int:
    """On each rank of a torchrun: two steps that move no weight, for ranks differ in the last bits of what is learned.

    Args:
        folder: Holds the job.
    """
    job = Job(folder)
    still = ("--policy_optimizer.learning_rate 0", "--policy_optimizer.weight_decay 0")
    return job.here(folder / "run", *small(job), *EVERY, *still, "--total_steps 2")


@pytest.mark.slow
def test_two_ranks_draw_and_score_what_one_does(job: Job, tmp_path: Path) -> None:
    for name, ranks in (("one", 1), ("two", 2)):
        shutil.copytree(job.folder, tmp_path / name)
        assert on_ranks(ranks, "tests.jobs.test_step_evaluations:frozen_run", tmp_path / name) == [0] * ranks
    files = [tmp_path / name / "run" / "evaluations" / "step-000002.jsonl" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # Another sample of the start has as much interference by chance.
    assert rows(tmp_path / "one" / "run")[1]["mean_reward"] == rows(tmp_path / "two" / "run")[1]["mean_reward"]
