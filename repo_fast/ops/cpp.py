"""The CPU backend in C++: hands buffers to the extension `repo_fast._C` (sources in `csrc/`). The matrix products stay
PyTorch's (`sweep.py`); what happens to a chunk of logits between them, and everything on tokens and responses, is C++.

Arrays are [T], read and written at the tokens in question: nothing is compacted but the rows of the products. As many
threads run as PyTorch would use; results do not depend on their number.
"""

import importlib
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repo_fast.ops.arguments import FusedArguments, PolicyArguments, RectifiedArguments
from repo_fast.ops.loss import rectified_policy_loss_streams as rectified_policy_loss_streams
from repo_fast.ops.loss import valid_rows
from repo_fast.ops.sweep import RowPass, find_rows, gradient_dtype, logits_to_keep, product_dtype, sweep
from repo_fast.ops.validation import check_cu_seqlens
from repo_fast.ops.violations import given_or_computed

_C = importlib.import_module("repo_fast._C")


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory; bfloat16, which NumPy does not have, as uint16."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _vector(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else _array(tensor.contiguous())


def _matrix(tensor: Tensor) -> np.ndarray:
    """As above, with unit stride along the rows."""
    return _array(tensor if tensor.stride(1) == 1 else tensor.contiguous())


def _add_product(high: Tensor, low: Tensor, product: Tensor) -> None:
    """As the function of `sweep.py`, in one pass."""
    _C.add_product(*(_array(tensor.view(-1)) for tensor in (high, low, product)), torch.get_num_threads())


_sweep = partial(sweep, add_product=_add_product)


def _linear_rows(
    weight: Tensor, targets: Tensor, rows: Tensor | None, temperature: float, softcap: float | None
) -> Any:
    narrow = product_dtype(weight) == torch.bfloat16
    return _C.LinearRows(
        _vector(targets),
        _vector(rows),
        _matrix(weight) if narrow else None,
        weight.shape[0],
        temperature,
        softcap,
        torch.get_num_threads(),
    )


def _row_pass(function: Any, *arguments: Any) -> RowPass:
    """function(*arguments, logits, hidden, start) on tensors; only bfloat16 logits need the hidden states.

    With the gradient elsewhere, function(*arguments, out, hidden, start, logits).
    """

    def run(logits: Tensor, hidden: Tensor, start: int, stop: int, out: Tensor) -> None:
        narrow = logits.dtype == torch.bfloat16
        source = () if out is logits else (_array(logits),)
        function(*arguments, _array(out), _matrix(hidden) if narrow else None, start, *source)

    return run


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    return_entropy: bool,
    logits_budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements the registered op: (log_probs [T], entropy [T] or empty, kept logits), one product."""
    rows = find_rows("linear_log_probs", targets, weight.shape[0])
    log_probs = torch.zeros(targets.shape, dtype=torch.float32)
    entropy = torch.zeros_like(log_probs) if return_entropy else None
    linear = _linear_rows(weight, targets, rows, temperature, softcap)
    keep = logits_to_keep(hidden, weight, logits_budget)
    _sweep(hidden, weight, rows, _row_pass(linear.log_probs, _array(log_probs), _vector(entropy)), keep=keep)
    return log_probs, log_probs.new_empty(0) if entropy is None else entropy, keep


def linear_log_probs_backward(
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    kept: Tensor,
    temperature: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Implements the registered op: (grad_hidden [T, D] or empty, grad_weight [V, D] or empty)."""
    rows = find_rows("linear_log_probs", targets, weight.shape[0])
    linear = _linear_rows(weight, targets, rows, temperature, softcap)
    row_pass = _row_pass(linear.backward, _vector(grad_log_probs), _vector(grad_entropy))
    grad_hidden, grad_weight = _sweep(hidden, weight, rows, row_pass, need_hidden, need_weight, kept=kept)
    return grad_hidden.to(hidden.dtype), grad_weight.to(hidden.dtype)


def _policy_tokens(op: str, rows: Tensor | None, a: PolicyArguments, violations: Tensor) -> Any:
    return _C.PolicyTokens(
        op,
        _vector(rows),
        _vector(a.old_log_probs),
        _vector(a.reward_advantages),
        _vector(a.cost_advantages),
        _vector(a.sequence_ids),
        _vector(violations),
        a.multiplier.item(),
        a.rectify,
        a.surrogate == "mixed",
        a.clip_low,
        a.clip_high,
        _vector(a.ref_log_probs) if a.kl_coefficient > 0 else None,
        a.kl_coefficient,
        a.reduction,
        None if a.denominator is None else a.denominator.item(),
        _vector(a.importance_weights),
    )


def rectified_policy_loss(a: RectifiedArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Implements the registered op: (loss, clip_fraction, approx_kl, unsafe_fraction, d loss / d log_probs [T])."""
    tokens = _policy_tokens("rectified_policy_loss", valid_rows(a.sequence_ids != -1), a, a.violations)
    gradient = torch.zeros(a.log_probs.shape, dtype=torch.float32)
    results = _C.rectified_policy_loss(tokens, _vector(a.log_probs), _array(gradient))
    return *_scalars(results), gradient


def _scalars(results: tuple[float, float, float, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, clip_fraction, approx_kl, unsafe_fraction) as float32 tensors."""
    loss, clip_fraction, approx_kl, unsafe_fraction = (torch.tensor(result, dtype=torch.float32) for result in results)
    return loss, clip_fraction, approx_kl, unsafe_fraction


def fused_rectified_policy_loss_and_gradients(a: FusedArguments) -> tuple[Tensor, ...]:
    """Implements the registered op, whose results it returns."""
    op = "fused_rectified_policy_loss"
    rows = find_rows(op, a.targets, a.weight.shape[0])
    violations = given_or_computed(a, prompt_violations)
    log_probs = torch.zeros(a.targets.shape, dtype=torch.float32)
    entropy = torch.zeros_like(log_probs) if a.entropy else None
    fused = _C.FusedPolicyLoss(
        _linear_rows(a.weight, a.targets, rows, a.temperature, a.softcap),
        _policy_tokens(op, rows, a, violations),
        a.entropy_coefficient,
        a.need_hidden or a.need_weight,
        _array(log_probs),
        _vector(entropy),
    )
    grad_hidden, grad_weight = _sweep(a.hidden, a.weight, rows, _row_pass(fused.row_pass), a.need_hidden, a.need_weight)
    loss, clip_fraction, approx_kl, unsafe_fraction = _scalars(fused.results())
    kept = gradient_dtype(a.hidden.dtype)
    return (
        loss,
        log_probs,
        log_probs.new_empty(0) if entropy is None else entropy,
        violations,
        clip_fraction,
        approx_kl,
        unsafe_fraction,
        grad_hidden.to(kept),
        grad_weight.to(kept),
    )


def prompt_violations(costs: Tensor, prompt_ids: Tensor, scope: str, threshold: float) -> Tensor:
    """Implements the registered op: [S] -> [S]."""
    violations = torch.empty(costs.shape, dtype=torch.float32)
    _C.prompt_violations(_vector(costs), _vector(prompt_ids), scope, threshold, _array(violations))
    return violations


def generalized_advantages(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Implements the registered op: (advantages, returns), [T] or [C, T], one backward loop over the tokens of each."""
    check_cu_seqlens("generalized_advantages", cu_seqlens, rewards.shape[-1])
    advantages = torch.empty(rewards.shape, dtype=torch.float32)
    returns = torch.empty(rewards.shape, dtype=torch.float32)
    inputs = (_vector(tensor.reshape(-1)) for tensor in (rewards, values, cu_seqlens))
    _C.generalized_advantages(*inputs, gamma, lam, _array(advantages.view(-1)), _array(returns.view(-1)))
    return advantages, returns
