"""The GPU backend: the row passes and small ops of `kernels/`, around the products of `sweep.py`.

Runs on CUDA and ROCm tensors, and on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1), which is how it is
tested without a GPU.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from repo_fast.kernels.fused_rectified_policy_loss import policy_rows
from repo_fast.kernels.generalized_advantages import scan_advantages
from repo_fast.kernels.linear_log_probs import gradient_rows, log_prob_rows
from repo_fast.kernels.prompt_violations import mean_violations
from repo_fast.kernels.rectified_policy_loss import count_tokens, loss_of_tokens
from repo_fast.kernels.scale_in_place import scale_in_place
from repo_fast.ops.loss import select, unsafe_fraction
from repo_fast.ops.sweep import find_rows, gradient_dtype, sweep
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


def rectified_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    reward_advantages: Tensor,
    cost_advantages: Tensor,
    sequence_ids: Tensor,
    violations: Tensor,
    multiplier: Tensor,
    rectify: bool,
    surrogate: str,
    clip_low: float,
    clip_high: float,
    ref_log_probs: Tensor | None,
    kl_coefficient: float,
    reduction: str,
    denominator: Tensor | None,
    importance_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Implements the registered op. Nothing is read back to the host."""
    S = violations.numel()
    if sequence_ids.is_cpu:
        check_range(
            "rectified_policy_loss",
            "sequence_ids of the valid tokens",
            sequence_ids[sequence_ids != -1],
            0,
            S,
            "S",
        )
    ids = sequence_ids.contiguous()
    with _device_of(log_probs):
        counts = count_tokens(ids, None, S)
        sums, gradient = loss_of_tokens(
            log_probs.contiguous(),
            _solid(old_log_probs),
            reward_advantages.contiguous(),
            cost_advantages.contiguous(),
            ids,
            violations.contiguous(),
            counts,
            multiplier,
            denominator,
            _solid(ref_log_probs) if kl_coefficient > 0 else None,
            _solid(importance_weights),
            clip=(clip_low, clip_high),
            kl_coefficient=kl_coefficient,
            rectify=rectify,
            mixed=surrogate == "mixed",
            reduction=reduction,
        )
    loss, clip_fraction, approx_kl = _statistics(sums, counts)
    return loss, clip_fraction, approx_kl, unsafe_fraction(violations), gradient


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
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, return_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Implements the registered op: (log_probs [T], entropy [T] or empty), one product."""
    rows = find_rows("linear_log_probs", targets, weight.shape[0])
    targets = targets.contiguous()
    log_probs = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    entropy = torch.zeros_like(log_probs) if return_entropy else None

    def row_pass(logits: Tensor, h: Tensor, start: int, stop: int) -> None:
        log_prob_rows(logits, h, weight, targets, rows, start, temperature, log_probs, entropy)

    with _device_of(hidden):
        sweep(hidden, weight, rows, row_pass)
    return log_probs, log_probs.new_empty(0) if entropy is None else entropy


def linear_log_probs_backward(
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Implements the registered op: (grad_hidden [T, D] or empty, grad_weight [V, D] or empty)."""
    rows = find_rows("linear_log_probs", targets, weight.shape[0])
    targets = targets.contiguous()
    slopes = grad_log_probs.contiguous(), _solid(grad_entropy)

    def row_pass(logits: Tensor, h: Tensor, start: int, stop: int) -> None:
        gradient_rows(logits, h, weight, targets, rows, start, temperature, *slopes)

    with _device_of(hidden):
        grad_hidden, grad_weight = sweep(hidden, weight, rows, row_pass, need_hidden, need_weight)
    return grad_hidden.to(hidden.dtype), grad_weight.to(hidden.dtype)


def fused_rectified_policy_loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_log_probs: Tensor | None,
    reward_advantages: Tensor,
    cost_advantages: Tensor,
    sequence_ids: Tensor,
    costs: Tensor | None,
    prompt_ids: Tensor | None,
    multiplier: Tensor,
    scope: str,
    threshold: float,
    rectify: bool,
    surrogate: str,
    clip_low: float,
    clip_high: float,
    temperature: float,
    ref_log_probs: Tensor | None,
    kl_coefficient: float,
    entropy_coefficient: float,
    reduction: str,
    denominator: Tensor | None,
    violations: Tensor | None,
    importance_weights: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Implements the registered op, whose results it returns."""
    op = "fused_rectified_policy_loss"
    rows = find_rows(op, targets, weight.shape[0])
    violations = given_or_computed(violations, prompt_violations, costs, prompt_ids, scope, threshold).contiguous()
    T, S = targets.numel(), violations.numel()
    if sequence_ids.is_cpu:
        check_range(op, "sequence_ids of the valid tokens", select(sequence_ids, rows), 0, S, "S")
    targets, ids = targets.contiguous(), sequence_ids.contiguous()
    log_probs = torch.zeros(T, dtype=torch.float32, device=hidden.device)
    entropy = torch.zeros_like(log_probs)
    terms = torch.zeros(3, T, dtype=torch.float32, device=hidden.device)
    tokens = (
        _solid(old_log_probs),
        reward_advantages.contiguous(),
        cost_advantages.contiguous(),
        ids,
        violations,
    )
    options = multiplier, denominator, _solid(ref_log_probs) if kl_coefficient > 0 else None, _solid(importance_weights)

    with _device_of(hidden):
        counts = count_tokens(ids, targets, S)

        def row_pass(logits: Tensor, h: Tensor, start: int, stop: int) -> None:
            policy_rows(
                logits,
                h,
                weight,
                targets,
                rows,
                start,
                temperature,
                *tokens,
                counts,
                *options,
                log_probs,
                entropy,
                terms,
                clip=(clip_low, clip_high),
                kl_coefficient=kl_coefficient,
                entropy_coefficient=entropy_coefficient,
                rectify=rectify,
                mixed=surrogate == "mixed",
                reduction=reduction,
                gradient=need_hidden or need_weight,
            )

        grad_hidden, grad_weight = sweep(hidden, weight, rows, row_pass, need_hidden, need_weight)
    loss, clip_fraction, approx_kl = _statistics(terms.sum(1), counts)
    kept = gradient_dtype(hidden.dtype)
    return (
        loss,
        log_probs,
        entropy,
        violations,
        clip_fraction,
        approx_kl,
        unsafe_fraction(violations),
        grad_hidden.to(kept),
        grad_weight.to(kept),
    )
