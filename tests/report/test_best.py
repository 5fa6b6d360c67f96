"""Which evaluation is the best."""

import math

import pytest

from repo_fast.report.best import Best, better, constraint_of, measures_to_keep, value_of

ROW = {"step": 20, "mean_reward": 2.0, "strict_violation": 0.5}


def test_more_of_a_reward_and_less_of_a_violation_is_better() -> None:
    assert better(ROW, "mean_reward", Best(10, "mean_reward", 1.9)) == Best(20, "mean_reward", 2.0)
    assert better(ROW, "mean_reward", Best(10, "mean_reward", 2.1)) is None
    assert better(ROW, "strict_violation", Best(10, "strict_violation", 0.6)) == Best(20, "strict_violation", 0.5)
    assert better(ROW, "strict_violation", Best(10, "strict_violation", 0.4)) is None


@pytest.mark.parametrize("measure", ["mean_reward", "strict_violation"])
def test_of_equal_ones_the_earlier_stays_and_no_number_is_never_better(measure: str) -> None:
    assert better(ROW, measure, Best(10, measure, ROW[measure])) is None
    assert better(ROW | {measure: float("nan")}, measure, None) is None
    assert better(ROW, measure, None) == Best(20, measure, ROW[measure])


def test_of_several_constraints_the_violations_add_up() -> None:
    assert better(ROW, "safety_rate", None) is None
    row = {"step": 1, "harm_strict_violation": 0.5, "refusal_strict_violation": 0.25, "harm_mean_cost": 1.0}
    names = ["harm", "refusal"]
    assert value_of(row, "strict_violation", names) == 0.75
    assert value_of(row, "harm_strict_violation", names) == 0.5
    assert math.isnan(value_of(row, "strict_violation", ["other"]))
    # Another constraint's, whose name only ends like it.
    assert math.isnan(value_of({"self_harm_strict_violation": 0.5}, "harm_strict_violation", ["harm", "self_harm"]))
    assert better(row, "refusal_strict_violation", Best(0, "refusal_strict_violation", 0.3)) is not None
    names = measures_to_keep(["harm", "refusal"])
    assert "mean_cost" not in names and "harm_mean_cost" in names and "strict_violation" in names
    assert [constraint_of(name) for name in ("strict_violation", "harm_safety_rate")] == [None, "harm"]
    assert constraint_of("harm_strict_safety_rate") == "harm"


def test_it_says_what_the_start_had() -> None:
    start = {"step": 0, "mean_reward": 1.5}
    assert better(ROW, "mean_reward", None, start=start) == Best(20, "mean_reward", 2.0, 1.5)
    assert better(ROW, "strict_violation", None, start=start) == Best(20, "strict_violation", 0.5, None)
