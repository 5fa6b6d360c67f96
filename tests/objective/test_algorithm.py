"""The algorithm's pure functions against hand-worked numbers."""

import math

import pytest
import torch

from repo_fast.objective import algorithm as alg


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        atol=tolerance,
        rtol=1e-6,
    )


def test_the_table_is_the_papers():
    rows = {name: (row.scope, row.rectify, row.surrogate, row.constraint) for name, row in alg.ALGORITHMS.items()}
    assert rows["repo"] == ("prompt", True, "separate", "rectified")
    assert rows["ppo_lag"] == ("batch", False, "mixed", "mean")
    assert rows["hc_lag"] == ("batch", False, "mixed", "upper")
    streams = {name: row.has_cost_stream for name, row in alg.ALGORITHMS.items()}
    assert streams == {"repo": True, "ppo_lag": True, "hc_lag": True, "reward_shaping": False, "ppo": False}


def test_kl_shaping_puts_the_full_beta_on_both_streams_with_opposite_signs():
    kl = torch.tensor([0.1, -0.2, 0.3])
    cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
    rewards = alg.token_rewards(torch.tensor([2.0, -1.0]), kl, cu_seqlens, kl_coefficient=0.5, clamp=50)
    close(rewards, [-0.05, 0.1 + 2.0, -0.15 - 1.0])
    costs = alg.token_rewards(torch.tensor([2.0, -1.0]), kl, cu_seqlens, kl_coefficient=-0.5, clamp=50)
    close(costs, [0.05, -0.1 + 2.0, 0.15 - 1.0])


def test_token_rewards_are_clamped_after_the_penalty_and_scores_before_it():
    kl = torch.tensor([100.0, -0.2])
    rewards = alg.token_rewards(
        torch.tensor([3.0]), kl, torch.tensor([0, 2], dtype=torch.int32), kl_coefficient=0.1, clamp=2
    )
    close(rewards, [-2, 2])
    sums = alg.penalised_scores(torch.tensor([3.0, -9.0]), torch.tensor([40.0, 10.0]), kl_coefficient=0.1, clamp=2)
    close(sums, [2 - 4, -2 - 1])


@pytest.mark.parametrize(
    ("rectify", "expected"),
    [(True, ([0.25, 1, 1], [0.75, 0, 0])), (False, ([0.25] * 3, [0.75] * 3))],
)
def test_weights(rectify, expected):
    weights = alg.stream_weights(torch.tensor([0.5, 0.0, -2.0]), 3.0, rectify=rectify)
    close(weights[0], expected[0])
    close(weights[1], expected[1])


def test_a_nan_violation_does_not_pass_for_a_safe_one():
    for weights in alg.stream_weights(torch.tensor([float("nan"), 1.0]), 1.0, rectify=True):
        assert weights.isnan().tolist() == [True, False]


def test_rloo_by_hand_with_interleaved_prompts():
    rewards, ids = torch.tensor([1.0, 10.0, 4.0, 20.0, 7.0]), torch.tensor([5, -3, 5, -3, 5])
    ones = torch.ones(5)
    advantages, costs = alg.critic_free_advantages("rloo", rewards, -rewards, ids, ones, ones)
    close(advantages, [1 - 5.5, 10 - 20, 4 - 4, 20 - 10, 7 - 2.5])
    close(costs, -advantages)


def test_grpo_divides_both_streams_by_the_scale_of_their_weighted_sum():
    rewards, costs = torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([2.0, 0.0, 7.0, 7.0])
    ids = torch.tensor([0, 0, 1, 1])
    weights = torch.full((4,), 0.75), torch.full((4,), 0.25)
    # Prompt 0: mixed = [0.25, 2.25], standard deviation sqrt(2); prompt 1 has none.
    advantages = alg.critic_free_advantages("grpo", rewards, costs, ids, *weights)
    close(advantages[0], [-1 / math.sqrt(2), 1 / math.sqrt(2), 0, 0])
    close(advantages[1], [1 / math.sqrt(2), -1 / math.sqrt(2), 0, 0])


def test_grpo_takes_equal_scores_with_rounding_for_no_signal():
    scores = torch.full((3,), 0.1) * torch.tensor([1.0, 1 + 1e-7, 1.0])
    advantages = alg.critic_free_advantages(
        "grpo", scores, scores, torch.zeros(3).long(), torch.ones(3), torch.zeros(3)
    )
    assert not advantages[0].any()


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_a_single_response_has_no_baseline(kind):
    with pytest.raises(ValueError, match="at least 2 responses"):
        alg.critic_free_advantages(kind, *(torch.ones(3),) * 2, torch.tensor([0, 0, 1]), *(torch.ones(3),) * 2)


def test_whitening_keeps_one_scale():
    reward, cost = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 4.0, 8.0])
    reward_centre, cost_centre, factor = alg.whitening(reward, cost, 0.5 * reward - 0.5 * cost)
    close([reward_centre, cost_centre], [3, 4])
    mixed = [0.5, -1.0, -1.0]
    mean = sum(mixed) / 3
    close(factor, 1 / math.sqrt(sum((value - mean) ** 2 for value in mixed) / 2))


def responses(costs, ids):
    return torch.tensor(costs), torch.tensor(costs), torch.tensor(ids)


def test_rectified_multiplier_averages_prompts_not_responses_and_only_rises():
    multiplier = alg.Multiplier("rectified", init=1.0, learning_rate=0.1)
    # Prompt 0: mean of {3}+, {-1}+ = 1.5; prompt 1: {-9}+ = 0. J = 0.75.
    violation = multiplier.update(*responses([3.0, -1.0, -9.0], [0, 0, 1]))
    close(violation, 0.75)
    close(multiplier.value, math.exp(0.1 * 1 * 0.75))
    before = multiplier.value
    close(multiplier.update(*responses([-5.0, -5.0], [0, 1])), 0)
    assert multiplier.value == before


def test_mean_multiplier_uses_a_window_and_may_fall():
    multiplier = alg.Multiplier("mean", init=2.0, learning_rate=0.5, maximum=99, threshold=0.5, window=3)
    close(multiplier.update(*responses([1.0, 2.0], [0, 1])), 1.5 - 0.5)
    close(multiplier.value, 2 * math.exp(0.5 * 2 * 1.0))
    before = multiplier.value
    close(multiplier.update(*responses([-3.0, -4.0], [0, 1])), (2 - 3 - 4) / 3 - 0.5)
    close(multiplier.value, before * math.exp(0.5 * before * ((2 - 3 - 4) / 3 - 0.5)))


def test_upper_multiplier_adds_the_confidence_bound():
    multiplier = alg.Multiplier("upper", confidence_z=2.0)
    close(multiplier.update(*responses([0.3], [0])), 0.3, 1e-6)  # one cost has no spread
    close(multiplier.update(*responses([0.5, 0.7], [0, 1])), 0.5 + 2 * 0.2 / math.sqrt(3), 1e-6)


def test_multiplier_stops_at_its_maximum_and_round_trips():
    multiplier = alg.Multiplier("rectified", init=1.0, learning_rate=9.0, maximum=5.0)
    multiplier.update(*responses([3.0], [0]))
    close(multiplier.value, 5)
    other = alg.Multiplier("rectified")
    other.load_state_dict(multiplier.state_dict())
    assert other.value == multiplier.value


def test_without_a_constraint_lambda_is_zero():
    multiplier = alg.Multiplier(None, init=1.0)
    assert multiplier.update(*responses([3.0], [0])) == 0 and multiplier.value == 0


def test_a_nan_cost_makes_lambda_nan():
    for constraint in ("rectified", "mean", "upper"):
        multiplier = alg.Multiplier(constraint)
        multiplier.update(*responses([float("nan"), 1.0], [0, 1]))
        assert math.isnan(multiplier.value)


def test_reductions_use_the_global_denominator():
    values, ids = torch.tensor([1.0, 3.0, 8.0]), torch.tensor([0, 0, 1])
    reduce = lambda reduction, denominator: alg.reduce_tokens(  # noqa: E731
        values, ids, reduction=reduction, sequences=2, denominator=denominator
    )
    close(reduce("sum", 99), 12)
    close(reduce("token_mean", 6), 2)
    close(reduce("sequence_mean", 4), (2 + 8) / 4)


def test_value_loss_is_the_larger_of_plain_and_clipped():
    values = torch.tensor([3.0, 3.0, 0.1], requires_grad=True)
    losses = alg.clipped_value_losses(values, torch.zeros(3), torch.tensor([4.0, 0.0, 1.0]), clip=1.0)
    close(losses.detach(), [0.5 * 9, 0.5 * 9, 0.5 * 0.81])
    losses.sum().backward()
    # The first stepped too far towards its target: the clipped branch is larger and carries no gradient.
    close(values.grad, [0, 3, -0.9])


def test_prompt_means_by_hand():
    close(alg.prompt_means(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([7, -1, 7])), [5, 2])
