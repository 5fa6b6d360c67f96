"""Units of responses: their order and seeds, whatever draws them."""

import torch

from repo_fast.collectives import Ranks
from repo_fast.data import Prompt
from repo_fast.rollout import Request
from repo_fast.rollout.hf import uniform_numbers
from repo_fast.rollout.seeds import Purpose, response_seeds
from repo_fast.rollout.units import Unit, drawn_in_turn, units_of

REQUESTS = [Request(Prompt(i, "x" * length), torch.tensor([1])) for i, length in enumerate((3, 1, 2, 1, 9))]


def test_units_are_blocks_of_prompts_shortest_first_for_each_sample() -> None:
    units = units_of(REQUESTS, samples_per_prompt=2, size=2, seed=7)
    assert [[request.prompt.id for request in unit.requests] for unit in units] == 2 * [[1, 3], [2, 0], [4]]
    assert [unit.sample for unit in units] == [0, 0, 0, 1, 1, 1]
    # More samples are further units, of other seeds.
    assert units_of(REQUESTS, 1, 2, 7) == units[:3]
    others = units_of(REQUESTS, 2, 2, 8)
    assert len({seed for unit in units + others for seed in unit.seeds}) == 20


def test_every_response_has_a_seed_of_its_own() -> None:
    asked = [(seed, purpose, number) for seed in (0, 1, 2**40) for purpose in Purpose for number in (0, 1, 30)]
    drawn = [tuple(response_seeds(64, *which)) for which in asked]
    assert len({seed for seeds in drawn for seed in seeds}) > 64 * len(asked) - 3
    assert all(0 <= seed < 2**32 for seeds in drawn for seed in seeds)
    # Of more responses the first are the same.
    assert response_seeds(7, *asked[4]) == list(drawn[4][:7])


def test_units_come_in_turn_and_those_that_are_left_are_the_same() -> None:
    ranks = Ranks(0, 1, torch.device("cpu"))

    def draw(unit: Unit | None) -> list[float]:
        assert unit is not None
        return uniform_numbers(unit.seeds, 1)[:, 0].tolist()

    units = units_of(REQUESTS, 2, 2, 0)
    every = [rows for drawn in drawn_in_turn(units, ranks, draw) for rows in drawn]
    assert [rows for drawn in drawn_in_turn(units[4:], ranks, draw) for rows in drawn] == every[4:]
    assert len({value for rows in every for value in rows}) == 10
