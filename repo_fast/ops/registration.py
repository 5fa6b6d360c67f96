"""The ops as `torch.ops.repo_fast.*`: schemas, fake kernels and autograd formulas, common to all backends.

These take and return plain tensors, none an alias of an input; the public functions in `__init__.py` check arguments,
name the outputs, and pick the backend, which travels as the last argument. An output that was not asked for is empty.
`temperature` and `softcap` are those of the bare products: the public functions' are divided by their `logit_scale`.
Functions decorated with `_dispatched` have no body: their signature is the op's schema, and what runs is the backend's
implementation of the op.
"""

# mypy: disable-error-code="empty-body"

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature
from typing import Any, get_type_hints

import torch
from torch import Tensor

from repo_fast.ops.arguments import FusedArguments, RectifiedArguments, StreamsArguments
from repo_fast.ops.dispatch import implementation
from repo_fast.ops.sweep import gradient_dtype, logits_to_keep


def _tags(name: str) -> list[torch.Tag]:
    """An op that reads the count of valid rows back, on one backend at least, cannot be part of a CUDA graph."""
    safe = ("prompt_violations", "generalized_advantages", "rectified_policy_loss_streams")
    return [] if name in safe else [torch.Tag.cudagraph_unsafe]


def _dispatched(function: Callable[..., Any]) -> Any:
    """Registers an op with the signature of `function` that runs the implementation of its backend."""
    name = function.__name__

    @wraps(function)
    def run(*args: Any) -> Any:
        *inputs, backend = args
        return _run(implementation(name, backend), args[0].device.type, *inputs)

    return torch.library.custom_op(f"repo_fast::{name}", run, mutates_args=(), tags=_tags(name))


def _policy_loss(name: str, arguments: Callable[..., Any], outputs: int) -> Any:
    """Registers an op that takes the fields of `arguments` and returns tensors; implementations take them as one."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        *inputs, backend = args
        return _run(implementation(name, backend), args[0].device.type, arguments(*inputs))

    fields = {**get_type_hints(arguments), "backend": str}
    run.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(field, Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for field, kind in fields.items()],
        return_annotation=tuple[(Tensor,) * outputs],  # type: ignore[misc]
    )
    return torch.library.custom_op(f"repo_fast::{name}", run, mutates_args=(), tags=_tags(name))


def _run(function: Callable[..., Any], device_type: str, *inputs: Any) -> Any:
    """function(*inputs). Autocast reaches into a custom op, where it would turn float32 products into narrower ones."""
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return function(*inputs)
    return function(*inputs)


@_dispatched
def prompt_violations(costs: Tensor, prompt_ids: Tensor, scope: str, threshold: float, backend: str) -> Tensor:
    """-> violations [S]."""


@prompt_violations.register_fake
def _(costs, prompt_ids, scope, threshold, backend):
    return costs.new_empty(costs.shape)


@_dispatched
def generalized_advantages(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float, backend: str
) -> tuple[Tensor, Tensor]:
    """-> advantages, returns, each [T] or [C, T] like `rewards`."""


@generalized_advantages.register_fake
def _(rewards, values, cu_seqlens, gamma, lam, backend):
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


@_dispatched
def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    return_entropy: bool,
    logits_budget: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> log_probs [T], entropy [T] or empty, the kept logits of `sweep.logits_to_keep`."""


@linear_log_probs.register_fake
def _(hidden, weight, targets, temperature, softcap, return_entropy, logits_budget, backend):
    log_probs = hidden.new_empty(targets.shape, dtype=torch.float32)
    entropy = torch.empty_like(log_probs) if return_entropy else log_probs.new_empty(0)
    return log_probs, entropy, logits_to_keep(hidden, weight, logits_budget)


@_dispatched
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    """-> grad_hidden [T, D] or empty, grad_weight [V, D] or empty, in the dtype of `hidden`."""


@linear_log_probs_backward.register_fake
def _(grad_log_probs, grad_entropy, hidden, weight, targets, kept, temperature, softcap, *options):
    need_hidden, need_weight, _ = options
    return (
        hidden.new_empty(hidden.shape) if need_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else weight.new_empty(0),
    )


def _save_linear_log_probs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, ctx.temperature, ctx.softcap, return_entropy, _, ctx.backend = inputs
    _, entropy, kept = output
    ctx.save_for_backward(hidden, weight, targets, kept)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([kept] if return_entropy else [entropy, kept]))


def _differentiate_linear_log_probs(
    ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, grad_kept: None
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    if grad_log_probs is None:
        if grad_entropy is None:
            return (None,) * 8
        grad_log_probs = torch.zeros_like(grad_entropy)
    grad_hidden, grad_weight = linear_log_probs_backward(
        grad_log_probs, grad_entropy, *tensors, ctx.temperature, ctx.softcap, need_hidden, need_weight, ctx.backend
    )
    gradients = grad_hidden if need_hidden else None, grad_weight if need_weight else None
    return *gradients, *(None,) * 6


linear_log_probs.register_autograd(_differentiate_linear_log_probs, setup_context=_save_linear_log_probs)


class _DifferentiatedOnce(torch.autograd.Function):
    """A gradient that was formed in the forward, on its way into a graph of its own: it has no derivative there, and
    would silently pass for a constant.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, op: str, _: Tensor) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *up: Tensor) -> tuple[None, None, None]:
        raise RuntimeError(f"{ctx.op}: there is no second derivative of this op, expected one without create_graph")


def _differentiated_once(op: str, gradient: Tensor) -> Tensor:
    if not torch.is_grad_enabled():  # without create_graph
        return gradient
    return _DifferentiatedOnce.apply(gradient, op, gradient.new_zeros(()).requires_grad_())


# -> reward_advantages, cost_advantages [T] that stand for K streams, at weights of a half.
rectified_policy_loss_streams = _policy_loss("rectified_policy_loss_streams", StreamsArguments, 2)


@rectified_policy_loss_streams.register_fake
def _(reward_advantages, *others):
    T = reward_advantages.shape
    return reward_advantages.new_empty(T), reward_advantages.new_empty(T)


# -> loss, clip_fraction, approx_kl, unsafe_fraction, d loss / d log_probs [T].
rectified_policy_loss = _policy_loss("rectified_policy_loss", RectifiedArguments, 5)


@rectified_policy_loss.register_fake
def _(log_probs, *others):
    scalars = (log_probs.new_empty(()) for _ in range(4))
    return (*scalars, log_probs.new_empty(log_probs.shape))


def _save_rectified(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[-1])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_rectified(ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    others = (None,) * (len(ctx.needs_input_grad) - 1)
    if grad_loss is None:
        return None, *others
    return _differentiated_once("rectified_policy_loss", gradient * grad_loss), *others


rectified_policy_loss.register_autograd(_differentiate_rectified, setup_context=_save_rectified)


# -> loss, log_probs [T], entropy [T] or empty, violations [S], clip_fraction, approx_kl, unsafe_fraction, and the
# gradients of the loss: grad_hidden [T, D] or empty, grad_weight [V, D] or empty, both in `gradient_dtype`.
fused_rectified_policy_loss_and_gradients = _policy_loss("fused_rectified_policy_loss_and_gradients", FusedArguments, 9)


@fused_rectified_policy_loss_and_gradients.register_fake
def _(*inputs):
    *arguments, _ = inputs
    a = FusedArguments(*arguments)
    responses = a.costs if a.violations is None else a.violations
    assert responses is not None

    def gradient(operand, needed):
        return operand.new_empty(operand.shape if needed else 0, dtype=gradient_dtype(operand.dtype))

    shapes = (), a.targets.shape, a.targets.shape if a.entropy else 0, responses.shape, (), (), ()
    results = (a.hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return (*results, gradient(a.hidden, a.need_hidden), gradient(a.weight, a.need_weight))


def _scale_in_place(buffer: Tensor, scale: Tensor, backend: str) -> None:
    """buffer *= scale, computed in float32; nothing is done where that is 1. It is not read back from a GPU."""
    if backend == "triton":
        from repo_fast.ops.triton import scale_gradient

        scale_gradient(buffer, scale)
        return
    if buffer.is_cpu and scale.item() == 1.0:
        return
    if buffer.dtype == torch.float32:
        buffer.mul_(scale)
        return
    for part in buffer.split(max(1, (1 << 24) // max(buffer.shape[1], 1))):
        part.copy_(part.float() * scale)


class _FusedRectifiedPolicyLoss(torch.autograd.Function):
    """Keeps the gradients from the forward to the backward, which scales them in place and hands them out, once."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *arguments, backend = inputs
        ctx.dtype, ctx.backend = inputs[0].dtype, backend
        ctx.needed = ctx.needs_input_grad[:2]
        *results, grad_hidden, grad_weight = fused_rectified_policy_loss_and_gradients(*arguments, *ctx.needed, backend)
        # Not among the saved tensors, so that the backward can let go of them.
        ctx.gradients = grad_hidden, grad_weight
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *up: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "fused_rectified_policy_loss: a second backward through the same loss: its gradients were formed in "
                "the forward and released by the first backward; call the op again, or use linear_log_probs and "
                "rectified_policy_loss"
            )
        buffers, ctx.gradients = ctx.gradients, None
        grad_loss = up[0]
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad_loss is None:
            return tuple(gradients)
        for i, buffer in enumerate(buffers):
            if not ctx.needed[i]:
                continue
            if type(buffer) is Tensor:
                _scale_in_place(buffer, grad_loss.detach(), ctx.backend)
                gradient = buffer.to(ctx.dtype)
            else:  # a tracer's tensor: compilers want no mutation, and reuse the memory by themselves
                gradient = (buffer.float() * grad_loss).to(ctx.dtype)
            gradients[i] = _differentiated_once("fused_rectified_policy_loss", gradient)
        return tuple(gradients)


def _with_gradients(*inputs: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and (inputs[0].requires_grad or inputs[1].requires_grad):
        return _FusedRectifiedPolicyLoss.apply(*inputs)
    return _without_gradients(*inputs)


def _without_gradients(*inputs: Any) -> tuple[Tensor, ...]:
    *arguments, backend = inputs
    return fused_rectified_policy_loss_and_gradients(*arguments, False, False, backend)[:7]


# The op itself does not return the gradients, whose memory its backward overwrites. A registered formula could only
# keep inputs and outputs, so its autograd kernel is an autograd.Function. Its schema is that of the op above, without
# the two flags and the two outputs.
_LIBRARY = torch.library.Library("repo_fast", "FRAGMENT")
_SCHEMA = str(torch.ops.repo_fast.fused_rectified_policy_loss_and_gradients.default._schema)
_LIBRARY.define(
    _SCHEMA.removeprefix("repo_fast::")
    .replace("_and_gradients", "")
    .replace(", bool need_hidden, bool need_weight", "")
    .replace(", Tensor, Tensor)", ")"),
    tags=_tags("fused_rectified_policy_loss"),
)
_LIBRARY.impl("fused_rectified_policy_loss", _with_gradients, "Autograd")
_LIBRARY.impl("fused_rectified_policy_loss", _without_gradients, "CompositeExplicitAutograd")
fused_rectified_policy_loss = torch.ops.repo_fast.fused_rectified_policy_loss.default
