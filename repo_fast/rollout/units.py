"""Responses to held-out prompts in *units*, each drawn at once.

A unit is one response to each prompt of a block, and its seeds depend on that of the job and its number alone; what is
computed together does not depend on the number of ranks. So what is drawn of a policy is, to the bit, the same whatever
was drawn before and wherever a kill came in between; and training and evaluation draw the same responses of the same
weights. More samples a prompt are further units.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from repo_fast.collectives import Ranks
from repo_fast.rollout import Request
from repo_fast.rollout.seeds import Purpose, response_seeds

Item = TypeVar("Item")


@dataclass(frozen=True)
class Unit:
    """What is drawn at once.

    Attributes:
        sample: Which of the responses to each of its prompts, from 0.
        requests: One for each prompt of a block.
        seeds: Of each response.
    """

    sample: int
    requests: list[Request]
    seeds: list[int]


def units_of(requests: Sequence[Request], samples_per_prompt: int, size: int, seed: int) -> list[Unit]:
    """Units in the order in which they are drawn: first one response to every prompt, then a second, ...

    Args:
        requests: One for each prompt.
        samples_per_prompt: K, responses to each.
        size: Prompts of a block. The shortest texts come first: neighbours are generated together.
        seed: Of the job.
    """
    ordered = sorted(requests, key=lambda request: len(request.prompt.text))
    blocks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    parts = [(sample, block) for sample in range(samples_per_prompt) for block in blocks]
    return [
        Unit(sample, block, response_seeds(len(block), seed, Purpose.UNIT, number))
        for number, (sample, block) in enumerate(parts)
    ]


def grouped(items: Sequence[Item], size: Callable[[Item], int], at_least: int) -> Iterator[list[Item]]:
    """Items in groups that follow each other, each of at least so much by their sizes, but the last."""
    group: list[Item] = []
    for item in items:
        group.append(item)
        if sum(map(size, group)) >= at_least:
            yield group
            group = []
    if group:
        yield group


def drawn_in_turn(
    items: Sequence[Item], ranks: Ranks, draw: Callable[[Item | None], Sequence[Any]]
) -> Iterator[list[list[Any]]]:
    """Draw what is left, an item on each rank at a time. All ranks must go through all of them.

    Args:
        items: Units, or groups of them.
        ranks: This process among all.
        draw: Gives the rows of an item, of which there is at least one. A rank that has none left is given None, and
            takes part in what all ranks have to call.

    Yields:
        On every rank the rows of as many items as there are ranks, in order; of the last ones, of those that are left.
    """
    for first in range(0, len(items), ranks.size):
        mine = items[first + ranks.rank] if first + ranks.rank < len(items) else None
        yield [rows for rows in ranks.gather_list([draw(mine)]) if rows]
