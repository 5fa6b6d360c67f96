"""Several constraints against hand-worked numbers and against loops in float64."""

import math

import pytest
import scipy.optimize
import scipy.stats
import torch

from repo_fast.errors import InputError
from repo_fast.objective import algorithm as alg
from repo_fast.objective import constraints as con

INF, NAN = math.inf, math.nan


def close(actual, expected, tolerance=1e-6):
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=1e-6, equal_nan=True)


# ------------------------------------------------------------------------------------------------------------ weights


def test_weights_of_the_active_constraints_add_up_to_one():
    violations = torch.tensor([[1.0, -1.0, 2.0, -INF], [0.5, 0.5, -INF, 0.0]])
    reward, costs = alg.stream_weights(violations, [3.0, 1.0], rectify=[True, True])
    close(reward, [1 / 5, 1 / 2, 1 / 4, 1])
    close(costs, [[3 / 5, 0, 3 / 4, 0], [1 / 5, 1 / 2, 0, 0]])
    close(reward + costs.sum(0), [1, 1, 1, 1])


def test_what_is_not_rectified_is_active_wherever_it_applies():
    violations = torch.tensor([[1.0, -1.0, -INF], [0.5, -0.5, -INF]])
    reward, costs = alg.stream_weights(violations, [3.0, 1.0], rectify=[False, True])
    close(reward, [1 / 5, 1 / 4, 1])
    close(costs, [[3 / 5, 3 / 4, 0], [1 / 5, 0, 0]])


def test_nan_in_a_cost_that_applies_reaches_every_weight():
    violations = torch.tensor([[NAN, -INF, 1.0], [-1.0, NAN, -INF]])
    for weights in (*alg.stream_weights(violations, [1.0, 1.0], rectify=True),):
        assert weights.isnan().reshape(-1, 3).tolist() == [[True, True, False]] * (weights.numel() // 3)


def test_what_is_not_active_is_not_looked_at():
    reward, costs = alg.stream_weights(torch.tensor([[-1.0, 1.0], [1.0, -INF]]), [NAN, 1.0], rectify=True)
    close(reward, [1 / 2, NAN])
    close(costs, [[0, NAN], [1 / 2, NAN]])


@pytest.mark.parametrize("K", [1, 2, 3])
def test_weights_are_those_of_a_loop(K):
    generator = torch.Generator().manual_seed(K)
    violations = torch.randn(K, 50, generator=generator)
    violations[torch.rand(K, 50, generator=generator) < 0.2] = -INF
    multipliers = (3 * torch.rand(K, generator=generator)).tolist()
    rectify = [k % 2 == 0 for k in range(K)]
    reward, costs = alg.stream_weights(violations, multipliers, rectify=rectify)
    for i in range(50):
        own = violations[:, i].tolist()
        active = [k for k in range(K) if own[k] != -INF and (own[k] > 0 or not rectify[k])]
        total = 1 + sum(multipliers[k] for k in active)
        close(reward[i], 1 / total)
        close(costs[:, i], [multipliers[k] / total if k in active else 0 for k in range(K)])


# --------------------------------------------------------------------------------------------------------- advantages


def test_one_of_several_streams_is_the_one_stream_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    scores, costs = torch.randn(2, 40, generator=generator)
    ids = torch.arange(40) % 7
    violations = torch.randn(40, generator=generator)
    one = alg.stream_weights(violations, 1.7, rectify=True)
    several = alg.stream_weights(violations[None], [1.7], rectify=[True])
    assert torch.equal(one[0], several[0]) and torch.equal(one[1], several[1][0])
    for kind in ("rloo", "grpo"):
        single = alg.critic_free_advantages(kind, scores, costs, ids, *one)
        streams = alg.critic_free_advantages(kind, scores, costs[None], ids, *several)
        assert torch.equal(single[0], streams[0]) and torch.equal(single[1], streams[1][0])


def test_joint_scale_by_hand():
    rewards, ids = torch.tensor([1.0, 3.0]), torch.tensor([0, 0])
    costs = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    weights = torch.full((2,), 0.5), torch.tensor([[0.25, 0.25], [0.25, 0.25]])
    # Mixed: 0.5 - 0.5 - 0 = 0 and 1.5 - 0 - 1 = 0.5; its standard deviation is 0.5 / sqrt(2).
    reward, cost = alg.critic_free_advantages("grpo", rewards, costs, ids, *weights)
    scale = 0.5 / math.sqrt(2)
    close(reward, [-1 / scale, 1 / scale])
    close(cost, [[1 / scale, -1 / scale], [-2 / scale, 2 / scale]])
    reward, cost = alg.critic_free_advantages("grpo", rewards, costs, ids, *weights, scaled=False)
    close(reward, [-1, 1])
    close(cost, [[1, -1], [-2, 2]])


def test_separate_scales_leave_the_penalty_undivided():
    """A binary cost that all responses share has no scale: what is left of its stream is the penalty as it is."""
    rewards, kl = torch.tensor([0.0, 4.0, 5.0, 5.0]), torch.tensor([0.1, 0.3, 2.0, 4.0])
    costs, ids = torch.tensor([[1.0, 1.0, 0.0, 1.0], [7.0, 3.0, 2.0, 2.0]]), torch.tensor([0, 0, 1, 1])
    applies = torch.tensor([[True] * 4, [True, True, False, False]])
    reward, cost = alg.separately_scaled_advantages(rewards, costs, kl, ids, applies, kl_coefficient=0.5)
    half = 1 / math.sqrt(2)
    close(reward, [-half + 0.05, half - 0.05, 0.5, -0.5])
    close(cost, [[-0.05, 0.05, -half - 0.5, half + 0.5], [half - 0.05, -half + 0.05, 0, 0]])


@pytest.mark.parametrize("n", [2, 5, 6, 16, 64])
def test_equal_scores_are_no_signal_however_many(n):
    """The mean of n equal numbers is off by more than a rounding of one."""
    ids, nothing = torch.arange(50 * n) % 50, torch.zeros(50 * n)
    scores = (10 * torch.rand(50) - 5)[ids]
    reward, cost = alg.separately_scaled_advantages(scores, scores, nothing, ids, ids >= 0, kl_coefficient=0.1)
    assert not reward.any() and not cost.any()
    weights = torch.ones(50 * n), torch.zeros(50 * n)
    for scaled in alg.critic_free_advantages("grpo", scores, nothing, ids, *weights):
        assert not scaled.any()
    # And what differs by a thousand roundings is.
    scores = scores + 1e-3 * (torch.arange(50 * n) // 50)
    reward, _ = alg.separately_scaled_advantages(scores, scores, nothing, ids, ids >= 0, kl_coefficient=0.1)
    close(torch.stack([reward[ids == i].std() for i in range(50)]), [1.0] * 50, 1e-3)


def test_separate_scales_need_a_second_response():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="at least 2 responses"):
        alg.separately_scaled_advantages(one, one, one, one.long(), one.bool(), kl_coefficient=0.1)


# -------------------------------------------------------------------------------------------------------- controllers


def responses(costs, ids):
    return torch.tensor(costs), torch.tensor(costs), torch.tensor(ids)


@pytest.mark.parametrize("kind", ["rectified", "mean", "upper"])
def test_responses_that_it_does_not_apply_to_do_not_count(kind):
    with_them, without = alg.Violation(kind), alg.Violation(kind)
    close(
        with_them.update(*responses([3.0, -INF, -1.0, -INF], [0, 1, 0, 1])),
        without.update(*responses([3.0, -1.0], [0, 0])),
    )
    assert with_them.state_dict() == without.state_dict()


def controllers():
    return {
        "dual": alg.Multiplier("mean", init=1.0),
        "fixed": con.FixedMultiplier(2.0, alg.Violation("mean")),
        "pid": con.PidMultiplier(0.5, 5.0, alg.Violation("mean"), kp=1, ki=0.1, kd=1, smoothing=0.5),
    }


@pytest.mark.parametrize("name", ["dual", "fixed", "pid"])
def test_a_batch_that_it_does_not_apply_to_moves_nothing(name):
    controller = controllers()[name]
    controller.update(*responses([3.0, 2.0], [0, 0]))
    before = controller.state_dict()
    assert controller.update(*responses([-INF, -INF], [0, 1])) is None
    assert controller.state_dict() == before


@pytest.mark.parametrize("name", ["dual", "fixed", "pid"])
def test_a_resumed_controller_goes_on_to_the_same_bits(name):
    batches = [responses(torch.randn(6).tolist(), [0, 0, 1, 1, 2, 2]) for _ in range(8)]
    whole, first, second = (controllers()[name] for _ in range(3))
    expected = [(whole.update(*batch), whole.value) for batch in batches]
    found = [(first.update(*batch), first.value) for batch in batches[:4]]
    second.update(*batches[7])  # what it had before is forgotten
    second.load_state_dict(first.state_dict())
    assert found + [(second.update(*batch), second.value) for batch in batches[4:]] == expected


def test_a_fixed_multiplier_is_measured_and_stays():
    fixed = con.FixedMultiplier(2.0, alg.Violation("rectified"))
    close(fixed.update(*responses([3.0, -1.0], [0, 1])), 1.5)
    assert fixed.value == 2.0


def test_pid_by_hand():
    pid = con.PidMultiplier(1.0, 9.0, alg.Violation("rectified"), kp=2.0, ki=0.5, kd=3.0, tolerance=0.25, smoothing=0.5)
    assert pid.value == 1.0
    # J = 1: e = 0.75, I = 1 / 0.5 + 0.75 = 2.75, D = 0 at first.
    pid.update(*responses([1.0], [0]))
    close(pid.value, 2 * 0.75 + 0.5 * 2.75)
    # J = 2: e = 1.75, I = 4.5, smoothed J = 1.5, D = 0.5.
    pid.update(*responses([2.0], [0]))
    close(pid.value, 2 * 1.75 + 0.5 * 4.5 + 3 * 0.5)
    # J = 0: e = -0.25, I = 4.25, smoothed J = 0.75, which fell: D = 0.
    pid.update(*responses([-1.0], [0]))
    close(pid.value, 2 * -0.25 + 0.5 * 4.25)


def test_the_integral_stands_still_at_a_bound_and_only_while_the_error_pushes_further():
    pid = con.PidMultiplier(1.0, 1.5, alg.Violation("mean", window=1), kp=0.0, ki=1.0, kd=0.0)
    values = []
    for cost in (1.0, 5.0, 5.0, -1.0, -9.0, -9.0, 0.5):
        pid.update(*responses([cost], [0]))
        values.append(pid.value)
    # I: 2, then still (2), 2, 1, -8, still (-8), -7.5.
    close(values, [1.5, 1.5, 1.5, 1.0, 0, 0, 0])
    close(pid.state_dict()["integral"], -7.5)


def test_pid_may_start_at_zero_and_nan_does_not_pass_for_no_violation():
    pid = con.PidMultiplier(0.0, 1.0, alg.Violation("mean"), kp=0.0, ki=0.1, kd=1.0)
    assert pid.value == 0
    pid.update(*responses([NAN], [0]))
    assert math.isnan(pid.value)


@pytest.mark.parametrize("n", [2, 10, 128])
def test_students_bound_is_of_the_same_level(n):
    costs = torch.randn(n, dtype=torch.float64)
    bound = alg.Violation("upper", student=True, confidence_z=1.645, threshold=0.2)
    level = scipy.stats.norm.cdf(1.645)
    expected = scipy.stats.t.interval(2 * level - 1, n - 1, loc=float(costs.mean()), scale=scipy.stats.sem(costs))[1]
    close(bound.update(costs, costs, torch.arange(n)), expected - 0.2)


# ------------------------------------------------------------------------------------------------------ the dual start


def naive_dual(multipliers, rewards, costs, applies, thresholds, beta):
    """D at `multipliers`, its beta' that of other multipliers, in loops."""
    total = 0.0
    P, J = rewards.shape
    for x in range(P):
        own = [k for k in range(len(multipliers)) if applies[k, x]]
        exponents = [(rewards[x, j] - sum(multipliers[k] * costs[k, x, j] for k in own)) / beta[x] for j in range(J)]
        most = max(float(value) for value in exponents)
        mean = sum(math.exp(float(value) - most) for value in exponents) / J
        total += sum(multipliers[k] * thresholds[k] for k in own) + float(beta[x]) * (most + math.log(mean))
    return total / P


def test_dual_start_by_hand():
    """One prompt, two samples: the mean cost is 0 where both are as probable, R_1 - 2 lambda = R_2 + 0."""
    start = con.dual_start(
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[[1.0, -1.0]]]),
        torch.ones(1, 1).bool(),
        [0.0],
        [5.0],
        kl_coefficient=0.3,
    )
    close(start.multipliers, [0.5], 1e-4)
    close([start.gap, start.effective_samples], [0, 2], 1e-4)
    assert start.converged and start.infeasible == [False]


@pytest.mark.parametrize("K", [1, 2, 3])
def test_dual_start_is_the_least_of_its_own_problem(K):
    generator = torch.Generator().manual_seed(K)
    P, J, beta = 12, 16, 0.2
    rewards = torch.randn(P, J, generator=generator, dtype=torch.float64)
    # What is useful costs, more or less.
    costs = 0.7 * rewards + torch.randn(K, P, J, generator=generator, dtype=torch.float64)
    applies = torch.rand(K, P, generator=generator) < 0.7
    costs[~applies] = NAN
    thresholds, maxima = [0.1 * k for k in range(K)], [5.0] * K
    start = con.dual_start(rewards, costs, applies, thresholds, maxima, kl_coefficient=beta)
    assert start.converged and not any(start.infeasible)
    scaled = beta * (1 + torch.tensor(start.multipliers, dtype=torch.float64) @ applies.double())
    at = naive_dual(start.multipliers, rewards, costs, applies, thresholds, scaled)
    best = scipy.optimize.minimize(
        naive_dual, [1.0] * K, (rewards, costs, applies, thresholds, scaled), "Nelder-Mead",
        bounds=[(0, 5.0)] * K, options={"xatol": 1e-7, "fatol": 1e-12, "maxiter": 4000},
    )  # fmt: skip
    assert at <= best.fun + 1e-8
    close(start.multipliers, best.x, 2e-3)
    close(start.gap, 0, 1e-3)


def test_a_constraint_that_is_met_anyway_starts_at_zero_and_one_that_cannot_be_at_its_maximum():
    rewards = torch.tensor([[1.0, 0.0, 0.5]])
    costs = torch.tensor([[[-3.0, -2.0, -4.0]], [[1.0, 2.0, 3.0]]])
    start = con.dual_start(rewards, costs, torch.ones(2, 1).bool(), [0.0, 0.0], [5.0, 4.0], kl_coefficient=0.1)
    close(start.multipliers, [0, 4], 1e-4)
    assert start.infeasible == [False, True]
    # The primal misses the second by about 1 at a price of 4.
    assert start.gap > 3


def test_one_that_applies_to_nobody_starts_at_zero():
    start = con.dual_start(
        torch.tensor([[1.0, 0.0]]),
        torch.full((1, 1, 2), NAN),
        torch.zeros(1, 1).bool(),
        [0.0],
        [5.0],
        kl_coefficient=0.1,
    )
    assert start.multipliers == [0.0] and start.infeasible == [False] and start.converged


def test_a_multiplier_that_is_given_stays_and_the_others_are_found_beside_it():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(8, 16, generator=generator)
    # Each response costs the same twice: what one multiplier takes, the other need not.
    costs = (0.7 * rewards + torch.randn(8, 16, generator=generator)).expand(2, 8, 16)
    applies = torch.ones(2, 8).bool()
    alone = con.dual_start(rewards, costs[:1], applies[:1], [0.0], [5.0], kl_coefficient=0.01)
    both = con.dual_start(rewards, costs, applies, [0.0, 0.0], [5.0, 0.1], kl_coefficient=0.01, minima=[0.0, 0.1])
    assert both.multipliers[1] == 0.1 and both.converged
    close(both.multipliers[0] + 0.1, alone.multipliers[0], 0.01)


def test_dual_start_wants_finite_scores_and_a_penalty():
    ones = torch.ones(1, 2), torch.ones(1, 1, 2), torch.ones(1, 1).bool(), [0.0], [5.0]
    with pytest.raises(ValueError, match="kl_coefficient must be above 0, got 0"):
        con.dual_start(*ones, kl_coefficient=0.0)
    with pytest.raises(ValueError, match="at least one sample"):
        con.dual_start(torch.ones(0, 2), torch.ones(1, 0, 2), torch.ones(1, 0).bool(), [0.0], [5.0], kl_coefficient=0.1)
    with pytest.raises(ValueError, match="finite"):
        con.dual_start(torch.tensor([[NAN, 1.0]]), *ones[1:], kl_coefficient=0.1)


# ------------------------------------------------------------------------------------------------------- applicability

ROWS = [
    {"category": "harmful", "level": 2, "tags": ["a", "b"], "harm": {"crime": True, "insult": False}},
    {"category": "harmless", "level": 1, "tags": [], "harm": {"crime": False, "insult": True}},
    {"category": "harmless", "level": 2, "tags": ["b"], "harm": {"crime": True, "insult": True}},
]


@pytest.mark.parametrize(
    ("applies_to", "expected"),
    [
        ({}, [True, True, True]),
        ({"category": ["harmless"]}, [False, True, True]),
        ({"category": "harmless"}, [False, True, True]),
        ({"level": [2]}, [True, False, True]),
        ({"category": ["harmless", "harmful"]}, [True, True, True]),
        ({"tags": ["b"]}, [True, False, True]),
        ({"harm": ["crime"]}, [True, False, True]),
        ({"category": ["harmless"], "tags": ["a", "b"]}, [False, False, True]),
    ],
)
def test_whom_a_constraint_counts_for(applies_to, expected):
    assert con.applicable("k", applies_to, ROWS).tolist() == expected


def test_a_prompt_without_the_field_is_an_error_unless_it_is_said_what_it_is():
    rows = [*ROWS, {"category": None}, {}]
    with pytest.raises(InputError, match="constraint 'k' applies to prompts by 'category', which prompt 3 of 5 lacks"):
        con.applicable("k", {"category": ["harmless"]}, rows)
    for missing in (True, False):
        found = con.applicable("k", {"category": ["harmless"]}, rows, missing=missing)
        assert found.tolist() == [False, True, True, missing, missing]
    with pytest.raises(InputError, match="which a.jsonl line 5 lacks"):
        con.applicable("k", {"category": ["harmless"]}, rows, places=["", "", "", "a.jsonl line 5", ""])


def test_held_out_prompts_need_not_have_one_of_each():
    assert con.applicable("k", {"category": ["x"]}, ROWS, some=False).tolist() == [False] * 3


@pytest.mark.parametrize(
    ("applies_to", "message"),
    [
        ({"category": ["harmles"]}, "category 'harmles', which no prompt has; did you mean 'harmless'\\?$"),
        ({"category": ["x"]}, "category 'x', which no prompt has; expected one of 'harmful', 'harmless'$"),
        ({"category": "x"}, "category 'x', which no prompt has; expected one of 'harmful', 'harmless'$"),
        ({"level": ["2"]}, "level '2', which no prompt has; expected one of 1, 2$"),
        ({"category": ["harmful"], "harm": ["insult"], "tags": ["b"]}, "applies to none of the 3 prompts"),
    ],
)
def test_a_constraint_that_counts_for_nobody_is_an_error(applies_to, message):
    with pytest.raises(InputError, match=message):
        con.applicable("k", applies_to, ROWS)


def test_a_truth_value_is_no_number():
    rows = [{"level": 1, "flag": True}, {"level": 2, "flag": False}]
    assert con.applicable("k", {"level": [1]}, rows).tolist() == [True, False]
    assert con.applicable("k", {"flag": [False]}, rows).tolist() == [False, True]
    for wanted in ({"level": [True]}, {"flag": [1]}):
        with pytest.raises(InputError, match="which no prompt has"):
            con.applicable("k", wanted, rows)


def test_a_field_of_something_else_is_an_error():
    with pytest.raises(InputError, match="by 'harm', where 'crime' is 'false', expected true or false"):
        con.applicable("k", {"harm": ["crime"]}, [{"harm": {"crime": "false"}}])
    for wanted, own in ((["b"], [{"b": 1}]), ([{"b": 1}], ["b"])):
        with pytest.raises(InputError, match=r"by 'a', where \[\{'b': 1\}\] is, expected a value or several"):
            con.applicable("k", {"a": wanted}, [{"a": own}])


# ------------------------------------------------------------------------------------------------------- the reward cap


def test_the_cap_ends_the_pressure_where_it_is_reached():
    rewards = torch.tensor([1.0, 3.0, NAN, 3.5, 4.0])
    close(con.capped_rewards(rewards, 3.0), [1, 3, NAN, 3, 3])
    assert con.capped_rewards(rewards, None) is rewards
    assert con.wholly_capped(rewards, torch.tensor([0, 0, 1, 2, 2]), 3.0) == pytest.approx(1 / 3)
