"""How far each response's cost is above the threshold, per response, per prompt, or over the batch: step 3 of the
algorithm.

Responses are gathered from all ranks before anything is averaged, as pairs of id and cost: S of them, 16 bytes each.
Every rank then adds the same numbers in the same order, so all ranks hold the same bits of a mean, and the same code
serves one rank and many.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from repo_fast.ops.arguments import FusedArguments
from repo_fast.ops.loss import sum_by_index


def prompt_means(costs: Tensor, prompt_ids: Tensor) -> Tensor:
    """The mean of `costs` [S] over the responses with the same id, at each response. Never waits for the device.

    A cost of −inf does not count; without any other the mean is −inf.
    """
    S = costs.numel()
    if S == 0:
        return torch.zeros_like(costs)
    ids, order = torch.sort(prompt_ids, stable=True)
    first = torch.ones_like(ids, dtype=torch.bool)
    torch.ne(ids[1:], ids[:-1], out=first[1:])
    prompt = first.cumsum(0) - 1
    values, applies = _applicable(costs[order])
    means = _mean(sum_by_index(values, prompt, S), sum_by_index(applies, prompt, S))
    return torch.empty_like(means).scatter_(0, order, means[prompt])


def _applicable(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Costs with 0 for what does not apply, and 1 for what does, 0 for what does not."""
    exempt = costs == -torch.inf
    return costs.masked_fill(exempt, 0.0), (~exempt).to(costs.dtype)


def _mean(sums: Tensor, counts: Tensor) -> Tensor:
    return (sums / counts).masked_fill(counts == 0, -torch.inf)


def prompt_violations(costs: Tensor, prompt_ids: Tensor, scope: str, threshold: float) -> Tensor:
    """Implements the registered op on one rank's responses, or on those of all ranks together: [S] -> [S].

    What a cost of −inf says, that the constraint does not apply, holds for its response whatever the mean of the others
    is, unless that is NaN.
    """
    if scope == "response":
        means = costs
    elif scope == "prompt":
        means = prompt_means(costs, prompt_ids)
    else:
        values, applies = _applicable(costs)
        means = _mean(values.sum(), applies.sum()).expand_as(costs)
    return means.masked_fill((costs == -torch.inf) & ~means.isnan(), -torch.inf) - threshold


def given_or_computed(a: FusedArguments, compute: Callable[[Tensor, Tensor, str, float], Tensor]) -> Tensor:
    """The violations that the fused op works with: a copy of those given, or what a backend computes of the costs."""
    if a.violations is not None:
        return a.violations.clone()  # an output of the op must not be one of its inputs
    if a.costs is None or a.prompt_ids is None:
        raise ValueError("fused_rectified_policy_loss: give violations, or costs and prompt_ids")
    return compute(a.costs, a.prompt_ids, a.scope, a.threshold)


def gather_responses(costs: Tensor, prompt_ids: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, slice]:
    """All ranks' costs [K, S] and prompt ids [S] in rank order, and where this rank's are.

    Ranks may differ in S, even be 0.
    """
    world, (K, S) = dist.get_world_size(group), costs.shape
    sizes = [costs.new_zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(sizes, costs.new_full((1,), S, dtype=torch.int64), group=group)
    counts = cast(list[int], torch.cat(sizes).tolist())
    # The collectives want equal shapes, and one call is cheaper than two: costs travel as the bits of integers.
    payload = costs.new_zeros(max(counts), 1 + K, dtype=torch.int64)
    payload[:S, 0] = prompt_ids
    payload[:S, 1:] = costs.T.contiguous().view(torch.int32).to(torch.int64)
    parts = [torch.empty_like(payload) for _ in range(world)]
    dist.all_gather(parts, payload, group=group)
    everything = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    start = sum(counts[: dist.get_rank(group)])
    all_costs = everything[:, 1:].to(torch.int32).view(torch.float32).T.contiguous()
    return all_costs, everything[:, 0].contiguous(), slice(start, start + S)
