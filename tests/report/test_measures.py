"""The measures against numbers worked by hand, and the interval against what statistics promises."""

import math

import numpy as np
import pytest
import torch

from repo_fast.report.measures import (
    Evaluation,
    bootstrap_interval,
    compensation,
    cvar_violation,
    interference_rate,
    safety_measures,
    score_prompts,
)

# Four prompts, two responses each, in no order. Mean costs: 7: -1, 8: 0, 9: 0.5, 20: 2.
POLICY = Evaluation(
    prompt_ids=[9, 7, 20, 8, 8, 9, 7, 20],
    costs=[-1.0, -1.0, 1.0, 0.0, 0.0, 2.0, -1.0, 3.0],
    rewards=[0.0, 1.0, 5.0, 2.0, 2.0, 1.0, 3.0, -1.0],
)
# Mean costs: 7: 1, 8: -1, 9: -2, 20: 0.
REFERENCE = Evaluation(prompt_ids=[7, 8, 9, 20, 20], costs=[1.0, -1.0, -2.0, 0.5, -0.5], rewards=[0.0] * 5)


def test_hand_worked_measures():
    assert safety_measures(POLICY, REFERENCE) == pytest.approx(
        {
            "mean_reward": (2 + 2 + 0.5 + 2) / 4,
            "mean_cost": (-1 + 0 + 0.5 + 2) / 4,
            "safety_rate": 5 / 8,
            "strict_safety_rate": 2 / 4,
            "strict_violation": (0.5 + 2) / 4,
            "max_violation": 2.0,
            "cvar_violation": 2.0,
            "compensation": 1 / 4,
            "interference_rate": 2 / 3,
            "repair_rate": 1.0,
        }
    )


def test_hand_worked_measures_with_a_threshold():
    # Excess over 0.5: -1.5, -0.5, 0, 1.5; the prompt at exactly the threshold is safe.
    measures = safety_measures(POLICY, REFERENCE, threshold=0.5)
    assert measures["mean_cost"] == pytest.approx(0.375)
    assert measures["safety_rate"] == 5 / 8
    assert measures["strict_violation"] == 1.5 / 4
    assert measures["compensation"] == 1.5 / 4
    assert measures["interference_rate"] == pytest.approx(1 / 3)
    assert measures["repair_rate"] == 1.0


@pytest.mark.parametrize("costs", [np.full(3, 0.1), np.full(3, 0.1, np.float32), torch.full((3,), 0.1), [0.1] * 3])
def test_a_cost_of_exactly_the_threshold_is_safe_in_every_dtype(costs):
    measures = safety_measures(Evaluation([4, 4, 4], [1.0] * 3, costs), threshold=0.1)
    assert measures["safety_rate"] == measures["strict_safety_rate"] == 1.0
    assert measures["strict_violation"] == 0.0


def test_integer_costs_keep_a_fractional_threshold():
    assert safety_measures(Evaluation([1, 2], [0, 0], [0, 1]), threshold=0.5)["safety_rate"] == 0.5


def test_a_nan_cost_is_never_safe():
    policy = Evaluation([1, 1, 2], [0.0] * 3, [math.nan, -1.0, -1.0])
    measures = safety_measures(policy, Evaluation([1, 2], [0.0] * 2, [-1.0, 1.0]))
    assert measures["safety_rate"] == pytest.approx(2 / 3)
    assert measures["strict_safety_rate"] == 0.5
    assert measures["interference_rate"] == 1.0
    assert math.isnan(measures["strict_violation"]) and math.isnan(measures["max_violation"])
    assert math.isnan(measures["cvar_violation"]) and math.isnan(measures["compensation"])


def test_rates_among_no_prompts_are_nan():
    unsafe = Evaluation([1], [0.0], [1.0])
    safe = Evaluation([1], [0.0], [-1.0])
    assert math.isnan(safety_measures(safe, unsafe)["interference_rate"])
    assert math.isnan(safety_measures(safe, safe)["repair_rate"])


def test_compensation_is_what_slack_pays_for():
    # The average constraint holds (mean -0.5), though one prompt is unsafe.
    assert compensation(np.array([-2.0, -1.0, 1.5])) == 0.5
    assert compensation(np.array([-1.0, -1.0])) == 0.0


def test_cvar_takes_the_fraction_of_the_last_prompt():
    assert cvar_violation(np.arange(1.0, 61.0)) == pytest.approx((60 + 59 + 58) / 3)
    assert cvar_violation(np.arange(1.0, 51.0)) == pytest.approx((50 + 49 + 0.5 * 48) / 2.5)
    assert cvar_violation(np.array([3.0, -5.0])) == pytest.approx(3.0)
    assert cvar_violation(np.full(30, -1.0)) == 0.0


def test_order_of_responses_does_not_matter():
    order = np.random.default_rng(0).permutation(8)
    shuffled = Evaluation(*(np.asarray(v)[order] for v in (POLICY.prompt_ids, POLICY.rewards, POLICY.costs)))
    assert safety_measures(shuffled, REFERENCE) == safety_measures(POLICY, REFERENCE)


@pytest.mark.parametrize(
    "evaluation",
    [
        Evaluation([], [], []),
        Evaluation([1, 2], [0.0], [0.0, 0.0]),
        Evaluation([1, 2], [0.0, 0.0], [0.0]),
        Evaluation([[1, 2]], [0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_ragged_and_empty_evaluations_are_refused(evaluation):
    with pytest.raises(ValueError, match="expected"):
        safety_measures(evaluation)


def test_a_reference_of_other_prompts_is_refused():
    with pytest.raises(ValueError, match="2 are in only one, first 9"):
        safety_measures(Evaluation([7, 9], [0.0] * 2, [0.0] * 2), Evaluation([7, 11], [0.0] * 2, [0.0] * 2))


def test_interval_of_a_mean_agrees_with_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(values, np.mean, n=4000, seed=0)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.08 * half)


def test_interval_covers_the_truth_95_times_of_100():
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(300):
        low, high = bootstrap_interval(generator.exponential(1.0, size=80), np.mean, n=200, seed=trial)
        covered += low <= 1.0 <= high
    assert 0.89 <= covered / 300 <= 0.98


def test_paired_interval_knows_what_the_prompts_share():
    before = np.random.default_rng(3).normal(0.0, 10.0, size=50)
    pairs = np.stack([before, before + 0.25], axis=1)
    low, high = bootstrap_interval(pairs, lambda v: v[:, 1].mean() - v[:, 0].mean(), n=200, seed=0)
    assert low == pytest.approx(0.25) and high == pytest.approx(0.25)


def test_interval_is_reproducible_and_depends_on_the_seed():
    values = np.random.default_rng(4).normal(size=30)
    assert bootstrap_interval(values, np.mean, 100, 5) == bootstrap_interval(values, np.mean, 100, 5)
    assert bootstrap_interval(values, np.mean, 100, 5) != bootstrap_interval(values, np.mean, 100, 6)


def test_resamples_without_a_value_are_left_out():
    # One prompt of three is safe under the reference: a third of the resamples (8/27) have no prompt to count.
    pairs = np.array([[-1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    interval = bootstrap_interval(pairs, lambda v: interference_rate(v[:, 0], v[:, 1]), n=200, seed=0)
    assert interval == (1.0, 1.0)


def test_one_prompt_has_no_interval():
    assert all(math.isnan(bound) for bound in bootstrap_interval(np.array([1.0]), np.mean, 10, 0))


def test_prompt_scores_are_sorted_by_prompt():
    scores = score_prompts(POLICY)
    assert scores.prompt_ids.tolist() == [7, 8, 9, 20]
    assert scores.excess.tolist() == scores.cost.tolist() == [-1.0, 0.0, 0.5, 2.0]
    assert scores.reward.tolist() == [2.0, 2.0, 0.5, 2.0]
    assert scores.safe_responses.tolist() == [2, 2, 1, 0] and scores.responses.tolist() == [2] * 4
