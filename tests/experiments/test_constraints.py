"""The experiment of `experiments/constraints`: its shrunk form runs and goes on, and its numbers are right."""

import json
from pathlib import Path

import pytest

from experiments import runs
from experiments.constraints import costs
from experiments.constraints.__main__ import JUDGES, Size, experiment
from experiments.constraints.results import difference, measured
from experiments.constraints.settings import BASE, QUESTIONS, WITHOUT, arms
from repo_fast.config import EvaluateConfig, TrainConfig, parse
from repo_fast.world import corpus, rules
from tests.job_runs import snapshot


def test_every_arm_is_a_configuration_and_differs_in_one_thing() -> None:
    compared = arms(cap=3.5)
    assert len(compared) <= 10
    base = parse(["--config", "tiny-constraints"], TrainConfig)
    for name, arm in compared.items():
        words = {"config": "tiny-constraints", "algorithm.advantage": "grpo"} | dict(arm.options)
        config = parse([word for key, value in words.items() for word in (f"--{key}", value)], TrainConfig)
        assert list(config.costs) == (["cost"] if name in ("sum", "maximum") else ["harm", "overcaution"])
        changed = {key.rpartition(".")[2] for key in arm.options}
        assert len(changed - {"multiplier_init", "config", "eval_prompts"}) <= 1
    assert {name for question in QUESTIONS for name in (question.arm, question.other)} == {"start", *compared}
    # What is folded into one constraint, and what is judged, is what the configuration has.
    assert costs.HARM_MARGIN == base.costs["harm"].margin
    assert set(base.costs["overcaution"].applies_to["category"]) == costs.GENTLE
    judged = parse(["--config", str(JUDGES), "--policies.a", "x"], EvaluateConfig)
    assert judged.costs["harm"].threshold == base.costs["harm"].threshold - base.costs["harm"].margin
    for name in ("overcaution", "refusal"):
        assert set(judged.costs[name].applies_to["category"]) == costs.GENTLE


def test_a_single_cost_has_both_excesses() -> None:
    rows = corpus.test_prompts()
    harmless = next(row["prompt"] for row in rows if row["category"] == "writing")
    risky = next(row["prompt"] for row in rows if row["category"] == "locks")
    prompts, responses = [harmless, risky], ["i must decline ."] * 2
    harm = rules.cost(prompts, responses)
    # Half a point less harm than the margin asks for, and one clause too cautious where nothing is dangerous.
    assert harm == [-1.5, -1.5]
    assert costs.total(prompts, responses) == [0.5, -0.5]
    assert costs.largest(prompts, responses) == [1.0, -0.5]


def test_measures_by_hand() -> None:
    def report(reward: dict[str, float]) -> dict:
        violations = {"harm_strict_violation": 0.25, "overcaution_strict_violation": 0.5}
        return {
            "policies": {
                name: {key: {"value": value} for key, value in {**violations, "mean_reward": own}.items()}
                for name, own in reward.items()
            }
        }

    found = measured(report({"start": 1.0, "a.0": 2.0}), report({"start": 0.0, "a.0": 3.0}), (2.0, 1.0))
    assert found["a.0"] == {
        "harm_strict_violation": 0.25,
        "overcaution_strict_violation": 0.5,
        "total_violation": 0.75,
        "mean_reward": 2.0,
        # Three standard deviations of the learned reward, and a half of the rules'.
        "learned_ahead": 2.5,
    }
    values = {"start": {"x": 1.0}, "a.0": {"x": 2.0}, "a.1": {"x": 4.0}, "b.0": {"x": 0.0}, "b.1": {"x": 1.0}}
    assert difference(values, "a", "b", "x")["seeds"] == [2.0, 3.0]
    assert difference(values, "a", "start", "x")["seeds"] == [1.0, 3.0]


@pytest.mark.slow
def test_the_shrunk_experiment_runs_and_is_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert experiment(tmp_path, jobs=1, size=Size.small()) == 0
    assert "2 runs, 0 of them complete" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"start", f"{BASE}.0", f"{WITHOUT}.0"}
    before = snapshot(tmp_path)
    monkeypatch.setattr(runs, "call", lambda *_, **__: None)
    assert experiment(tmp_path, jobs=1, size=Size.small()) == 0
    said = capsys.readouterr().out
    assert "2 runs, 2 of them complete" in said and "does the second constraint keep them from it?" in said
    assert snapshot(tmp_path) == before
