"""The ops as one would write them down: full logits, loops, gradients by autograd. The readable truth.

Every function computes in the dtype of its inputs, so the same code in float64 is the oracle of the tests. Arguments
and results are those of the public functions in `repo_fast.ops`; nothing is checked. Not for training.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from repo_fast.ops.validation import IGNORED


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(log_probs [T], entropy [T]) of softmax(z / temperature); 0 where the target is -100.

    z = logit_scale · hidden @ weight.T, or, with a cap, softcap · tanh(that / softcap).

    The product is in the dtype of `hidden`; what follows is float32 or wider.
    """
    valid = targets != IGNORED
    logits = hidden[valid] @ weight.T
    logits = logit_scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    distribution = logits.log_softmax(dim=1)
    log_probs = distribution.new_zeros(targets.shape)
    entropy = distribution.new_zeros(targets.shape)
    log_probs[valid] = distribution.gather(1, targets[valid].unsqueeze(1)).squeeze(1)
    entropy[valid] = -(distribution.exp() * distribution).sum(1)
    return log_probs, entropy


def prompt_violations(
    costs: Tensor,
    prompt_ids: Tensor,
    *,
    scope: str | Sequence[str] = "prompt",
    threshold: float | Sequence[float] = 0.0,
) -> Tensor:
    """v_i = C̄_i − d, where C̄_i is the response's own cost, its prompt's mean cost, or the mean cost of the batch.

    Costs of −inf do not count in means, and have violations of −inf where the mean is not NaN. Of costs [K, S], scope
    and threshold are one or K.
    """
    streams = torch.atleast_2d(costs)
    scopes = [scope] * len(streams) if isinstance(scope, str) else scope
    thresholds = torch.as_tensor(threshold, dtype=costs.dtype, device=costs.device).expand(len(streams))

    def mean(values: Tensor) -> Tensor:
        counted = values[values != -torch.inf]
        return counted.mean() if counted.numel() else values.new_tensor(-torch.inf)

    means = streams.clone()
    for row, stream, one in zip(means, streams, scopes, strict=True):
        for i in range(len(row)):
            same = {"response": slice(i, i + 1), "prompt": prompt_ids == prompt_ids[i], "batch": slice(None)}[one]
            row[i] = mean(stream[same])
    means[(streams == -torch.inf) & ~means.isnan()] = -torch.inf
    return (means - thresholds[:, None]).view_as(costs)


def generalized_advantages(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """A_t = δ_t + γλ·A_{t+1} and δ_t = r_t + γ·V_{t+1} − V_t, response by response from its last token backwards."""
    advantages = torch.zeros_like(rewards)
    bounds = cu_seqlens.tolist()
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        next_value = next_advantage = rewards.new_zeros(())
        for t in reversed(range(start, stop)):
            delta = rewards[t] + gamma * next_value - values[t]
            advantages[t] = delta + gamma * lam * next_advantage
            next_value, next_advantage = values[t], advantages[t]
    return advantages, advantages + values


def rectified_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    reward_advantages: Tensor,
    cost_advantages: Tensor,
    sequence_ids: Tensor,
    violations: Tensor,
    *,
    multiplier: float | Tensor,
    rectify: bool | Sequence[bool] = True,
    surrogate: str = "separate",
    clip: tuple[float, float] = (0.2, 0.2),
    ref_log_probs: Tensor | None = None,
    kl_coefficient: float = 0.0,
    reduction: str = "sequence_mean",
    denominator: float | Tensor | None = None,
    importance_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coefficient: float = 0.0,
) -> Tensor:
    """The loss alone, a scalar: steps 5 and 6 of a RePO update. With `entropy` [T] it has the fused op's bonus too.

    Cost advantages may be [K, T] with violations [K, S]; the multiplier and `rectify` are then one or K.
    """
    valid = sequence_ids >= 0
    if not valid.any():
        return 0 * log_probs[valid].sum()
    sequence = sequence_ids[valid]
    log_prob = log_probs[valid]
    old = log_prob.detach() if old_log_probs is None else old_log_probs[valid]
    costs, violations = torch.atleast_2d(cost_advantages), torch.atleast_2d(violations)
    reward_advantage, cost_advantage = reward_advantages[valid], costs[:, valid]
    K = len(costs)

    multiplier = torch.as_tensor(multiplier, dtype=log_probs.dtype, device=log_probs.device).expand(K)
    rectified = torch.as_tensor(rectify, device=log_probs.device).expand(K)
    active = (violations != -torch.inf) & ((violations > 0) | ~rectified[:, None])
    active_multiplier = torch.where(active, multiplier[:, None], 0.0)
    total = 1 + active_multiplier.sum(0)
    unknown = violations.isnan().any(0)
    w_r = torch.where(unknown, torch.nan, 1 / total)[sequence]
    w_c = torch.where(unknown, torch.nan, active_multiplier / total)[:, sequence]

    ratio = (log_prob - old).clamp(-20, 20).exp()

    def clipped(advantage: Tensor) -> Tensor:
        return torch.minimum(ratio * advantage, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage)

    if surrogate == "separate":
        loss = -(w_r * clipped(reward_advantage) + (w_c * clipped(-cost_advantage)).sum(0))
    else:
        loss = -clipped(w_r * reward_advantage - (w_c * cost_advantage).sum(0))
    if kl_coefficient > 0 and ref_log_probs is not None:
        d = ref_log_probs[valid] - log_prob
        loss = loss + kl_coefficient * (d.exp() - d - 1)
    if entropy is not None:
        loss = loss - entropy_coefficient * entropy[valid]
    if importance_weights is not None:
        loss = loss * importance_weights[valid]

    if reduction == "sum":
        return loss.sum()
    if reduction == "token_mean":
        return loss.sum() / (loss.numel() if denominator is None else denominator)
    means = [loss[sequence == i].mean() for i in sequence.unique()]
    return torch.stack(means).sum() / (len(means) if denominator is None else denominator)


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
    multiplier: float | Tensor,
    scope: str | Sequence[str] = "prompt",
    threshold: float | Sequence[float] = 0.0,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy_coefficient: float = 0.0,
    violations: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, log_probs, entropy, violations): the other functions one after the other."""
    head = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
    log_probs, entropy = linear_log_probs(hidden, weight, targets, **head)  # type: ignore[arg-type]
    if violations is None:
        assert costs is not None and prompt_ids is not None
        violations = prompt_violations(costs, prompt_ids, scope=scope, threshold=threshold)
    loss = rectified_policy_loss(
        log_probs,
        old_log_probs,
        reward_advantages,
        cost_advantages,
        sequence_ids.masked_fill(targets == IGNORED, -1),
        violations,
        multiplier=multiplier,
        entropy=entropy,
        entropy_coefficient=entropy_coefficient,
        **options,  # type: ignore[arg-type]
    )
    return loss, log_probs, entropy, violations
