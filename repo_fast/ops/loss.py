"""The rectified policy loss on per-token values, with its gradient in closed form. Written once:
`rectified_policy_loss` evaluates it on all tokens, the fused op on one block of rows at a time, right after their
log-probabilities are known.

With ρ = exp(clamp(log π_θ − log π_old, ±20)), s(A) = min(ρA, clip(ρ)·A) and the weights w of the token's sequence:

    separate   ℓ = −[w_r·s(A_r) + w_c·s(−A_c)]        dℓ/dlog π_θ = −Σ_streams w·A·ρ·[unclipped branch taken]
    mixed      ℓ = −s(w_r·A_r − w_c·A_c)
    + kl_coefficient·(exp(d) − d − 1), d = log π_ref − log π_θ

The derivative is zero where log ρ is beyond ±20. Weights that are zero are multiplied, never skipped: 0·NaN shows up.

K cost streams are two. s(A) is A·min(ρ, 1+ε_high) for A ≥ 0 and A·max(ρ, 1−ε_low) for A ≤ 0, so that streams of one
sign add up before anything is known of ρ. With P the sum of those of w_r·A_r and −w_k·A_k that are positive, and N of
the others with their sign turned, ℓ = −[s(P) + s(−N)], which is the loss of one reward and one cost stream of equal
weights. `rectified_policy_loss_streams` forms them, and nothing else knows of K.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repo_fast.ops.arguments import PolicyArguments, RectifiedArguments, StreamsArguments
from repo_fast.ops.validation import check_range

LOG_RATIO_BOUND = 20.0  # keeps exp() far from float32's overflow


class Tokens(NamedTuple):
    """What the loss needs to know about N valid tokens besides their log-probabilities. Each float32 [N] or None.

    `factors` is d loss / d ℓ_t: the importance weight times the token's share in the reduction.
    """

    old_log_probs: Tensor | None
    reward_advantages: Tensor
    cost_advantages: Tensor
    reward_weights: Tensor
    cost_weights: Tensor
    ref_log_probs: Tensor | None
    factors: Tensor

    def part(self, start: int, stop: int) -> "Tokens":
        old, reward_advantages, cost_advantages, reward_weights, cost_weights, ref, factors = self
        return Tokens(
            None if old is None else old[start:stop],
            reward_advantages[start:stop],
            cost_advantages[start:stop],
            reward_weights[start:stop],
            cost_weights[start:stop],
            None if ref is None else ref[start:stop],
            factors[start:stop],
        )


class TokenLoss(NamedTuple):
    """Per-token results, each [N]: ℓ_t without its entropy term, dℓ_t/dlog π_θ, whether clipping bit, (ρ−1) − log ρ."""

    loss: Tensor
    slope: Tensor
    clipped: Tensor
    divergence: Tensor


def valid_rows(mask: Tensor) -> Tensor | None:
    """Indices of the true entries, or None if all are true. Reads their count back to the host, once."""
    rows = mask.nonzero().squeeze(1)
    return None if rows.numel() == mask.numel() else rows


def select(values: Tensor, rows: Tensor | None) -> Tensor:
    """The given rows of `values`; the tensor itself for None, which means all rows."""
    return values if rows is None else values.index_select(0, rows)


def stream_weights(violations: Tensor, multiplier: Tensor, rectify: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """w_r [S] and w_k [K, S] of each sequence, from violations [K, S] and multipliers [K]: step 5 of the algorithm.

    A constraint is active where it applies (−inf: it does not) and, if rectified, is violated. A NaN violation is not
    safe: it makes all weights NaN.
    """
    active = torch.stack(
        [
            torch.where(violation > (0.0 if rectified else -torch.inf), own, 0.0)
            for violation, own, rectified in zip(violations.unbind(), multiplier.unbind(), rectify, strict=True)
        ]
    )
    total = 1 + active.sum(0)
    unknown = violations.isnan().any(0)
    return (1 / total).masked_fill(unknown, torch.nan), (active / total).masked_fill(unknown, torch.nan)


def rectified_policy_loss_streams(a: StreamsArguments) -> tuple[Tensor, Tensor]:
    """Implements the registered op: the two advantages [T] that stand for A_r [T] and A_k [K, T], twice, since each is
    then weighted by a half. With the mixed surrogate the first is the weighted sum, and the second 0.
    """
    S, ids = a.violations.shape[1], a.sequence_ids
    index = torch.where((ids >= 0) & (ids < S), ids, S)
    reward_weights, cost_weights = stream_weights(a.violations, a.multiplier, a.rectify)
    weights = torch.cat([reward_weights.unsqueeze(0), cost_weights])
    # One more entry, NaN, is where ids that are out of range point to.
    weights = torch.cat([weights, weights.new_full((len(weights), 1), torch.nan)], 1).index_select(1, index)
    advantages = torch.cat([a.reward_advantages.unsqueeze(0), -a.cost_advantages])
    if a.mixed:
        return 2 * (weights * advantages).sum(0), torch.zeros_like(a.reward_advantages)
    return 2 * (weights * advantages.clamp(min=0)).sum(0), 2 * (weights * (-advantages).clamp(min=0)).sum(0)


def sum_by_index(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums of `values` [N] over equal `index` [N] -> [size], the same bits every time (index_add_ on CUDA is not)."""
    sums = values.new_zeros(size)
    if values.is_cuda:
        return sums.index_put_((index,), values, accumulate=True)
    return sums.index_add_(0, index, values)


def token_factors(sequence_index: Tensor, S: int, reduction: str, denominator: Tensor | None, like: Tensor) -> Tensor:
    """d loss / d ℓ_t of each valid token, [N]. `sequence_index` [N] is in [0, S]; S stands for "out of range"."""
    ones = torch.ones_like(sequence_index, dtype=like.dtype)
    if reduction == "sum":
        return ones
    if reduction == "token_mean":
        return ones / (ones.numel() if denominator is None else denominator)
    counts = sum_by_index(ones, sequence_index, S + 1)
    if denominator is None:
        denominator = (counts > 0).sum()
    return 1 / (counts[sequence_index] * denominator)


def gather_tokens(op: str, rows: Tensor | None, a: PolicyArguments, violations: Tensor) -> Tokens:
    """Compacts [T] inputs to the valid rows and looks up each token's weights and share in the reduction.

    Raises:
        ValueError: a valid token's sequence id is outside [0, S). On a GPU its weights become NaN instead.
    """
    S = violations.numel()
    ids = select(a.sequence_ids, rows)
    check_range(op, "sequence_ids of the valid tokens", ids, 0, S, "S")
    # One more entry, NaN, is where ids that are out of range point to.
    index = torch.where((ids >= 0) & (ids < S), ids, S)
    reward_weights, cost_weights = stream_weights(violations.unsqueeze(0), a.multiplier.unsqueeze(0), [a.rectify])
    nan = violations.new_full((1,), torch.nan)
    factors = token_factors(index, S, a.reduction, a.denominator, a.reward_advantages)
    if a.importance_weights is not None:
        factors = factors * select(a.importance_weights, rows)
    return Tokens(
        None if a.old_log_probs is None else select(a.old_log_probs, rows),
        select(a.reward_advantages, rows),
        select(a.cost_advantages, rows),
        torch.cat([reward_weights, nan])[index],
        torch.cat([cost_weights[0], nan])[index],
        select(a.ref_log_probs, rows) if a.ref_log_probs is not None and a.kl_coefficient > 0 else None,
        factors,
    )


def token_loss(log_probs: Tensor, tokens: Tokens, a: PolicyArguments) -> TokenLoss:
    """Evaluates ℓ_t and its derivative for [N] tokens."""
    old = log_probs if tokens.old_log_probs is None else tokens.old_log_probs
    raw = log_probs - old
    log_ratio = raw.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - a.clip_low, 1 + a.clip_high)
    streams: list[tuple[Tensor | None, Tensor]]
    if a.surrogate == "separate":
        streams = [(tokens.reward_weights, tokens.reward_advantages), (tokens.cost_weights, -tokens.cost_advantages)]
    else:
        mixed = tokens.reward_weights * tokens.reward_advantages - tokens.cost_weights * tokens.cost_advantages
        streams = [(None, mixed)]

    loss = torch.zeros_like(log_probs)
    slope = torch.zeros_like(log_probs)
    clipped = torch.zeros_like(log_probs, dtype=torch.bool)
    for weight, advantage in streams:
        plain = ratio * advantage
        limited = bounded * advantage
        bites = limited < plain
        value = torch.minimum(plain, limited)
        derivative = plain.masked_fill(bites, 0.0)
        if weight is None:
            loss -= value
            slope -= derivative
            clipped |= bites
        else:
            loss -= weight * value
            slope -= weight * derivative
            clipped |= bites & (weight != 0)
    slope.masked_fill_(raw.abs() > LOG_RATIO_BOUND, 0.0)

    if tokens.ref_log_probs is not None:
        d = tokens.ref_log_probs - log_probs
        excess = d.expm1()
        loss += a.kl_coefficient * (excess - d)
        slope -= a.kl_coefficient * excess
    return TokenLoss(loss, slope, clipped, log_ratio.expm1() - log_ratio)


def unsafe_fraction(violations: Tensor) -> Tensor:
    """Share of the responses with v > 0 among those that a constraint applies to (not −inf): [] of [S], [K] of [K, S].

    0 for none, NaN if a violation is (it is not known to be safe).
    """
    unsafe = (violations > 0).to(violations.dtype).masked_fill(violations.isnan(), torch.nan)
    return unsafe.sum(-1) / (violations != -torch.inf).sum(-1).clamp(min=1)


def rectified_policy_loss(a: RectifiedArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Implements the registered op: (loss, clip_fraction, approx_kl, unsafe_fraction, d loss / d log_probs [T])."""
    rows = valid_rows(a.sequence_ids != -1)
    tokens = gather_tokens("rectified_policy_loss", rows, a, a.violations)
    terms = token_loss(select(a.log_probs, rows), tokens, a)
    gradient = terms.slope * tokens.factors
    if rows is not None:
        gradient = torch.zeros_like(a.log_probs).index_copy_(0, rows, gradient)
    N = max(terms.loss.numel(), 1)
    return (
        (terms.loss * tokens.factors).sum(),
        terms.clipped.sum() / N,
        terms.divergence.sum() / N,
        unsafe_fraction(a.violations),
        gradient,
    )
