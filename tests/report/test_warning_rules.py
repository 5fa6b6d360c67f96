"""Each rule on histories made to fire it, and on ones that are near."""

import typing

import pytest

from repo_fast.config import EvaluationConfig
from repo_fast.report.warning_rules import EVALUATION_RULES, STEP_RULES, History

HEALTHY = {
    "kl": 2.0,
    "entropy": 0.4,
    "response_length": 18.0,
    "finished_share": 1.0,
    "multiplier": 1.0,
    "strict_violation": 0.5,
}
START = {"step": 0, "mean_reward": 1.0, "mean_reward_error": 0.1}


def steps(start: int, now: int, **changed: float) -> list[dict]:
    """So many healthy steps, then so many with other values."""
    return [HEALTHY] * start + [HEALTHY | changed] * now


def fired(history: History) -> set[tuple[str, str]]:
    rules = STEP_RULES | EVALUATION_RULES
    return {(name, warned.about) for name, rule in rules.items() for warned in rule(history)}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"kl": 51.0}, {("kl", "")}),
        ({"kl": 49.0}, set()),
        ({"kl": float("nan")}, {("kl", "")}),
        ({"entropy": 0.07}, {("entropy", "")}),
        ({"entropy": 0.09}, set()),
        ({"response_length": 5.0}, {("length", "short")}),
        ({"response_length": 7.0}, set()),
        ({"response_length": 55.0}, {("length", "long")}),
        ({"response_length": 53.0}, set()),
        ({"finished_share": 0.4}, {("length", "cut")}),
        ({"finished_share": 0.6}, set()),
        ({"multiplier": 5.0}, {("multiplier", "")}),
        ({"multiplier": 4.9}, set()),
        # Most of the violations are gone: lambda is only slow to fall.
        ({"multiplier": 5.0, "strict_violation": 0.2}, set()),
    ],
)
def test_rules_on_steps(changed: dict[str, float], expected: set) -> None:
    assert fired(History(steps(20, 10, **changed), multiplier_max={"": 5.0})) == expected
    # What lies between the start and the last ten is looked at by none.
    assert fired(History(steps(5, 10, **changed), multiplier_max={"": 5.0})) == expected


def test_a_few_steps_are_noise() -> None:
    loud = {"kl": 60.0, "entropy": 0.0, "response_length": 1.0, "multiplier": 5.0}
    assert fired(History(steps(20, 1, **loud), multiplier_max={"": 5.0})) == set()
    assert fired(History(steps(2, 2, **loud), multiplier_max={"": 5.0})) == set()
    assert fired(History([], multiplier_max={"": 5.0})) == set()


def test_the_bound_of_the_kl_is_an_option() -> None:
    assert fired(History(steps(20, 5, kl=2.0), kl_bound=1.0)) == {("kl", "")}


def test_a_multiplier_at_its_maximum_while_violations_fall_is_at_work() -> None:
    falling = [HEALTHY | {"multiplier": 5.0, "strict_violation": 0.5 - 0.01 * i} for i in range(10)]
    assert fired(History([HEALTHY] * 10 + falling, multiplier_max={"": 5.0})) == set()


def test_of_several_constraints_each_has_a_multiplier() -> None:
    rows = [
        {"a_multiplier": 5.0, "a_strict_violation": 0.5, "b_multiplier": 5.0, "b_strict_violation": 0.01 * (20 - i)}
        for i in range(20)
    ]
    assert fired(History(rows, multiplier_max={"a": 5.0, "b": 5.0})) == {("multiplier", "a")}
    assert fired(History(rows, multiplier_max={"b": 5.0})) == set()


@pytest.mark.parametrize(
    ("reward", "form", "second", "expected"),
    [
        (1.3, 0.7, 0.0, {("exploitation", "well_formed")}),
        # By no more than other causes take.
        (1.3, 0.9, 0.0, set()),
        (1.3, 1.0, -0.2, {("exploitation", "mean_second_reward")}),
        (1.3, 1.0, -0.1, set()),
        (1.3, 0.7, -0.2, {("exploitation", "mean_second_reward"), ("exploitation", "well_formed")}),
        # The reward has not risen by more than noise: bad, but no exploitation of it.
        (1.2, 0.7, -0.2, set()),
    ],
)
def test_a_reward_that_rises_at_the_expense_of_what_it_stands_for(
    reward: float, form: float, second: float, expected: set
) -> None:
    first = START | {"well_formed": 1.0, "well_formed_error": 0.01}
    first |= {"mean_second_reward": 0.0, "mean_second_reward_error": 0.05}
    last = first | {"mean_reward": reward, "well_formed": form, "mean_second_reward": second}
    assert fired(History([], [first, first, last])) == expected
    assert fired(History([], [first])) == set()


def test_what_was_not_measured_is_not_warned_of() -> None:
    assert fired(History([], [START, START | {"mean_reward": 2.0, "well_formed": 0.1}])) == set()


def test_every_rule_has_a_name_to_stop_on_and_says_what_to_do() -> None:
    names = typing.get_args(typing.get_args(EvaluationConfig.__dataclass_fields__["stop_on"].type)[0])
    assert set(names) == (STEP_RULES | EVALUATION_RULES).keys()
    for rule in (STEP_RULES | EVALUATION_RULES).values():
        assert "Why: " in (rule.__doc__ or "") and "What to do: " in (rule.__doc__ or "")
