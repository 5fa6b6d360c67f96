"""Units of responses: their order and seeds, whatever draws them."""

import torch

from repo_fast.collectives import Ranks
from repo_fast.data import Prompt
from repo_fast.rollout import Request
from repo_fast.rollout.units import Unit, drawn_in_turn, units_of

REQUESTS = [Request(Prompt(i, "x" * length), torch.tensor([1])) for i, length in enumerate((3, 1, 2, 1, 9))]


def test_units_are_blocks_of_prompts_shortest_first_for_each_sample() -> None:
    units = units_of(REQUESTS, samples_per_prompt=2, size=2, seed=7)
    assert [[request.prompt.id for request in unit.requests] for unit in units] == 2 * [[1, 3], [2, 0], [4]]
    assert [unit.sample for unit in units] == [0, 0, 0, 1, 1, 1]
    # More samples are further units, of other random states.
    assert units_of(REQUESTS, 1, 2, 7) == units[:3]
    assert len({unit.seed for unit in units}) == 6
    assert not {unit.seed for unit in units} & {unit.seed for unit in units_of(REQUESTS, 2, 2, 8)}


def test_units_come_in_turn_and_those_that_are_left_are_the_same() -> None:
    ranks = Ranks(0, 1, torch.device("cpu"))

    def draw(unit: Unit | None) -> list[float]:
        assert unit is not None
        generator = torch.Generator().manual_seed(unit.seed)
        return torch.rand(len(unit.requests), generator=generator).tolist()

    units = units_of(REQUESTS, 2, 2, 0)
    every = [rows for drawn in drawn_in_turn(units, ranks, draw) for rows in drawn]
    assert [rows for drawn in drawn_in_turn(units[4:], ranks, draw) for rows in drawn] == every[4:]
    assert len({value for rows in every for value in rows}) == 10
