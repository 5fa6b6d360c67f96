"""The public ops of RePO training: token log-probabilities and entropies, per-prompt violations, generalized
advantages, and the rectified clipped policy loss, also fused with the LM head so that of the [T, V] logits no more than
a chunk of rows exists in memory.

Usable on their own, in any trainer: this package needs PyTorch and nothing else of repo_fast. In all of them T is the
number of tokens (any packing, any order), D the hidden size, V the vocabulary, S the number of responses; losses and
log-probabilities are in nats. Same inputs give the same bits. The algorithm is Rectified Policy Optimization, arXiv
2410.19933; costs above the threshold are unsafe.

    from repo_fast.ops import fused_rectified_policy_loss
    out = fused_rectified_policy_loss(hidden, lm_head.weight, targets, old_log_probs, reward_advantages,
                                      cost_advantages, sequence_ids, costs, prompt_ids, multiplier=1.0)
    out.loss.backward()
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from repo_fast.ops import registration
from repo_fast.ops.dispatch import available_backends, resolve
from repo_fast.ops.loss import unsafe_fraction
from repo_fast.ops.streams import as_one, check_count, check_rectify, for_each, stream_count
from repo_fast.ops.validation import (
    check_bytes,
    check_choice,
    check_clip,
    check_device,
    check_flag,
    check_linear,
    check_number,
    check_tensor,
    check_vector,
    check_vectors,
    logit_settings,
    scalar,
)
from repo_fast.ops.violations import gather_responses

__all__ = [
    "PolicyLoss",
    "available_backends",
    "fused_rectified_policy_loss",
    "generalized_advantages",
    "linear_log_probs",
    "prompt_violations",
    "rectified_policy_loss",
]

_SCOPES = ("prompt", "response", "batch")
_SURROGATES = ("separate", "mixed")
_REDUCTIONS = ("sequence_mean", "token_mean", "sum")


class PolicyLoss(NamedTuple):
    """What the policy losses return. Only `loss` carries a gradient; all are float32.

    Attributes:
        loss: Scalar.
        log_probs: [T], log π_θ of each target in nats; 0 where the target is ignored.
        entropy: [T], of the distribution that `log_probs` is of, in nats; 0 where the target is ignored.
            None from `rectified_policy_loss`, and where it was not asked for.
        violations: [S] or [K, S], how far each response's (mean) cost is above the threshold; not rectified.
        clip_fraction: Scalar, the share of valid tokens where, in a stream of non-zero weight, the clipped branch is
            strictly the smaller one.
        approx_kl: Scalar in nats, the k3 estimate of KL(π_old‖π_θ): mean over valid tokens of (ρ − 1) − log ρ.
        unsafe_fraction: Scalar, or [K] of K constraints: the share of the responses with a violation > 0, of those that
            the constraint applies to.
    """

    loss: Tensor
    log_probs: Tensor
    entropy: Tensor | None
    violations: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    unsafe_fraction: Tensor


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    logits_budget: int = 0,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of the targets under log softmax(z / temperature), a chunk of the logits z at a time.

    z = hidden @ weight.T, times `logit_scale`, and then, with a `softcap`, softcap·tanh(z / softcap).

    One matrix product in the forward. Its backward learns only then what gradient comes in, and computes the logits
    again: four products in all, or three where they were kept (`logits_budget`). A row gives the same bits here and in
    `fused_rectified_policy_loss`, in calls with the same rows.

    Args:
        hidden: [T, D] float32, bfloat16 or float16.
        weight: [V, D], the LM head, in the dtype of `hidden`.
        targets: [T] int64 in [0, V), or -100: ignored, at no cost, with log-probability 0, entropy 0 and no gradient.
        temperature: > 0; divides the logits, last of all.
        logit_scale: > 0; multiplies the products (Cohere's; Granite's is the inverse of its `logits_scaling`).
        softcap: > 0, at most 2**24 temperatures; bounds the logits, as Gemma 2 does. None: no bound.
        return_entropy: Whether to return the entropies as well.
        logits_budget: Bytes of logits that the forward may keep until its graph is freed, so that the backward need not
            compute them again; no bit changes. They are V·4 bytes a row, V·2 where the product is made in bfloat16 (and
            up to 128 to align it): what fits of T rows, in whole chunks. Where not all T fit and some are ignored, a
            chunk may be taller than what fits, and is not kept. Nothing is where no gradient is recorded.
        backend: "auto", or one of `available_backends("linear_log_probs")`.

    Returns:
        log_probs [T] float32 in nats, never positive; or (log_probs, entropy [T] float32 in nats). Both carry gradients
        to `hidden` and `weight`.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: An argument of the wrong shape, device or value, or a backend that cannot run here. On a GPU a
            target that is out of range is not looked at: its log-probability is NaN.
    """
    op = "linear_log_probs"
    check_linear(op, hidden, weight, targets)
    settings = logit_settings(op, temperature, logit_scale, softcap)
    check_flag(op, "return_entropy", return_entropy)
    check_bytes(op, "logits_budget", logits_budget)
    chosen = resolve(op, backend, hidden.device)
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        logits_budget = 0
    log_probs, entropy, _ = registration.linear_log_probs(
        hidden, weight, targets, *settings, return_entropy, logits_budget, chosen
    )
    return (log_probs, entropy) if return_entropy else log_probs


def prompt_violations(
    costs: Tensor,
    prompt_ids: Tensor,
    *,
    scope: str | Sequence[str] = "prompt",
    threshold: float | Sequence[float] = 0.0,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """How far each response is from its constraint: v_i of RePO (arXiv 2410.19933), not rectified; > 0 is unsafe.

    Args:
        costs: [S] float32, the cost C(x, y) of each response, or [K, S], of K constraints. NaN stays NaN: it must not
            pass for safe. −inf says that the constraint does not apply to the response: it does not count in means, and
            has a violation of −inf, unless the mean is NaN.
        prompt_ids: [S] int64, any ids in any order. Responses with the same id answer the same prompt.
        scope: What is compared with the threshold: "response", its own cost; "prompt", the mean cost over the
            responses of the same prompt; "batch", the mean cost over all responses. One for all constraints, or K.
        threshold: d, in units of cost. One for all constraints, or K.
        group: A process group. The means are then over the responses of all its ranks, which may differ in S, even be
            0; every rank must call. Not under `torch.compile`.
        backend: "auto", or one of `available_backends("prompt_violations")`.

    Returns:
        violations [S] or [K, S] float32, without gradient.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: An argument of the wrong shape, device or value, or a backend that cannot run here.
    """
    op = "prompt_violations"
    several = isinstance(costs, Tensor) and costs.dim() == 2
    check_tensor(op, "costs", costs, (torch.float32,), ("K", "S") if several else ("S",))
    K = check_count(op, "costs", costs.shape[0]) if several else None
    scopes, thresholds = _check_scopes(op, prompt_ids, costs, scope, threshold, K)
    chosen = resolve(op, backend, costs.device)
    streams, own = torch.atleast_2d(costs.detach()), slice(None)
    if group is not None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"{op}: group must be a torch.distributed process group, got {type(group).__name__}")
        streams, prompt_ids, own = gather_responses(streams, prompt_ids, group)
    violations = [
        registration.prompt_violations(stream, prompt_ids, one, d, chosen)[own]
        for stream, one, d in zip(streams.unbind(), scopes, thresholds, strict=True)
    ]
    if K is not None:
        return torch.stack(violations)
    return violations[0] if group is None else violations[0].clone()


def _check_scopes(
    op: str,
    prompt_ids: object,
    costs: Tensor,
    scope: str | Sequence[str],
    threshold: float | Sequence[float],
    K: int | None,
) -> tuple[list[str], list[float]]:
    """The checks of what `prompt_violations` takes beside costs; scopes and thresholds, one a stream."""
    check_vector(op, "prompt_ids", prompt_ids, costs.shape[-1], "S", costs.device, torch.int64)
    scopes = for_each(op, "scope", scope, K, lambda op, name, one: check_choice(op, name, one, _SCOPES))
    thresholds = for_each(op, "threshold", threshold, K, lambda op, name, d: check_number(op, name, d, -torch.inf))
    return scopes, [float(d) for d in thresholds]


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438) over packed responses, with no bootstrap after a last token.

    δ_t = r_t + γ·V_{t+1} − V_t and A_t = δ_t + γλ·A_{t+1}, where V and A are 0 past the end of the response.

    Args:
        rewards: [T] float32, reward (or cost) of each token; or [C, T], the streams of C critics in one call.
        values: Like `rewards`, the critic's value of each token. No gradient flows.
        cu_seqlens: [S+1] int32: response i is tokens cu_seqlens[i] to cu_seqlens[i+1]; starts with 0 and ends with T.
        gamma: Discount γ in [0, 1].
        lam: λ_GAE in [0, 1].
        backend: "auto", or one of `available_backends("generalized_advantages")`.

    Returns:
        (advantages, returns = advantages + values), float32, each in the shape of `rewards`.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: An argument of the wrong shape, device or value, or a backend that cannot run here. On a GPU the
            values of `cu_seqlens` are not looked at: if they are wrong, the results are NaN.
    """
    op = "generalized_advantages"
    streams = isinstance(rewards, Tensor) and rewards.dim() == 2
    check_tensor(op, "rewards", rewards, (torch.float32,), ("C", "T") if streams else ("T",))
    check_tensor(op, "values", values, (torch.float32,), tuple(rewards.shape))
    check_device(op, "values", values, rewards.device)
    check_tensor(op, "cu_seqlens", cu_seqlens, (torch.int32,), ("S+1",))
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{op}: cu_seqlens must have at least one entry, 0, got shape [0]")
    check_device(op, "cu_seqlens", cu_seqlens, rewards.device)
    check_number(op, "gamma", gamma, 0.0, 1.0)
    check_number(op, "lam", lam, 0.0, 1.0)
    chosen = resolve(op, backend, rewards.device)
    return registration.generalized_advantages(
        rewards.detach(), values.detach(), cu_seqlens, float(gamma), float(lam), chosen
    )


def _check_objective(
    op: str,
    surrogate: str,
    clip: tuple[float, float],
    ref_log_probs: Tensor | None,
    kl_coefficient: float,
    reduction: str,
) -> None:
    """The checks that both policy losses share."""
    check_choice(op, "surrogate", surrogate, _SURROGATES)
    check_clip(op, clip)
    check_number(op, "kl_coefficient", kl_coefficient, 0.0)
    check_choice(op, "reduction", reduction, _REDUCTIONS)
    if kl_coefficient > 0 and ref_log_probs is None:
        raise ValueError(f"{op}: kl_coefficient={kl_coefficient} needs ref_log_probs, got None")


def rectified_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    reward_advantages: Tensor,
    cost_advantages: Tensor,
    sequence_ids: Tensor,
    violations: Tensor,
    *,
    multiplier: float | Sequence[float] | Tensor,
    rectify: bool | Sequence[bool] = True,
    surrogate: str = "separate",
    clip: tuple[float, float] = (0.2, 0.2),
    ref_log_probs: Tensor | None = None,
    kl_coefficient: float = 0.0,
    reduction: str = "sequence_mean",
    denominator: float | Tensor | None = None,
    importance_weights: Tensor | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """RePO's clipped policy loss (arXiv 2410.19933) from log-probabilities.

    With ρ = exp(log π_θ − log π_old) and s(A) = min(ρA, clip(ρ, 1−ε_low, 1+ε_high)·A), a token's loss is ℓ_t =
    −[w_r·s(A_r) + w_c·s(−A_c)] ("separate", RePO's) or ℓ_t = −s(w_r·A_r − w_c·A_c) ("mixed", Safe RLHF's). The
    weights are those of its sequence: (1/(1+λ), λ/(1+λ)) where v > 0, or everywhere if not `rectify`; else (1, 0).
    With zero cost advantages and λ = 0 it is PPO's and GRPO's loss. log ρ is clamped to ±20, with no gradient beyond.

    With K constraints, Z = 1 + the sum of λ_k over those that are active for the sequence: w_r = 1/Z and w_k = λ_k/Z, 0
    for the others, and the terms of the costs are summed over k. Active is a constraint that applies to the sequence
    and, if rectified, has v > 0.

    Args:
        log_probs: [T] float32, log π_θ in nats. The only argument that gradients flow to.
        old_log_probs: [T] float32, log π_old; None means on-policy: ρ = 1, with the gradient of log π_θ.
        reward_advantages: [T] float32, A_r.
        cost_advantages: [T] float32, A_c, or [K, T], of K constraints.
        sequence_ids: [T] int64 in [0, S), the response of each token; -1 = a token to leave out, whose values are not
            looked at.
        violations: [S] float32, as from `prompt_violations`, or [K, S]. A NaN violation makes the loss NaN; −inf: the
            constraint does not apply to the response.
        multiplier: λ >= 0, a number or a 0-d tensor, or K numbers or a tensor [K]. Tensors are never read back.
        rectify: Whether safe responses are weighted (1, 0); one for all constraints, or K.
        surrogate: "separate" or "mixed".
        clip: (ε_low, ε_high), each >= 0.
        ref_log_probs: [T] float32, log π_ref; needed if `kl_coefficient` > 0.
        kl_coefficient: >= 0; adds kl_coefficient·(exp(d) − d − 1), d = log π_ref − log π_θ, to ℓ_t.
        reduction: "sequence_mean", the mean over sequences of the mean of ℓ_t over each one's valid tokens, all in
            this call; "token_mean", over all valid tokens; "sum".
        denominator: > 0, a number or a 0-d tensor: replaces the number of sequences that have a valid token, or of
            valid tokens; of no effect with "sum". The global number, under gradient accumulation or data parallelism.
        importance_weights: [T] float32, a factor on ℓ_t, for samples that another policy drew.
        backend: "auto", or one of `available_backends("rectified_policy_loss")`.

    Returns:
        `PolicyLoss`, with `log_probs` and `violations` as given and `entropy` None. No valid token: loss 0, gradient
        zero.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: An argument of the wrong shape, device or value, or a backend that cannot run here. On a GPU a
            sequence id that is out of range is not looked at: the loss is NaN.
    """
    op = "rectified_policy_loss"
    check_tensor(op, "log_probs", log_probs, (torch.float32,), ("T",))
    T, device = log_probs.shape[0], log_probs.device
    check_vectors(
        op,
        T,
        "T",
        device,
        old_log_probs=old_log_probs,
        reward_advantages=reward_advantages,
        ref_log_probs=ref_log_probs,
        importance_weights=importance_weights,
    )
    check_vector(op, "sequence_ids", sequence_ids, T, "T", device, torch.int64)
    K = stream_count(op, T, device, cost_advantages, "violations", violations)
    flags = check_rectify(op, rectify, K)
    _check_objective(op, surrogate, clip, ref_log_probs, kl_coefficient, reduction)
    chosen = resolve(op, backend, device)
    streams = reward_advantages, cost_advantages, sequence_ids, violations, multiplier
    one = as_one(op, K, *streams, flags, surrogate, chosen)
    loss, clip_fraction, approx_kl, unsafe, _ = registration.rectified_policy_loss(
        log_probs,
        old_log_probs,
        one.reward_advantages,
        one.cost_advantages,
        sequence_ids,
        one.violations,
        one.multiplier,
        one.rectify,
        surrogate,
        float(clip[0]),
        float(clip[1]),
        ref_log_probs,
        float(kl_coefficient),
        reduction,
        None if denominator is None else scalar(op, "denominator", denominator, device, 0.0, open_low=True),
        importance_weights,
        chosen,
    )
    if K is not None:
        unsafe = unsafe_fraction(violations.detach())
    return PolicyLoss(loss, log_probs.detach(), None, violations.detach(), clip_fraction, approx_kl, unsafe)


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
    *,
    multiplier: float | Sequence[float] | Tensor,
    scope: str | Sequence[str] = "prompt",
    threshold: float | Sequence[float] = 0.0,
    rectify: bool | Sequence[bool] = True,
    surrogate: str = "separate",
    clip: tuple[float, float] = (0.2, 0.2),
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_log_probs: Tensor | None = None,
    kl_coefficient: float = 0.0,
    entropy_coefficient: float = 0.0,
    entropy: bool = True,
    reduction: str = "sequence_mean",
    denominator: float | Tensor | None = None,
    violations: Tensor | None = None,
    importance_weights: Tensor | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """`linear_log_probs`, `prompt_violations` and `rectified_policy_loss` in one pass and three matrix products.

    The gradients to `hidden` and `weight` are formed in the forward, in the same pass over the logits, of which only
    a chunk of rows exists at a time; only those that are asked for (`requires_grad`, grad mode) are computed. The
    backward scales them in place by the incoming gradient and releases them: a second backward through the same loss
    raises `RuntimeError`, as does a second derivative.

    Args:
        hidden: [T, D] float32, bfloat16 or float16.
        weight: [V, D], the LM head, in the dtype of `hidden`.
        targets: [T] int64 in [0, V), or -100: a token to leave out, at no cost, whose other values are not looked at.
        old_log_probs: [T] float32, log π_old in nats; None means on-policy: ρ = 1, with the gradient of log π_θ.
        reward_advantages: [T] float32, A_r.
        cost_advantages: [T] float32, A_c, or [K, T], of K constraints.
        sequence_ids: [T] int64 in [0, S), the response of each token.
        costs: [S] or [K, S] float32, as in `prompt_violations`; not used (may be None) if `violations` is given.
        prompt_ids: [S] int64, as in `prompt_violations`; not used (may be None) if `violations` is given.
        multiplier: λ >= 0, a number or a 0-d tensor, or K numbers or a tensor [K]. Tensors are never read back.
        scope: As in `prompt_violations`.
        threshold: As in `prompt_violations`.
        rectify: Whether safe responses are weighted (1, 0), as in `rectified_policy_loss`; one for all, or K.
        surrogate: "separate" (RePO's) or "mixed" (Safe RLHF's), as in `rectified_policy_loss`.
        clip: (ε_low, ε_high), each >= 0.
        temperature: > 0; divides the logits, as in `linear_log_probs`.
        logit_scale: As in `linear_log_probs`.
        softcap: As in `linear_log_probs`.
        ref_log_probs: [T] float32, log π_ref; needed if `kl_coefficient` > 0.
        kl_coefficient: >= 0; adds kl_coefficient·(exp(d) − d − 1), d = log π_ref − log π_θ, to ℓ_t.
        entropy_coefficient: >= 0; subtracts entropy_coefficient·entropy_t from ℓ_t.
        entropy: Whether to return the entropies. False leaves their part out of the pass over the logits and changes no
            bit of the rest; it must be True if `entropy_coefficient` > 0.
        reduction: "sequence_mean", "token_mean" or "sum", as in `rectified_policy_loss`.
        denominator: As in `rectified_policy_loss`.
        violations: [S] or [K, S] float32. Given, it overrides `costs`, `prompt_ids`, `scope` and `threshold`: where a
            prompt's responses lie in several calls or on several ranks, from `prompt_violations`.
        importance_weights: [T] float32, a factor on ℓ_t, for samples that another policy drew.
        backend: "auto", or one of `available_backends("fused_rectified_policy_loss")`.

    Returns:
        `PolicyLoss`. No valid token: loss 0, gradients zero.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: An argument of the wrong shape, device or value, or a backend that cannot run here. On a GPU
            targets and sequence ids that are out of range are not looked at: the loss is NaN.
    """
    op = "fused_rectified_policy_loss"
    check_linear(op, hidden, weight, targets)
    T, device = hidden.shape[0], hidden.device
    check_vectors(
        op,
        T,
        "T",
        device,
        old_log_probs=old_log_probs,
        reward_advantages=reward_advantages,
        ref_log_probs=ref_log_probs,
        importance_weights=importance_weights,
    )
    check_vector(op, "sequence_ids", sequence_ids, T, "T", device, torch.int64)
    scopes, thresholds = ["prompt"], [0.0]
    if violations is None:
        K = stream_count(op, T, device, cost_advantages, "costs", costs)
        assert costs is not None
        scopes, thresholds = _check_scopes(op, prompt_ids, costs, scope, threshold, K)
    else:
        K = stream_count(op, T, device, cost_advantages, "violations", violations)
        costs = prompt_ids = None
    flags = check_rectify(op, rectify, K)
    _check_objective(op, surrogate, clip, ref_log_probs, kl_coefficient, reduction)
    settings = logit_settings(op, temperature, logit_scale, softcap)
    check_number(op, "entropy_coefficient", entropy_coefficient, 0.0)
    check_flag(op, "entropy", entropy)
    if entropy_coefficient > 0 and not entropy:
        raise ValueError(f"{op}: entropy must be True with entropy_coefficient={entropy_coefficient}, got False")
    chosen = resolve(op, backend, device)
    if K is not None and violations is None:
        assert costs is not None and prompt_ids is not None
        violations = prompt_violations(costs, prompt_ids, scope=scopes, threshold=thresholds, backend=chosen)
        costs = prompt_ids = None
    streams = reward_advantages, cost_advantages, sequence_ids, violations, multiplier
    one = as_one(op, K, *streams, flags, surrogate, chosen)
    results = registration.fused_rectified_policy_loss(
        hidden,
        weight,
        targets,
        old_log_probs,
        one.reward_advantages,
        one.cost_advantages,
        sequence_ids,
        costs,
        prompt_ids,
        one.multiplier,
        scopes[0],
        thresholds[0],
        one.rectify,
        surrogate,
        float(clip[0]),
        float(clip[1]),
        *settings,
        ref_log_probs,
        float(kl_coefficient),
        float(entropy_coefficient),
        entropy,
        reduction,
        None if denominator is None else scalar(op, "denominator", denominator, device, 0.0, open_low=True),
        one.violations,
        importance_weights,
        chosen,
    )
    result = PolicyLoss(*results)
    if K is not None:
        assert violations is not None
        own = violations.detach().clone()
        result = result._replace(violations=own, unsafe_fraction=unsafe_fraction(own))
    return result if entropy else result._replace(entropy=None)
