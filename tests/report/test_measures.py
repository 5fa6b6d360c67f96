"""The measures against numbers worked by hand, and the interval against what statistics promises."""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch

from repo_fast.report.measures import (
    Evaluation,
    Measure,
    PromptScores,
    compensation,
    cvar_violation,
    interference_rate,
    interval_of,
    mean,
    prompt_measures,
    resample,
    score_prompts,
    share_of,
    win_shares,
)


def safety_measures(
    policy: Evaluation, reference: Evaluation | None = None, threshold: float = 0.0
) -> dict[str, float]:
    """The values of all measures."""
    prompts = np.ones(len(score_prompts(policy).prompt_ids))
    return {name: float(measure(prompts)) for name, measure in prompt_measures(policy, reference, threshold).items()}


def bootstrapped(measure: Measure, prompts: int, n: int, seed: int) -> tuple[float, float]:
    return resample({"it": measure}, prompts, n, seed)["it"].interval


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
            # Rewards of the policy 7: 1, 3; 8: 2, 2; 9: 0, 1; 20: 5, -1; all of the reference are 0. Safe: 8, 9, 20.
            "win_rate": (1 + 1 + 0.75 + 0.5) / 4,
            "win_rate_on_safe_prompts": (1 + 0.75 + 0.5) / 3,
            "mean_reward_on_safe_prompts": (2 + 0.5 + 2) / 3,
        }
    )


# Two responses to each of three prompts. "harm" is about all, "refusal" about 1 and 2, "unused" about none.
NONE = -math.inf
UNDER_THREE = Evaluation(
    prompt_ids=[1, 1, 2, 2, 3, 3],
    rewards=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    costs={
        "harm": [-1.0, -1.0, 2.0, 0.0, 1.0, -3.0],
        "refusal": [0.0, 1.0, 0.0, 0.0, NONE, NONE],
        "unused": [NONE] * 6,
    },
)
UNDER_THREE_BEFORE = Evaluation(
    prompt_ids=[1, 2, 3],
    rewards=[0.0, 3.5, 9.0],
    costs={"harm": [1.0, -1.0, -1.0], "refusal": [0.0, 1.0, NONE], "unused": [NONE] * 3},
)
THRESHOLDS = {"harm": 0.0, "refusal": 0.5, "unused": 9.0}


def test_hand_worked_measures_under_several_constraints():
    """Mean costs of harm -1, 1, -1, of refusal 0.5, 0; before, only prompt 3 is safe by all."""
    assert safety_measures(UNDER_THREE, UNDER_THREE_BEFORE, THRESHOLDS) == pytest.approx(
        {
            "mean_reward": 3.5,
            # By all: the first response, the fourth and the last.
            "safety_rate": 3 / 6,
            "strict_safety_rate": 0.0,
            "win_rate": (1 + 0.5 + 0) / 3,
            # Prompt 2 alone is unsafe, by harm.
            "interference_rate": 0.0,
            "repair_rate": 1 / 2,
            "mean_reward_on_safe_prompts": 5.5,
            "win_rate_on_safe_prompts": 0.0,
            "harm_mean_cost": -1 / 3,
            "harm_safety_rate": 4 / 6,
            "harm_strict_safety_rate": 1 / 3,
            "harm_strict_violation": 1 / 3,
            "harm_max_violation": 1.0,
            "harm_cvar_violation": 1.0,
            "harm_compensation": 1 / 3,
            "harm_interference_rate": 1 / 2,
            "harm_repair_rate": 1.0,
            "refusal_mean_cost": 0.25,
            "refusal_safety_rate": 3 / 4,
            "refusal_strict_safety_rate": 1 / 2,
            "refusal_strict_violation": 0.0,
            "refusal_max_violation": 0.0,
            "refusal_cvar_violation": 0.0,
            "refusal_compensation": 0.0,
            "refusal_interference_rate": 0.0,
            "refusal_repair_rate": 1.0,
        }
    )


def test_several_constraints_are_each_what_they_would_be_alone():
    """Over the prompts that they are about, with the same resamples of all prompts."""
    generator = np.random.default_rng(0)
    ids, S = np.repeat(np.arange(20), 3), 60
    costs = {name: generator.normal(size=S) for name in ("a", "b")}
    about = ids % 3 > 0
    policy = Evaluation(ids, generator.normal(size=S), {**costs, "b": np.where(about, costs["b"], NONE)})
    reference = Evaluation(ids, generator.normal(size=S), {**costs, "b": np.where(about, -costs["b"], NONE)})
    thresholds = {"a": 0.1, "b": -0.2}
    measures = prompt_measures(policy, reference, thresholds)
    weights = generator.integers(0, 3, size=(7, 20)).astype(float)
    weights[0, [i for i in range(20) if i % 3]] = 0
    alone = [
        Evaluation(ids[about], np.asarray(own.rewards)[about], np.asarray(own.costs["b"])[about])
        for own in (policy, reference)
    ]
    own = weights[:, [i for i in range(20) if i % 3]]
    for name, measure in prompt_measures(*alone, -0.2).items():
        if f"b_{name}" in measures:
            found = measures[f"b_{name}"](weights)
            assert np.isnan(found[0])
            np.testing.assert_allclose(found[1:], measure(own[1:]))
    assert sum(name.startswith("b_") for name in measures) == 9


def test_a_nan_cost_is_safe_by_none():
    policy = Evaluation([1], [0.0], {"a": [-1.0], "b": [math.nan]})
    measured = safety_measures(policy, policy, {"a": 0.0, "b": 0.0})
    assert measured["safety_rate"] == 0 and math.isnan(measured["interference_rate"])


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
    low, high = bootstrapped(partial(mean, values), 400, n=4000, seed=0)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.08 * half)


def test_interval_covers_the_truth_95_times_of_100():
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(300):
        low, high = bootstrapped(partial(mean, generator.exponential(1.0, size=80)), 80, n=200, seed=trial)
        covered += low <= 1.0 <= high
    assert 0.89 <= covered / 300 <= 0.98


def random_policy(seed: int, prompts: int) -> Callable[[], Evaluation]:
    """A policy with four responses a prompt, costs around the threshold; every call is another draw of it."""
    generator = np.random.default_rng(seed)
    ids = np.repeat(np.arange(prompts), 4)
    level = generator.normal(-0.3, 0.8, size=prompts)[ids]
    return lambda: Evaluation(ids, generator.normal(size=ids.size), level + generator.normal(0, 0.7, size=ids.size))


def resampled_against_floor(policy: Evaluation, again: Evaluation, reference: Evaluation, n: int, seed: int) -> dict:
    """The difference of each measure between a policy and a second draw of the reference."""
    measured = {("policy", name): measure for name, measure in prompt_measures(policy, reference).items()}
    measured |= {("floor", name): measure for name, measure in prompt_measures(again, reference).items()}
    drawn = resample(measured, len(score_prompts(reference).prompt_ids), n, seed)
    return {name: drawn["policy", name] - drawn["floor", name] for side, name in measured if side == "policy"}


def statistics(first: PromptScores, second: PromptScores) -> dict[str, Callable[[np.ndarray], float]]:
    """The measures written a second time, as plain functions of resampled prompts."""

    def worst(rows: np.ndarray) -> float:
        violations = np.sort(np.maximum(second.excess[rows], 0))[::-1]
        whole = len(rows) // 20
        return violations[:whole].mean()

    return {
        "mean_reward": lambda rows: second.reward[rows].mean(),
        "safety_rate": lambda rows: second.safe_responses[rows].sum() / second.responses[rows].sum(),
        "strict_safety_rate": lambda rows: (second.safe_responses == second.responses)[rows].mean(),
        "strict_violation": lambda rows: np.maximum(second.excess[rows], 0).mean(),
        "max_violation": lambda rows: np.maximum(second.excess[rows], 0).max(),
        "cvar_violation": worst,
        "compensation": lambda rows: min(
            np.maximum(-second.excess[rows], 0).mean(), np.maximum(second.excess[rows], 0).mean()
        ),
        "interference_rate": lambda rows: (second.excess[rows][first.excess[rows] <= 0] > 0).mean(),
        "repair_rate": lambda rows: (second.excess[rows][first.excess[rows] > 0] <= 0).mean(),
    }


def test_intervals_agree_with_scipys():
    draw = random_policy(5, prompts=60)
    reference, policy = draw(), draw()
    ours = resample(prompt_measures(policy, reference), 60, n=4000, seed=0)
    for name, statistic in statistics(score_prompts(reference), score_prompts(policy)).items():
        theirs = scipy.stats.bootstrap(
            (np.arange(60),), statistic, vectorized=False, method="percentile", n_resamples=4000, rng=1
        )
        assert ours[name].value == pytest.approx(statistic(np.arange(60)), abs=1e-12), name
        # The quantiles of two sets of 4,000 draws differ by chance: a few hundredths of the draws' spread, or one of
        # the steps that a share of few prompts moves in.
        room = max(0.15 * theirs.standard_error, 1 / 60 + 1e-9 if name.endswith("rate") else 0)
        assert ours[name].interval == pytest.approx(tuple(theirs.confidence_interval), abs=room), name


@pytest.mark.parametrize("size", [1, 7])
def test_weights_of_a_resample_are_its_prompts_repeated(size):
    draw = random_policy(size, prompts=60)
    reference, policy = draw(), draw()
    rows = np.random.default_rng(size).integers(60, size=60)
    weights = np.bincount(rows, minlength=60)
    measures = prompt_measures(policy, reference)
    for name, statistic in statistics(score_prompts(reference), score_prompts(policy)).items():
        together = measures[name](np.stack([weights] * size).astype(float))
        assert together == pytest.approx([statistic(rows)] * size, abs=1e-12), name


def test_paired_interval_knows_what_the_prompts_share():
    before = np.random.default_rng(3).normal(0.0, 10.0, size=50)
    both = resample({"before": partial(mean, before), "after": partial(mean, before + 0.25)}, 50, n=200)
    change = both["after"] - both["before"]
    assert change.value == pytest.approx(0.25) and np.isnan(change.interval).all()
    low, high = both["after"].interval
    assert high - low > 4


@pytest.mark.parametrize("prompts", [2, 19, 301])
@pytest.mark.parametrize("safe", [True, False])
def test_a_share_that_no_resample_changes_has_the_exact_interval(prompts, safe):
    """Of the prompts that it is of: a third of them were safe before."""
    ids, before = np.arange(prompts), np.where(np.arange(prompts) % 3 == 0, -1.0, 1.0)
    after = Evaluation(ids, np.ones(prompts), np.full(prompts, -1.0 if safe else 1.0), well_formed=np.ones(prompts))
    reference = Evaluation(ids, np.zeros(prompts), before)
    found = resample(prompt_measures(after, reference), prompts)
    of_all, were_safe = prompts, int((before < 0).sum())
    for name, seen, of in [
        ("safety_rate", safe, of_all),
        ("strict_safety_rate", safe, of_all),
        ("win_rate", True, of_all),
        ("well_formed", True, of_all),
        ("interference_rate", not safe, were_safe),
        ("win_rate_on_safe_prompts", True, were_safe),
    ]:
        exact = scipy.stats.binomtest(of if seen else 0, of).proportion_ci(0.95, "exact")
        assert interval_of(name, found[name], prompts) == pytest.approx((exact.low, exact.high), rel=1e-9), name
    for name in ("mean_reward", "mean_cost", "strict_violation"):
        assert np.isnan(interval_of(name, found[name], prompts)).all(), name


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_so_has_the_difference_of_two(before, after):
    """Where all 19 prompts changed alike, at most a share of 1 - 0.025^(1/19) does otherwise, by any change."""
    both = resample({"before": share_of(np.full(19, before)), "after": share_of(np.full(19, after))}, 19)
    others, change = 1 - 0.025 ** (1 / 19), after - before
    expected = {0.0: (-others, others), 1.0: (1 - 2 * others, 1.0), -1.0: (-1.0, -1 + 2 * others)}
    assert (both["after"] - both["before"]).interval == pytest.approx(expected[change], abs=1e-12)
    # Of others that do not vary alike, nothing is known.
    mixed = resample({"before": share_of(np.full(19, 0.5)), "after": share_of(np.full(19, after))}, 19)
    assert np.isnan((mixed["after"] - mixed["before"]).interval).all()


def test_prompts_of_a_cluster_count_once_in_an_exact_interval():
    units = np.arange(60) // 4
    own = resample({"over_refusal": share_of(np.zeros(60))}, 60, units=units)["over_refusal"]
    assert own.interval == (0.0, pytest.approx(1 - 0.025 ** (1 / 15)))
    # Where clusters are of several sizes, large ones that were not seen could be all of it.
    uneven = resample({"over_refusal": share_of(np.zeros(60))}, 60, units=np.arange(60) // 7)["over_refusal"]
    assert np.isnan(uneven.interval).all()


def test_identical_policies_differ_by_nothing_that_an_interval_excludes():
    """In 100 repeats, the interval of the difference of two draws of one policy contains 0 in 93 at least."""
    contained: Counter[str] = Counter()
    for repeat in range(100):
        draw = random_policy(repeat, prompts=200)
        changes = resampled_against_floor(draw(), draw(), draw(), n=1000, seed=repeat)
        for name, change in changes.items():
            low, high = change.interval
            contained[name] += low <= 0 <= high
    # Of the maximum no interval is reported, and the mean of ten prompts is all that the worst 5 % are.
    del contained["max_violation"]
    assert contained.pop("cvar_violation") >= 90
    assert len(contained) == 13 - 2 and min(contained.values()) >= 93, contained


def test_a_planted_effect_is_found():
    draw = random_policy(6, prompts=200)
    same = draw()
    worse = Evaluation(same.prompt_ids, same.rewards - 0.5, same.costs + 0.3)
    changes = resampled_against_floor(worse, draw(), draw(), n=2000, seed=0)
    change = {name: difference.interval for name, difference in changes.items()}
    assert change["mean_reward"][1] < 0 and change["safety_rate"][1] < 0 and change["win_rate"][1] < 0
    assert change["strict_violation"][0] > 0 and change["interference_rate"][0] > 0


def test_interval_is_reproducible_and_depends_on_the_seed():
    measure = partial(mean, np.random.default_rng(4).normal(size=30))
    assert bootstrapped(measure, 30, 100, 5) == bootstrapped(measure, 30, 100, 5)
    assert bootstrapped(measure, 30, 100, 5) != bootstrapped(measure, 30, 100, 6)


def test_resamples_without_a_value_are_left_out():
    # One prompt of three is safe under the reference: a third of the resamples (8/27) have no prompt to count.
    measure = interference_rate(np.array([-1.0, 1.0, 1.0]), np.array([1.0, 1.0, 1.0]))
    # All others have the one prompt that was safe.
    assert bootstrapped(measure, 3, n=200, seed=0) == pytest.approx((0.025, 1.0))


def test_one_prompt_has_no_interval():
    assert all(math.isnan(bound) for bound in bootstrapped(partial(mean, np.array([1.0])), 1, 10, 0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("costs", "threshold", "safe"),
    [
        ([-0.1, -0.2, 0.3], 0.0, True),
        ([0.3, -0.1, -0.2], 0.0, True),
        ([0.1, 0.1, 0.1], 0.1, True),
        ([0.0, 0.2], 0.1, True),
        ([1000.1, -1000.2, 0.1], 0.0, True),
        ([-0.1, -0.2, 0.30001], 0.0, False),
        ([0.1, 0.1, 0.10001], 0.1, False),
        ([0.0, 1e-30], 0.0, False),
    ],
)
def test_a_mean_of_exactly_the_threshold_is_safe_whatever_rounding_does(dtype, costs, threshold, safe):
    scores = score_prompts(Evaluation([0] * len(costs), costs, np.array(costs, dtype=dtype)), threshold)
    assert (scores.excess[0] <= 0) == safe
    assert scores.excess[0] == 0 or not safe


def test_a_tie_is_half_a_win():
    ours, theirs = Evaluation([1, 1, 2], [1.0, 3.0, 0.0], [0.0] * 3), Evaluation([2, 1, 1], [0.0, 1.0, 2.0], [0.0] * 3)
    # Prompt 1: 1 against 1 (tie) and 2 (lost), 3 against both (won); prompt 2: a tie.
    assert win_shares(ours, theirs).tolist() == [(0.5 + 0 + 1 + 1) / 4, 0.5]
    assert win_shares(ours, ours).tolist() == [0.5, 0.5]


def test_prompt_scores_are_sorted_by_prompt():
    scores = score_prompts(POLICY)
    assert scores.prompt_ids.tolist() == [7, 8, 9, 20]
    assert scores.excess.tolist() == scores.cost.tolist() == [-1.0, 0.0, 0.5, 2.0]
    assert scores.reward.tolist() == [2.0, 2.0, 0.5, 2.0]
    assert scores.safe_responses.tolist() == [2, 2, 1, 0] and scores.responses.tolist() == [2] * 4
