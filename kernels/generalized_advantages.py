"""Generalized advantage estimation (arXiv 1506.02438) over packed responses: a segmented scan, one launch for all
streams.

A_t = δ_t + γλ·A_{t+1} applies an affine map to the advantage of the token after, and affine maps compose associatively:
(c, x) after (c', x') is (c·c', x + c·x'). One program takes one response of one stream, from its last token to its
first, a tile of tokens at a time, and carries the advantage from tile to tile. So segments need no flags, and what a
response gets does not depend on what it is packed with.

Tried and rejected, on paper: one scan over all tokens with reset flags, whose tiles must wait for each other; doubling
over the whole batch (the torch backend), with ⌈log₂T⌉ passes over memory. Not measured on a GPU yet.
"""

import torch
import triton
import triton.language as tl

TILE = 512


@triton.jit
def _after(later_c, later_x, c, x):
    return later_c * c, x + c * later_x


@triton.jit(do_not_specialize=["T", "S"])
def _advantages_kernel(
    rewards, values, cu_seqlens, advantages, returns, T, S, gamma, decay, TILE: tl.constexpr, LENGTHS: tl.constexpr
):
    # The lengths cannot be looked at from the host without waiting for the device. If any is wrong, all is NaN.
    wrong = 0
    for first in range(0, S, LENGTHS):
        i = first + tl.arange(0, LENGTHS)
        low = tl.load(cu_seqlens + i, mask=i < S, other=0)
        high = tl.load(cu_seqlens + i + 1, mask=i < S, other=0)
        wrong += tl.sum(((low > high) | (low < 0) | (high > T)).to(tl.int32))
    wrong += (tl.load(cu_seqlens) != 0).to(tl.int32) + (tl.load(cu_seqlens + S) != T).to(tl.int32)
    if wrong == 0:
        response = tl.program_id(0)
        stream = tl.program_id(1).to(tl.int64) * T
        start = tl.load(cu_seqlens + response).to(tl.int64)
        stop = tl.load(cu_seqlens + response + 1).to(tl.int64)
        carry = 0.0
        for done in range(0, stop - start, TILE):
            t = stop - 1 - done - tl.arange(0, TILE)  # lane 0 is the latest token
            inside = t >= start
            at = stream + t
            value = tl.load(values + at, mask=inside, other=0.0)
            next_value = tl.load(values + at + 1, mask=inside & (t + 1 < stop), other=0.0)
            delta = tl.load(rewards + at, mask=inside, other=0.0) + gamma * next_value - value
            maps = tl.full([TILE], 1.0, tl.float32) * decay, delta
            reach, sums = tl.associative_scan(maps, 0, _after)
            advantage = sums + reach * carry
            tl.store(advantages + at, advantage, mask=inside)
            tl.store(returns + at, advantage + value, mask=inside)
            carry = tl.sum(tl.where(tl.arange(0, TILE) == TILE - 1, advantage, 0.0))


def scan_advantages(
    rewards: torch.Tensor, values: torch.Tensor, cu_seqlens: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns) of packed responses.

    Args:
        rewards: [C, T] float32, contiguous: C streams.
        values: [C, T] float32, contiguous.
        cu_seqlens: [S+1] int32, contiguous. If it does not rise from 0 to T, all results are NaN.
        gamma: Discount.
        lam: λ of the estimator.

    Returns:
        Two tensors [C, T] float32.
    """
    advantages = torch.full_like(rewards, torch.nan)
    returns = torch.full_like(rewards, torch.nan)
    (C, T), S = rewards.shape, cu_seqlens.numel() - 1
    if C > 0 and S > 0 and T > 0:
        _advantages_kernel[(S, C)](
            rewards, values, cu_seqlens, advantages, returns, T, S, gamma, gamma * lam, TILE=TILE, LENGTHS=1024
        )
    return advantages, returns
