"""The ops as `torch.ops.repo_fast.*`: schemas, fake kernels and autograd formulas, common to all backends.

These take and return plain tensors, none an alias of an input; the public functions in `__init__.py` check arguments,
name the outputs, and pick the backend, which travels as the last argument. Autocast is off inside: dtypes are the
caller's choice.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from repo_fast.ops.chunked import gradient_dtype
from repo_fast.ops.dispatch import implementation


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast reaches into a custom op, where it would turn float32 products into narrower ones."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        device_type = args[0].device.type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


@torch.library.custom_op("repo_fast::linear_log_probs", mutates_args=())
@_without_autocast
def linear_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, return_entropy: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return implementation("linear_log_probs", backend)(hidden, weight, targets, temperature, return_entropy)


@linear_log_probs.register_fake
def _(hidden, weight, targets, temperature, return_entropy, backend):
    log_probs = torch.empty_like(targets, dtype=torch.float32, memory_format=torch.contiguous_format)
    return log_probs, torch.empty_like(log_probs) if return_entropy else log_probs.new_empty(0)


@torch.library.custom_op("repo_fast::linear_log_probs_backward", mutates_args=())
@_without_autocast
def linear_log_probs_backward(
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return implementation("linear_log_probs_backward", backend)(
        grad_log_probs, grad_entropy, hidden, weight, targets, temperature, need_hidden, need_weight
    )


@linear_log_probs_backward.register_fake
def _(grad_log_probs, grad_entropy, hidden, weight, targets, temperature, need_hidden, need_weight, backend):
    return (
        hidden.new_empty(hidden.shape) if need_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else weight.new_empty(0),
    )


def _setup_linear_log_probs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, targets, ctx.temperature, ctx.return_entropy, ctx.backend = inputs
    ctx.save_for_backward(hidden, weight, targets)
    ctx.set_materialize_grads(False)
    if not ctx.return_entropy:
        ctx.mark_non_differentiable(output[1])


def _linear_log_probs_autograd(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
    hidden, weight, targets = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    if not ctx.return_entropy:
        grad_entropy = None
    if grad_log_probs is None:
        if grad_entropy is None:
            return (None,) * 6
        grad_log_probs = torch.zeros_like(grad_entropy)
    grad_hidden, grad_weight = linear_log_probs_backward(
        grad_log_probs, grad_entropy, hidden, weight, targets, ctx.temperature, need_hidden, need_weight, ctx.backend
    )
    return grad_hidden if need_hidden else None, grad_weight if need_weight else None, None, None, None, None


linear_log_probs.register_autograd(_linear_log_probs_autograd, setup_context=_setup_linear_log_probs)


@torch.library.custom_op("repo_fast::prompt_violations", mutates_args=())
@_without_autocast
def prompt_violations(costs: Tensor, prompt_ids: Tensor, scope: str, threshold: float, backend: str) -> Tensor:
    return implementation("prompt_violations", backend)(costs, prompt_ids, scope, threshold)


@prompt_violations.register_fake
def _(costs, prompt_ids, scope, threshold, backend):
    return costs.new_empty(costs.shape)


@torch.library.custom_op("repo_fast::generalized_advantages", mutates_args=())
@_without_autocast
def generalized_advantages(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float, backend: str
) -> tuple[Tensor, Tensor]:
    return implementation("generalized_advantages", backend)(rewards, values, cu_seqlens, gamma, lam)


@generalized_advantages.register_fake
def _(rewards, values, cu_seqlens, gamma, lam, backend):
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


@torch.library.custom_op("repo_fast::rectified_policy_loss", mutates_args=())
@_without_autocast
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return implementation("rectified_policy_loss", backend)(
        log_probs,
        old_log_probs,
        reward_advantages,
        cost_advantages,
        sequence_ids,
        violations,
        multiplier,
        rectify,
        surrogate,
        clip_low,
        clip_high,
        ref_log_probs,
        kl_coefficient,
        reduction,
        denominator,
        importance_weights,
    )


@rectified_policy_loss.register_fake
def _(log_probs, *args):
    scalars = (log_probs.new_empty(()) for _ in range(4))
    return (*scalars, log_probs.new_empty(log_probs.shape))


def _setup_rectified(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[-1])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.inputs = len(inputs)


def _rectified_autograd(ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    others = (None,) * (ctx.inputs - 1)
    return None if grad_loss is None else gradient * grad_loss, *others


rectified_policy_loss.register_autograd(_rectified_autograd, setup_context=_setup_rectified)


@torch.library.custom_op("repo_fast::fused_rectified_policy_loss", mutates_args=())
@_without_autocast
def fused_rectified_policy_loss(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return implementation("fused_rectified_policy_loss", backend)(
        hidden,
        weight,
        targets,
        old_log_probs,
        reward_advantages,
        cost_advantages,
        sequence_ids,
        costs,
        prompt_ids,
        multiplier,
        scope,
        threshold,
        rectify,
        surrogate,
        clip_low,
        clip_high,
        temperature,
        ref_log_probs,
        kl_coefficient,
        entropy_coefficient,
        reduction,
        denominator,
        violations,
        importance_weights,
        need_hidden,
        need_weight,
    )


_FUSED_INPUTS = 27


@fused_rectified_policy_loss.register_fake
def _(hidden, weight, targets, *args):
    costs, violations, need_hidden, need_weight = args[4], args[19], args[22], args[23]
    responses = costs if violations is None else violations

    def real(shape):
        return hidden.new_empty(shape, dtype=torch.float32)

    return (
        real(()),
        real(targets.shape),
        real(targets.shape),
        real(responses.shape),
        real(()),
        real(()),
        real(()),
        hidden.new_empty(hidden.shape, dtype=gradient_dtype(hidden.dtype)) if need_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape, dtype=gradient_dtype(weight.dtype)) if need_weight else weight.new_empty(0),
    )


def _scale_in_place(buffer: Tensor, scale: Tensor) -> None:
    """buffer *= scale, computed in float32. On the CPU, where looking costs nothing, a scale of 1 does nothing."""
    if buffer.is_cpu and scale.item() == 1.0:
        return
    if buffer.dtype == torch.float32:
        buffer.mul_(scale)
        return
    for part in buffer.split(max(1, (1 << 24) // max(buffer.shape[1], 1))):
        part.copy_(part.float() * scale)


def _setup_fused(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Plain attributes rather than saved tensors: the backward scales them in place, hands them out and forgets them,
    # which is what makes three products and one copy of each gradient enough.
    ctx.gradients = output[-2:]
    ctx.dtype = inputs[0].dtype
    ctx.needed = inputs[-3:-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _fused_autograd(ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.gradients is None:
        raise RuntimeError(
            "fused_rectified_policy_loss: a second backward through the same loss: its gradients were formed in the "
            "forward and released by the first backward; call the op again, or use linear_log_probs and "
            "rectified_policy_loss"
        )
    buffers, ctx.gradients = ctx.gradients, None
    if grad_loss is None:
        return (None,) * _FUSED_INPUTS
    gradients: list[Tensor | None] = []
    for buffer, needed in zip(buffers, ctx.needed, strict=True):
        if not needed:
            gradients.append(None)
        elif type(buffer) is Tensor:
            _scale_in_place(buffer, grad_loss)
            gradients.append(buffer.to(ctx.dtype))
        else:  # a tracer's tensor: the compiler wants no mutation, and reuses the memory by itself
            gradients.append((buffer.float() * grad_loss).to(ctx.dtype))
    return *gradients, *(None,) * (_FUSED_INPUTS - 2)


fused_rectified_policy_loss.register_autograd(_fused_autograd, setup_context=_setup_fused)
