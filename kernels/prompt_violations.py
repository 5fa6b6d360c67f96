"""How far each response's cost is above the threshold: v of RePO (arXiv 2410.19933), per response, prompt or batch.

A block of responses compares its prompt ids with all S of them, a tile at a time, and adds the costs that match: S²
comparisons, 17 M for 4096 responses, in one launch and with the sums in the same order every time. A NaN cost reaches
the responses of its own prompt only, because other costs are selected, not multiplied. A cost of −inf does not apply,
and is not selected; its own response has a violation of −inf, unless the mean of the others is NaN.

Tried and rejected, on paper: a sort and segmented sums (five launches), atomics (not the same bits every time).
"""

import torch
import triton
import triton.language as tl

BLOCK = 32
TILE = 128


@triton.jit(do_not_specialize=["S"])
def _violations_kernel(
    costs, prompt_ids, violations, S, threshold, WHOLE_BATCH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    my_ids = tl.load(prompt_ids + mine, mask=mine < S, other=0)
    sums = tl.zeros([BLOCK, TILE], tl.float32)
    counts = tl.zeros([BLOCK, TILE], tl.float32)
    for start in range(0, S, TILE):
        others = start + tl.arange(0, TILE)
        ids = tl.load(prompt_ids + others, mask=others < S, other=0)
        cost = tl.load(costs + others, mask=others < S, other=0.0)
        match = ((others < S) & (cost != float("-inf")))[None, :] & (mine < S)[:, None]
        if not WHOLE_BATCH:
            match = match & (my_ids[:, None] == ids[None, :])
        sums += tl.where(match, cost[None, :], 0.0)
        counts += match.to(tl.float32)
    count = tl.sum(counts, axis=1)
    means = tl.where(count > 0.0, tl.sum(sums, axis=1) / tl.maximum(count, 1.0), float("-inf"))
    exempt = tl.load(costs + mine, mask=mine < S, other=0.0) == float("-inf")
    means = tl.where(exempt & (means == means), float("-inf"), means)
    tl.store(violations + mine, means - threshold, mask=mine < S)


def mean_violations(
    costs: torch.Tensor, prompt_ids: torch.Tensor, threshold: float, *, whole_batch: bool
) -> torch.Tensor:
    """The mean cost over the responses of the same prompt, or of the whole batch, less the threshold.

    Args:
        costs: [S] float32, contiguous.
        prompt_ids: [S] int64, contiguous, in any order.
        threshold: In units of cost.
        whole_batch: Whether the mean is over all responses.

    Returns:
        [S] float32.
    """
    violations = torch.empty_like(costs)
    S = costs.numel()
    if S > 0:
        grid = (triton.cdiv(S, BLOCK),)
        _violations_kernel[grid](
            costs, prompt_ids, violations, S, threshold, WHOLE_BATCH=whole_batch, BLOCK=BLOCK, TILE=TILE
        )
    return violations
