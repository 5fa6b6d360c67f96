"""Evens out work: over the ranks, and over the micro-batches of a rank.

Work is a number for each sequence, such as the operations of its forward: attention grows with the square of a length,
so equal numbers of tokens are not equal work where sequences are long. Longest processing time first: the largest goes
first, each to where there is least. The result depends on the numbers alone, so all ranks come to the same.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from repo_fast.collectives import Ranks

Item = TypeVar("Item")


def deal(work: Sequence[float], parts: int) -> list[list[int]]:
    """Deal items over so many parts, of about equal work; the items of a part are ascending."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    totals = [0.0] * parts
    for index in sorted(range(len(work)), key=lambda index: -work[index]):
        part = totals.index(min(totals))
        dealt[part].append(index)
        totals[part] += work[index]
    return [sorted(part) for part in dealt]


def share_out(items: Sequence[Item], work: Callable[[Item], float], ranks: Ranks) -> list[Item]:
    """This rank's of items that all ranks have, in their order; every rank has about equal work."""
    return [items[index] for index in deal([work(item) for item in items], ranks.size)[ranks.rank]]


def split_by_tokens(lengths: Sequence[int], budget: int, work: Sequence[float] | None = None) -> list[list[int]]:
    """Deal sequences over as few rows as the budget allows, of about equal work.

    A sequence longer than the budget gets a row of its own.

    Args:
        lengths: Tokens of each sequence.
        budget: Largest row (tokens).
        work: Of each sequence; None: its tokens.

    Returns:
        Lists of indices, ascending within a row; none is empty.
    """
    if not lengths:
        return []
    work = lengths if work is None else work
    order = sorted(range(len(lengths)), key=lambda index: (-work[index], -lengths[index]))
    for rows in range(min(len(lengths), -(-sum(lengths) // budget)), len(lengths) + 1):
        filled: list[list[int]] = [[] for _ in range(rows)]
        tokens, totals = [0] * rows, [0.0] * rows
        for index in order:
            row = _least(totals, tokens, lengths[index], budget)
            if row is None:
                break
            filled[row].append(index)
            tokens[row] += lengths[index]
            totals[row] += work[index]
        else:
            break
    return [sorted(row) for row in filled if row]


def by_prompt(prompt_ids: Sequence[int]) -> list[list[int]]:
    """The responses of each prompt, in order of the prompts' first."""
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompt_ids):
        groups.setdefault(prompt, []).append(index)
    return list(groups.values())


def within_budget(unit: Sequence[int], prompt: int, responses: Sequence[int], budget: int) -> list[list[int]]:
    """Cut responses that share a prompt into parts that fit a row, one response at least in each.

    Args:
        unit: Indices of the responses.
        prompt: Tokens of their prompt, which each part repeats.
        responses: Tokens of all responses, by index.
        budget: Largest row (tokens).
    """
    parts: list[list[int]] = []
    room = 0
    for index in unit:
        if not parts or responses[index] > room:
            parts.append([])
            room = budget - prompt
        parts[-1].append(index)
        room -= responses[index]
    return parts


def micro_batches(
    prompts: Sequence[int],
    responses: Sequence[int],
    budget: int,
    work: Callable[[int], float],
    sharing: Sequence[int] | None = None,
) -> list[list[int]]:
    """Deal a rank's responses over packed rows of about equal work.

    Args:
        prompts: Tokens of each response's prompt.
        responses: Tokens of each response.
        budget: Largest row (tokens).
        work: From the tokens of a sequence.
        sharing: The id of each response's prompt, where responses in one row share it: they follow each other, and
            their prompt counts once. None: none do.

    Returns:
        Lists of indices; none is empty.
    """
    units = [[index] for index in range(len(responses))]
    if sharing is not None:
        units = [
            part for unit in by_prompt(sharing) for part in within_budget(unit, prompts[unit[0]], responses, budget)
        ]
    lengths = [prompts[unit[0]] + sum(responses[i] for i in unit) for unit in units]
    works = [
        sum(work(prompts[i] + responses[i]) for i in unit) - (len(unit) - 1) * work(prompts[unit[0]]) for unit in units
    ]
    return [[index for unit in row for index in units[unit]] for row in split_by_tokens(lengths, budget, works)]


def _least(totals: Sequence[float], tokens: Sequence[int], length: int, budget: int) -> int | None:
    """The row with least work among those with room: an empty one has it for anything."""
    fitting = [row for row in range(len(totals)) if tokens[row] == 0 or tokens[row] + length <= budget]
    return min(fitting, key=lambda row: totals[row], default=None)
