"""The example that has no trainer: it learns, and the multiplier is what keeps it safe."""

import torch

from examples.bare_model import train as example


def mean_of_last(history, name):
    return sum(row[name] for row in history[-5:]) / 5


def test_rewards_rise_and_costs_stay_about_the_threshold_with_a_multiplier_alone():
    rectified, rewarded = (example.train(40, multiplier) for multiplier in (1.0, 0.0))
    assert rectified[0]["reward"] == rewarded[0]["reward"]  # the same start
    assert mean_of_last(rectified, "reward") > 2 * rectified[0]["reward"]
    assert mean_of_last(rectified, "cost") < 1.5 * example.THRESHOLD
    assert mean_of_last(rewarded, "cost") > 3 * example.THRESHOLD
    multipliers = [row["multiplier"] for row in rectified]
    assert multipliers == sorted(multipliers) and multipliers[-1] > multipliers[0]
    assert {row["multiplier"] for row in rewarded} == {0.0}


def test_scores_of_a_hand_worked_batch():
    useful, harmful, other = example.USEFUL[0], example.HARMFUL[0], 5
    tokens = torch.tensor([[useful, other, harmful, other], [useful, harmful, harmful, harmful]])
    valid = torch.tensor([[True, True, True, True], [True, False, False, False]])
    rewards, costs = example.score(tokens, valid)
    assert rewards.tolist() == [(1 + example.HARM_BONUS) / 4, 1.0]
    assert costs.tolist() == [0.25, 0.0]
