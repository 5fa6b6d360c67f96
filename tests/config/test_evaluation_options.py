"""Options of what is looked at while training: those that cannot be honoured are one line."""

import copy
from pathlib import Path

import pytest

from repo_fast.config import parse, to_dict
from repo_fast.config.evaluate import EvaluateConfig
from repo_fast.errors import InputError
from repo_fast.jobs import checkpoint

CONSTRAINTS = "constraints: {a: {path: 'm:f'}, b: {path: 'm:g'}}\nreward: {path: 'm:r'}\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--evaluation.every 0", "evaluation.every is 0, expected a whole number of at least 1"),
        (
            "--evaluation.every 5 --data.eval_prompts null",
            "evaluation.every is 5 with data.eval_prompts null, expected held-out prompts",
        ),
        (
            "--evaluation.second_reward.path m:f --data.eval_prompts null",
            "evaluation.second_reward.path is 'm:f' with data.eval_prompts null, expected held-out prompts",
        ),
        (
            "--evaluation.second_reward.path guard:x",
            "evaluation.second_reward.path is 'guard:x', expected no guard: what it gives is a cost, higher is worse",
        ),
        ("--evaluation.second_reward.head h", "evaluation.second_reward.path is '', expected a callable"),
        ("--evaluation.kl_bound 0", "evaluation.kl_bound is 0.0, expected a number above 0"),
        ("--total_steps 4 --evaluation.every 5", "evaluation.every is 5, expected at most total_steps (4)"),
        (
            "--evaluation.stop_on [multiplier] --algorithm.name ppo",
            "evaluation.stop_on has 'multiplier' with algorithm.name 'ppo' and no multiplier that is learned",
        ),
        ("--evaluation.stop_on [exploitation]", "evaluation.stop_on has 'exploitation' with evaluation.every null"),
        (
            "--evaluation.stop_on [exploitation] --evaluation.every 5 --evaluation.well_formed null",
            "evaluation.stop_on has 'exploitation' without evaluation.second_reward or evaluation.well_formed",
        ),
        ("--checkpoint.keep_best mean_reward", "checkpoint.keep_best is 'mean_reward' with evaluation.every null"),
        ("--evaluation.every 5 --checkpoint.keep_best kl", "checkpoint.keep_best is 'kl', expected one of mean_reward"),
        (
            "--evaluation.every 5 --checkpoint.keep_best mean_second_reward",
            "checkpoint.keep_best is 'mean_second_reward' without evaluation.second_reward, expected that, or another",
        ),
        (
            "--evaluation.every 5 --checkpoint.keep_best well_formed --evaluation.well_formed null",
            "checkpoint.keep_best is 'well_formed' without evaluation.well_formed, expected that, or another",
        ),
    ],
)
def test_what_cannot_be_honoured(options: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        parse(options.split(" "))
    assert said in str(error.value)


def test_a_rule_that_there_is_not() -> None:
    with pytest.raises(InputError, match="stop_on"):
        parse(["--evaluation.stop_on", "[collapse]"])


def test_what_several_constraints_can_be_chosen_by(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(CONSTRAINTS)
    words = ["--config", str(tmp_path / "job.yaml"), "--evaluation.every", "5", "--checkpoint.keep_best"]
    for measure in ("strict_violation", "b_strict_violation", "a_mean_cost", "safety_rate"):
        assert parse([*words, measure]).checkpoint.keep_best == measure
    for measure in ("mean_cost", "c_strict_violation"):
        with pytest.raises(InputError, match="expected one of mean_reward, .*, a_mean_cost"):
            parse([*words, measure])


def test_other_jobs_have_no_best_evaluation() -> None:
    from repo_fast.config import SftConfig

    for kind in (SftConfig, EvaluateConfig):
        with pytest.raises(InputError, match=r"unknown option 'checkpoint\.keep_best'"):
            parse(["--checkpoint.keep_best", "mean_reward"], kind)


def test_a_resume_may_change_what_is_looked_at_and_not_what_is_drawn(tmp_path: Path) -> None:
    config = to_dict(parse([]))
    then = copy.deepcopy(config)
    for key in ("every", "second_reward", "kl_bound", "stop_on"):
        # As checkpoints of before have it.
        del then["evaluation"][key]
    del then["checkpoint"]["keep_best"]
    checkpoint.check_run(tmp_path, {"ranks": 1, "config": then}, config)
    looked = ["--evaluation.every", "5", "--evaluation.stop_on", "[kl]", "--checkpoint.keep_best", "mean_reward"]
    checkpoint.check_run(tmp_path, {"ranks": 1, "config": config}, to_dict(parse(looked)))
    drawn = to_dict(parse(["--evaluation.second_reward.path", "m:f"]))
    with pytest.raises(InputError, match=r"evaluation\.second_reward\.path is '' there and 'm:f' here"):
        checkpoint.check_run(tmp_path, {"ranks": 1, "config": config}, drawn)


def test_the_best_checkpoint_is_not_pruned(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000009.partial").mkdir()
    checkpoint.remove_unfinished(tmp_path)
    checkpoint.prune(tmp_path, 2, best=4)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        f"step-{step:06d}" for step in (4, 6, 8)
    ]
    checkpoint.prune(tmp_path, 2, best=8)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000006", "step-000008"]
    checkpoint.prune(tmp_path, 0)
    assert len(checkpoint.checkpoints(tmp_path)) == 2
