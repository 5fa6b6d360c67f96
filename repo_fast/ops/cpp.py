"""The CPU backend in C++: hands contiguous buffers to the extension `repo_fast._C` (sources in `csrc/`)."""

import importlib

import torch
from torch import Tensor

from repo_fast.ops.validation import check_cu_seqlens

_C = importlib.import_module("repo_fast._C")


def generalized_advantages(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Implements the registered op: (advantages [T], returns [T]), one backward loop over the tokens."""
    check_cu_seqlens("generalized_advantages", cu_seqlens, rewards.numel())
    advantages = torch.empty(rewards.shape, dtype=torch.float32)
    returns = torch.empty(rewards.shape, dtype=torch.float32)
    inputs = (tensor.detach().contiguous().numpy() for tensor in (rewards, values, cu_seqlens))
    _C.generalized_advantages(*inputs, gamma, lam, advantages.numpy(), returns.numpy())
    return advantages, returns
