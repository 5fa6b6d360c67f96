"""The GPU backend: the row passes and small ops of `kernels/`, around the products of `sweep.py`.

Runs on CUDA and ROCm tensors, and on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1), which is how it is
tested without a GPU.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from repo_fast.kernels.fused_rectified_policy_loss import policy_rows
from repo_fast.kernels.generalized_advantages import scan_advantages
from repo_fast.kernels.linear_log_probs import gradient_rows, log_prob_rows
from repo_fast.kernels.prompt_violations import mean_violations
from repo_fast.kernels.rectified_policy_loss import combine_streams, count_tokens, loss_of_tokens
from repo_fast.kernels.scale_in_place import scale_in_place
from repo_fast.ops.arguments import FusedArguments, PolicyArguments, RectifiedArguments, StreamsArguments
from repo_fast.ops.loss import select, unsafe_fraction
from repo_fast.ops.sweep import find_rows, gradient_dtype, logits_to_keep, sweep
from repo_fast.ops.validation import check_cu_seqlens, check_range
from repo_fast.ops.violations import given_or_computed


def _device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, PyTorch on that of its arguments."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def prompt_violations(costs: Tensor, prompt_ids: Tensor, scope: str, threshold: float) -> Tensor:
    """Implements the registered op."""
    if scope == "response":
        return costs - threshold
    with _device_of(costs):
        return mean_violations(costs.contiguous(), prompt_ids.contiguous(), threshold, whole_batch=scope == "batch")


def generalized_advantages(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Implements the registered op: one launch for all streams."""
    T = rewards.shape[-1]
    check_cu_seqlens("generalized_advantages", cu_seqlens, T)
    streams = torch.atleast_2d(rewards).contiguous(), torch.atleast_2d(values).contiguous()
    with _device_of(rewards):
        advantages, returns = scan_advantages(*streams, cu_seqlens.contiguous(), gamma, lam)
    return advantages.view(rewards.shape), returns.view(rewards.shape)


def rectified_policy_loss_streams(a: StreamsArguments) -> tuple[Tensor, Tensor]:
    """Implements the registered op: one launch."""
    tensors = (a.reward_advantages, a.cost_advantages, a.sequence_ids, a.violations, a.multiplier)
    rectified = sum(flag << k for k, flag in enumerate(a.rectify))
    with _device_of(a.reward_advantages):
        return combine_streams(*(tensor.contiguous() for tensor in tensors), rectified=rectified, mixed=a.mixed)


def rectified_policy_loss(a: RectifiedArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Implements the registered op. Nothing is read back to the host."""
    S, ids = a.violations.numel(), a.sequence_ids.contiguous()
    if ids.is_cpu:
        check_range("rectified_policy_loss", "sequence_ids of the valid tokens", ids[ids != -1], 0, S, "S")
    with _device_of(a.log_probs):
        counts = count_tokens(ids, None, S)
        tokens, options = _token_arguments(a, ids, a.violations.contiguous(), counts)
        sums, gradient = loss_of_tokens(a.log_probs.contiguous(), *tokens, **options)
        loss, clip_fraction, approx_kl = _statistics(sums, counts)
    return loss, clip_fraction, approx_kl, unsafe_fraction(a.violations), gradient


def _token_arguments(
    a: PolicyArguments, ids: Tensor, violations: Tensor, counts: Tensor
) -> tuple[list[Any], dict[str, Any]]:
    """What the kernels of both policy losses take of the tokens, and the options of the loss."""
    tokens = [
        _solid(a.old_log_probs),
        a.reward_advantages.contiguous(),
        a.cost_advantages.contiguous(),
        ids,
        violations,
        counts,
        a.multiplier,
        a.denominator,
        _solid(a.ref_log_probs) if a.kl_coefficient > 0 else None,
        _solid(a.importance_weights),
    ]
    options = {
        "clip": (a.clip_low, a.clip_high),
        "kl_coefficient": a.kl_coefficient,
        "rectify": a.rectify,
        "mixed": a.surrogate == "mixed",
        "reduction": a.reduction,
    }
    return tokens, options


def scale_gradient(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, a 0-d tensor that is not read back to the host."""
    with _device_of(gradient):
        scale_in_place(gradient, factor)


def _solid(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _statistics(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, clip_fraction, approx_kl) from the sums over tokens, and the counts whose last is of the valid ones."""
    means = sums[1:] / counts[-1].clamp(min=1)
    return sums[0].clone(), means[0].clone(), means[1].clone()


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
    targets = targets.contiguous()
    log_probs = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    entropy = torch.zeros_like(log_probs) if return_entropy else None
    rows = find_rows("linear_log_probs", targets, weight.shape[0])

    def row_pass(logits: Tensor, h: Tensor, start: int, stop: int, out: Tensor) -> None:
        log_prob_rows(logits, h, weight, targets, rows, start, temperature, softcap, log_probs, entropy)

    keep = logits_to_keep(hidden, weight, logits_budget)
    with _device_of(hidden):
        sweep(hidden, weight, rows, row_pass, keep=keep)
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
    targets = targets.contiguous()
    slopes = grad_log_probs.contiguous(), _solid(grad_entropy)
    rows = find_rows("linear_log_probs", targets, weight.shape[0])

    def row_pass(logits: Tensor, h: Tensor, start: int, stop: int, out: Tensor) -> None:
        if out is not logits:
            out.copy_(logits)
        gradient_rows(out, h, weight, targets, rows, start, temperature, softcap, *slopes)

    with _device_of(hidden):
        grad_hidden, grad_weight = sweep(hidden, weight, rows, row_pass, need_hidden, need_weight, kept=kept)
    return grad_hidden.to(hidden.dtype), grad_weight.to(hidden.dtype)


def fused_rectified_policy_loss_and_gradients(a: FusedArguments) -> tuple[Tensor, ...]:
    """Implements the registered op, whose results it returns."""
    op = "fused_rectified_policy_loss"
    violations = given_or_computed(a, prompt_violations).contiguous()
    T, S = a.targets.numel(), violations.numel()
    targets, ids = a.targets.contiguous(), a.sequence_ids.contiguous()
    log_probs = torch.zeros(T, dtype=torch.float32, device=targets.device)
    entropy = torch.zeros_like(log_probs) if a.entropy else None
    terms = log_probs.new_zeros(3, T)
    with _device_of(targets):
        counts = count_tokens(ids, targets, S)
        tokens, options = _token_arguments(a, ids, violations, counts)
        options |= {"entropy_coefficient": a.entropy_coefficient, "gradient": a.need_hidden or a.need_weight}
        rows = find_rows(op, targets, a.weight.shape[0])  # the one wait for the device, after what it can do meanwhile
        if ids.is_cpu:
            check_range(op, "sequence_ids of the valid tokens", select(ids, rows), 0, S, "S")

        def row_pass(logits: Tensor, h: Tensor, start: int, stop: int, out: Tensor) -> None:
            chunk = [logits, h, a.weight, targets, rows, start, a.temperature, a.softcap]
            everything: list[Any] = [*chunk, *tokens, log_probs, entropy, terms]
            policy_rows(*everything, **options)

        grad_hidden, grad_weight = sweep(a.hidden, a.weight, rows, row_pass, a.need_hidden, a.need_weight)
        loss, clip_fraction, approx_kl = _statistics(terms.sum(1), counts)
    kept = gradient_dtype(a.hidden.dtype)
    return (
        loss,
        log_probs,
        log_probs.new_empty(0) if entropy is None else entropy,
        violations,
        clip_fraction,
        approx_kl,
        unsafe_fraction(violations),
        grad_hidden.to(kept),
        grad_weight.to(kept),
    )
