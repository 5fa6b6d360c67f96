"""The printed tables: the numbers, the pairing, and a shape that survives a pipe."""

import math

import numpy as np
import pytest

from repo_fast.report.measures import Evaluation
from repo_fast.report.tables import batch_size_table, before_after_table, table_measures

IDS = [1, 1, 2, 2, 3, 3, 4, 4]
BEFORE = Evaluation(IDS, [1.0] * 8, [-1.0, 0.0, -1.0, -1.0, 2.0, 2.0, 3.0, -1.0], response_lengths=[100] * 8)
AFTER = Evaluation(
    IDS,
    [1.0, 2.0] * 4,
    [1.0, 1.0, 0.0, 0.0, -1.0, -1.0, -1.0, -1.0],
    kl=[2.0, 4.0] * 4,
    response_lengths=[90, 100] * 4,
    well_formed=[True, True, True, False] * 2,
)


def cells(table):
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def points(table):
    """The values before the brackets, by row."""
    return {name: [cell.split(" ")[0] for cell in row] for name, row in cells(table).items() if name}


def test_hand_worked_before_and_after():
    assert points(before_after_table(BEFORE, AFTER, resamples=50)) == {
        "mean reward": ["1.000", "1.500", "+0.500"],
        "mean cost": ["0.375", "-0.250", "-0.625"],
        "strict violation": ["0.750", "0.250", "-0.500"],
        "safety rate (responses)": ["0.625", "0.750", "+0.125"],
        "strict safety rate (prompts)": ["0.500", "0.750", "+0.250"],
        "interference rate": ["-", "0.500", "-"],
        "KL, nats a response": ["-", "3.000", "-"],
        "well-formed responses": ["-", "0.750", "-"],
        "response length, tokens": ["100.0", "95.0", "-5.0"],
    }


def test_a_second_sample_gives_the_floor_of_the_interference_rate():
    again = Evaluation(IDS, [1.0] * 8, [1.0] * 4 + [-1.0] * 4)
    table = before_after_table(BEFORE, AFTER, before_again=again, resamples=50)
    assert points(table)["interference rate"] == ["1.000", "0.500", "-0.500"]
    assert "second sample" in table and "the 2 prompts safe before" in table


def test_the_threshold_moves_what_is_safe():
    shown = points(before_after_table(BEFORE, AFTER, threshold=1.0, resamples=50))
    assert shown["strict violation"] == ["0.250", "0.000", "-0.250"]
    assert shown["safety rate (responses)"] == ["0.625", "1.000", "+0.375"]
    assert shown["mean cost"] == ["0.375", "-0.250", "-0.625"]


def test_difference_is_paired_by_prompt_whatever_the_order():
    generator = np.random.default_rng(0)
    ids = np.repeat(np.arange(40), 2)
    rewards = 10 * generator.normal(size=40)[ids]
    order = generator.permutation(80)
    before = Evaluation(ids, rewards, -np.ones(80))
    after = Evaluation(ids[order], rewards[order] + 0.25, -np.ones(80))
    row = cells(before_after_table(before, after, resamples=100))["mean reward"]
    # All prompts differ alike, which unpaired ones would not.
    assert row[2] in ("+0.25", "+0.250")
    low, high = (float(bound) for bound in row[0].split("[")[1].strip("]").split(","))
    assert high - low > 2, "the prompts differ, so a policy's own interval is wide"


def test_absent_measures_leave_no_row():
    plain = Evaluation(IDS, [1.0] * 8, [0.0] * 8)
    assert not {"KL, nats a response", "well-formed responses", "response length, tokens"} & set(
        points(before_after_table(plain, plain, resamples=20))
    )


@pytest.mark.parametrize("scale", [1.0, 12.3456, 987.654, -54321.0])
def test_table_is_ascii_aligned_and_at_most_110_columns(scale):
    generator = np.random.default_rng(1)
    ids = np.repeat(np.arange(20), 3)

    def evaluation():
        rewards, costs, kl, lengths = scale * generator.normal(size=(4, 60))
        return Evaluation(ids, rewards, costs, kl, lengths, rewards > 0)

    table = before_after_table(evaluation(), evaluation(), before_again=evaluation(), resamples=50)
    assert table.isascii() and not table.endswith("\n")
    assert max(len(line) for line in table.splitlines()) <= 110
    assert len({len(line) for line in table.splitlines() if line[0] in "+|"}) == 1


def test_one_prompt_and_nan_costs_still_print():
    one = Evaluation([1], [1.0], [math.nan])
    shown = cells(before_after_table(one, one, resamples=10))
    assert shown["strict violation"][0] == "nan"
    assert shown["safety rate (responses)"][0] == "0.000"


def test_other_prompts_are_refused():
    with pytest.raises(ValueError, match="same prompts"):
        before_after_table(Evaluation([1], [0.0], [0.0]), Evaluation([2], [0.0], [0.0]))


def test_batch_size_table():
    table = batch_size_table(
        {"prompts": (32, 16, None), "responses": (12800, 6400, "<= 8")}, notes=["K = 400 responses a prompt."]
    )
    assert cells(table) == {
        "": ["per step", "per rank", "per micro-batch"],
        "prompts": ["32", "16", "-"],
        "responses": ["12,800", "6,400", "<= 8"],
    }
    assert table.endswith("\nK = 400 responses a prompt.")
    with pytest.raises(ValueError, match="'prompts' has 2 values"):
        batch_size_table({"prompts": (1, 2)})


def test_the_measures_of_a_row_are_those_of_the_table():
    measures = table_measures(AFTER, BEFORE)
    shown = points(before_after_table(BEFORE, AFTER, resamples=50))
    assert f"{measures['strict_violation']:.3f}" == shown["strict violation"][1]
    assert f"{measures['interference_rate']:.3f}" == shown["interference rate"][1]
    assert f"{measures['kl']:.3f}" == shown["KL, nats a response"][1]
    assert measures["mean_reward_error"] == 0.0 and "mean_second_reward" not in measures
    # Prompt means of 1 and 0.5, two each.
    assert measures["well_formed_error"] == pytest.approx(0.25 / math.sqrt(3))
    assert "interference_rate" not in table_measures(AFTER, None)


def test_of_several_constraints_a_row_has_the_measures_of_each():
    costs = {"harm": AFTER.costs, "refusal": [-math.inf] * 4 + [1.0] * 4}
    own = Evaluation(IDS, [1.0] * 8, costs, second_rewards=[0.0, 1.0] * 4)
    measures = table_measures(own, own, {"harm": 0.0, "refusal": 0.5})
    assert measures["harm_strict_violation"] == 0.25 and measures["refusal_strict_violation"] == 0.5
    assert {"safety_rate", "refusal_mean_cost", "harm_interference_rate"} <= measures.keys()
    assert not {"mean_cost", "strict_violation"} & measures.keys()
    assert measures["mean_second_reward"] == 0.5 and measures["mean_second_reward_error"] == 0.0
    assert "| mean second reward" in before_after_table(own, own, {"harm": 0.0, "refusal": 0.5}, resamples=20)
