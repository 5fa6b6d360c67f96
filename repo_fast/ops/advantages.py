"""Generalized advantage estimation (Schulman et al., arXiv 1506.02438) over packed responses, without a loop over
tokens.

A_t = δ_t + c·A_{t+1}, with c = γλ and A = 0 past a response's end, is a linear recurrence, so doubling solves it in
⌈log2 T⌉ passes: if A holds the first n terms of each sum, then A_t + cⁿ·A_{t+n} holds the first 2n, as long as t+n is
in the same response.
"""

import torch
from torch import Tensor

from repo_fast.ops.validation import check_cu_seqlens


def generalized_advantages(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Implements the registered op in plain PyTorch: (advantages, returns), [T] or [C, T]."""
    T = rewards.shape[-1]
    check_cu_seqlens("generalized_advantages", cu_seqlens, T)
    if T == 0:
        return torch.empty_like(rewards), torch.empty_like(rewards)
    cu_seqlens = cu_seqlens.contiguous()
    positions = torch.arange(T, device=rewards.device, dtype=cu_seqlens.dtype)
    ends = cu_seqlens[torch.searchsorted(cu_seqlens, positions, right=True).clamp_(max=cu_seqlens.numel() - 1)]

    next_values = torch.zeros_like(values)
    next_values[..., :-1] = torch.where(positions[1:] < ends[:-1], values[..., 1:], 0.0)
    advantages = rewards + gamma * next_values - values
    reach = 1
    decay = gamma * lam
    while reach < T:
        inside = positions[reach:] < ends[:-reach]
        later = torch.where(inside, advantages[..., reach:], 0.0)
        advantages = torch.cat([advantages[..., :-reach] + decay * later, advantages[..., -reach:]], dim=-1)
        decay *= decay
        reach *= 2
    if rewards.is_cuda:  # on the CPU it has been checked
        sound = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T) & (cu_seqlens.diff() >= 0).all()
        advantages = torch.where(sound, advantages, torch.nan)
    return advantages, advantages + values
