"""Responses dealt over the ranks anew, so that each has about equal work with them."""

from collections.abc import Callable
from dataclasses import fields, replace

import torch

from repo_fast.collectives import Ranks
from repo_fast.packing.balance import by_prompt, deal
from repo_fast.rollout import Rollout


def over_ranks(rollout: Rollout, work: Callable[[int, int], float], ranks: Ranks, *, together: bool = False) -> Rollout:
    """Deal the responses of all ranks over them anew. All ranks must call it.

    Args:
        rollout: This rank's.
        work: From the tokens of a prompt and of its response.
        ranks: This process among all.
        together: Keep a prompt's responses on one rank.

    Returns:
        This rank's of the same responses; `computed_positions` stays that of what it drew.
    """
    if ranks.size == 1:
        return rollout
    names = [field.name for field in fields(rollout) if field.name != "computed_positions"]
    columns = [getattr(rollout, name) for name in names]
    present = [name for name, column in zip(names, columns, strict=True) if column is not None]
    rows = ranks.gather_list(list(zip(*(column for column in columns if column is not None), strict=True)))
    everyone = {name: [row[place] for row in rows] for place, name in enumerate(present)}
    lengths = zip(everyone["prompt_tokens"], everyone["response_tokens"], strict=True)
    works = [work(prompt.numel(), response.numel()) for prompt, response in lengths]
    prompt_ids = [int(prompt) for prompt in everyone["prompt_ids"]]
    units = by_prompt(prompt_ids) if together else [[index] for index in range(len(works))]
    dealt = deal([sum(works[index] for index in unit) for unit in units], ranks.size)[ranks.rank]
    mine = sorted(index for unit in dealt for index in units[unit])
    chosen = {name: [column[index] for index in mine] for name, column in everyone.items()}
    for name in ("prompt_ids", "finished"):
        dtype = getattr(rollout, name).dtype
        chosen[name] = torch.stack(chosen[name]) if mine else torch.empty(0, dtype=dtype)
    return replace(rollout, **chosen)
