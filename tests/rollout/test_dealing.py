"""Responses are dealt over ranks anew: none lost, none doubled, and no rank has much more work."""

from pathlib import Path

import torch

from repo_fast.collectives import Ranks
from repo_fast.rollout import Rollout
from repo_fast.rollout.dealing import over_ranks
from tests.groups import in_group


def rollout_of(numbers: list[int]) -> Rollout:
    """A response for each number, which gives its length and everything else of it."""
    return Rollout(
        prompt_ids=torch.tensor(numbers, dtype=torch.int64),
        prompts=[f"p{n}" for n in numbers],
        responses=[f"r{n}" for n in numbers],
        prompt_tokens=[torch.tensor([n]) for n in numbers],
        response_tokens=[torch.full((n,), n) for n in numbers],
        finished=torch.tensor([n % 2 == 0 for n in numbers], dtype=torch.bool),
        sampler_log_probs=[torch.full((n,), -float(n)) for n in numbers],
        computed_positions=sum(numbers),
    )


def deal_skewed(rank: int, folder: Path) -> None:
    ranks = Ranks.connect()
    drawn = rollout_of([9, 8, 7, 6] if rank == 0 else [1])
    mine = over_ranks(drawn, lambda prompt, response: response**2, ranks)
    numbers = mine.prompt_ids.tolist()
    expected = rollout_of(numbers)
    for name in ("prompts", "responses"):
        assert getattr(mine, name) == getattr(expected, name)
    for name in ("prompt_tokens", "response_tokens", "sampler_log_probs"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(mine, name), getattr(expected, name), strict=True))
    assert torch.equal(mine.finished, expected.finished) and mine.finished.dtype == torch.bool
    assert mine.computed_positions == drawn.computed_positions
    everyone = ranks.gather_list([numbers])
    assert sorted(n for part in everyone for n in part) == [1, 6, 7, 8, 9]
    work = [sum(n**2 for n in part) for part in everyone]
    assert max(work) <= 117 + 1
    # With fewer responses than ranks, one has none.
    alone = over_ranks(rollout_of([5] if rank == 1 else []), lambda prompt, response: response, ranks)
    assert sorted(ranks.gather_list([alone.prompt_ids.tolist()])) == [[], [5]]


def test_the_responses_of_all_ranks_are_dealt_anew(tmp_path: Path) -> None:
    in_group(2, deal_skewed, tmp_path)


def test_a_single_rank_keeps_its_own() -> None:
    drawn = rollout_of([3, 1])
    assert over_ranks(drawn, lambda prompt, response: response, Ranks(0, 1, torch.device("cpu"), None)) is drawn
