"""RePO's rectified clipped loss (arXiv 2410.19933) of tokens whose log-probabilities are known, with its derivative.

With ρ = exp(clamp(log π_θ − log π_old, ±20)), s(A) = min(ρA, clip(ρ)·A) and the weights w of the token's sequence:

    separate   ℓ = −[w_r·s(A_r) + w_c·s(−A_c)]        dℓ/dlog π_θ = −Σ_streams w·A·ρ·[unclipped branch taken]
    mixed      ℓ = −s(w_r·A_r − w_c·A_c)
    + kl_coefficient·(exp(d) − d − 1), d = log π_ref − log π_θ

Two launches: `count_tokens` counts the valid tokens of each sequence, from which the reduction's factors follow, and
the loss kernel does everything else a block of tokens at a time. Counts are integers, so atomic additions give the same
result in any order; the blocks' partial sums are added by PyTorch, in one order. `token_terms` is what the fused op's
row kernel uses as well. With several constraints `combine_streams` goes before, a third launch.

ρ − 1 − log ρ and exp(d) − d − 1 lose all digits near 0 if written so; `exp_remainder` has the series there.

Not measured on a GPU yet.
"""

import torch
import triton
import triton.language as tl

BLOCK = 256


@triton.jit
def exp_remainder(x):
    """exp(x) − 1 − x, >= 0."""
    # The first term left out of the series, x¹²/12!, is 1e-11 of x²/2 where |x| < 0.6.
    series = 1.0 / 3628800 + x * (1.0 / 39916800)
    series = 1.0 / 40320 + x * (1.0 / 362880 + x * series)
    series = 1.0 / 720 + x * (1.0 / 5040 + x * series)
    series = 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * series)))
    return tl.where(tl.abs(x) < 0.6, series * x * x, tl.exp(x) - 1.0 - x)


@triton.jit
def _clipped_term(ratio, bounded, advantage):
    """(s(A), its derivative in log π_θ, whether the clipped branch is strictly the smaller one)."""
    plain = ratio * advantage
    limited = bounded * advantage
    bites = limited < plain  # never with NaN, which plain then hands on
    return tl.where(bites, limited, plain), tl.where(bites, 0.0, plain), bites


@triton.jit
def token_terms(
    log_prob, old_log_prob, reward_advantage, cost_advantage, violation, multiplier, ref_log_prob,
    clip_low, clip_high, kl_coefficient, RECTIFY: tl.constexpr, MIXED: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """(ℓ_t, dℓ_t/dlog π_θ, whether clipping bit, (ρ − 1) − log ρ) of one token or a block of tokens.

    A violation of −inf is of a constraint that does not apply, one of NaN makes the loss NaN; a stream of weight 0 is
    multiplied, so NaN in it shows.
    """
    reward_weight = 1.0 / (1.0 + multiplier)
    cost_weight = multiplier / (1.0 + multiplier)
    active = violation > (0.0 if RECTIFY else float("-inf"))
    reward_weight = tl.where(active, reward_weight, 1.0)
    cost_weight = tl.where(active, cost_weight, 0.0)
    unknown = violation != violation
    reward_weight = tl.where(unknown, violation, reward_weight)
    cost_weight = tl.where(unknown, violation, cost_weight)

    raw = log_prob - old_log_prob
    log_ratio = tl.where(raw > 20.0, 20.0, tl.where(raw < -20.0, -20.0, raw))  # unlike a minimum, it keeps NaN
    ratio = tl.exp(log_ratio)
    bounded = tl.where(
        ratio > 1.0 + clip_high, 1.0 + clip_high, tl.where(ratio < 1.0 - clip_low, 1.0 - clip_low, ratio)
    )
    if MIXED:
        mixed = reward_weight * reward_advantage - cost_weight * cost_advantage
        value, derivative, clipped = _clipped_term(ratio, bounded, mixed)
        loss = -value
        slope = -derivative
    else:
        reward_value, reward_derivative, reward_bites = _clipped_term(ratio, bounded, reward_advantage)
        cost_value, cost_derivative, cost_bites = _clipped_term(ratio, bounded, -cost_advantage)
        loss = -(reward_weight * reward_value + cost_weight * cost_value)
        slope = -(reward_weight * reward_derivative + cost_weight * cost_derivative)
        clipped = (reward_bites & (reward_weight != 0.0)) | (cost_bites & (cost_weight != 0.0))
    slope = tl.where(tl.abs(raw) > 20.0, 0.0, slope)
    if KL:
        d = ref_log_prob - log_prob
        remainder = exp_remainder(d)
        loss += kl_coefficient * remainder
        slope -= kl_coefficient * (remainder + d)
    return loss, slope, clipped, exp_remainder(log_ratio)


@triton.jit
def token_factor(counts, sequence, known, denominator, S, REDUCTION: tl.constexpr):
    """d loss/d ℓ_t of tokens of known sequences. `counts` is as from `count_tokens`; a denominator of None is its."""
    if REDUCTION == "sum":
        return 1.0
    elif REDUCTION == "token_mean":
        if denominator is None:
            return 1.0 / tl.maximum(tl.load(counts + S + 1), 1).to(tl.float32)
        else:
            return 1.0 / tl.load(denominator)
    else:
        count = tl.load(counts + sequence, mask=known, other=1).to(tl.float32)
        if denominator is None:
            return 1.0 / (count * tl.maximum(tl.load(counts + S), 1).to(tl.float32))
        else:
            return 1.0 / (count * tl.load(denominator))


@triton.jit
def _active(violations, sequence, known, multiplier, rectified):
    """(λ of a constraint for the sequences where it is active, else 0; their violations)."""
    violation = tl.load(violations + sequence, mask=known, other=float("nan"))
    floor = tl.where(rectified & 1 == 1, 0.0, float("-inf"))
    return tl.where(violation > floor, tl.load(multiplier), 0.0), violation


@triton.jit(do_not_specialize=["T", "S", "K", "rectified"])
def _streams_kernel(
    reward_advantages, cost_advantages, sequence_ids, violations, multiplier, rises, falls, T, S, K, rectified,
    MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.load(sequence_ids + t, mask=t < T, other=-1)
    known = (sequence >= 0) & (sequence < S)
    total = tl.full([BLOCK], 1.0, tl.float32)
    for k in range(K):
        active, violation = _active(violations + k * S, sequence, known, multiplier + k, rectified >> k)
        total += tl.where(violation != violation, violation, active)
    weight = 1.0 / total
    advantage = tl.load(reward_advantages + t, mask=t < T, other=0.0)
    fall = tl.zeros([BLOCK], tl.float32)
    if MIXED:
        rise = weight * advantage
    else:  # unlike maxima, these keep NaN
        rise = weight * tl.where(advantage < 0.0, 0.0, advantage)
        fall += weight * tl.where(advantage > 0.0, 0.0, -advantage)
    costs = cost_advantages + t
    for k in range(K):
        active, violation = _active(violations + k * S, sequence, known, multiplier + k, rectified >> k)
        weight = active / total
        advantage = tl.load(costs, mask=t < T, other=0.0)
        if MIXED:
            rise -= weight * advantage
        else:
            rise += weight * tl.where(advantage > 0.0, 0.0, -advantage)
            fall += weight * tl.where(advantage < 0.0, 0.0, advantage)
        costs += T
    tl.store(rises + t, 2.0 * rise, mask=t < T)
    tl.store(falls + t, 2.0 * fall, mask=t < T)


def combine_streams(
    reward_advantages: torch.Tensor,
    cost_advantages: torch.Tensor,
    sequence_ids: torch.Tensor,
    violations: torch.Tensor,
    multiplier: torch.Tensor,
    *,
    rectified: int,
    mixed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two streams that K + 1 are (`repo_fast/ops/loss.py` says why), in one launch and two looks at the violations.

    Args:
        reward_advantages: [T] float32, contiguous.
        cost_advantages: [K, T] float32, contiguous.
        sequence_ids: [T] int64, contiguous. Where they are out of range the results are NaN.
        violations: [K, S] float32, contiguous; −inf: does not apply.
        multiplier: [K] float32, contiguous.
        rectified: Bit k says whether constraint k is.
        mixed: Whether the first is the weighted sum of all, and the second 0.

    Returns:
        (advantages that are positive, advantages that are negative with their sign turned), [T] each, twice.
    """
    (K, T), S = cost_advantages.shape, violations.shape[1]
    rises, falls = torch.empty_like(reward_advantages), torch.empty_like(reward_advantages)
    if T > 0:
        _streams_kernel[(triton.cdiv(T, BLOCK),)](
            reward_advantages, cost_advantages, sequence_ids, violations, multiplier, rises, falls, T, S, K, rectified,
            MIXED=mixed, BLOCK=BLOCK,
        )  # fmt: skip
    return rises, falls


@triton.jit(do_not_specialize=["T", "S"])
def _count_kernel(sequence_ids, targets, counts, T, S, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.load(sequence_ids + t, mask=t < T, other=-1)
    if targets is not None:
        valid = tl.load(targets + t, mask=t < T, other=-100) != -100
    else:
        valid = sequence != -1
    known = valid & (sequence >= 0) & (sequence < S)
    before = tl.atomic_add(counts + sequence, 1, mask=known, sem="relaxed")
    firsts = tl.sum((known & (before == 0)).to(tl.int32))
    tl.atomic_add(counts + S, firsts, sem="relaxed")
    tl.atomic_add(counts + S + 1, tl.sum(valid.to(tl.int32)), sem="relaxed")


@triton.jit(do_not_specialize=["T", "S"])
def _loss_kernel(
    log_probs, old_log_probs, reward_advantages, cost_advantages, sequence_ids, violations, counts, multiplier,
    denominator, ref_log_probs, importance_weights, gradient, partial_sums, T, S, clip_low, clip_high, kl_coefficient,
    RECTIFY: tl.constexpr, MIXED: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    t = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.load(sequence_ids + t, mask=t < T, other=-1)
    valid = sequence != -1
    known = valid & (sequence >= 0) & (sequence < S)
    log_prob = tl.load(log_probs + t, mask=valid, other=0.0)
    old_log_prob = log_prob
    if old_log_probs is not None:
        old_log_prob = tl.load(old_log_probs + t, mask=valid, other=0.0)
    ref_log_prob = log_prob
    if ref_log_probs is not None:
        ref_log_prob = tl.load(ref_log_probs + t, mask=valid, other=0.0)
    loss, slope, clipped, divergence = token_terms(
        log_prob,
        old_log_prob,
        tl.load(reward_advantages + t, mask=valid, other=0.0),
        tl.load(cost_advantages + t, mask=valid, other=0.0),
        tl.load(violations + sequence, mask=known, other=float("nan")),
        tl.load(multiplier),
        ref_log_prob,
        clip_low, clip_high, kl_coefficient, RECTIFY, MIXED, ref_log_probs is not None,
    )  # fmt: skip
    factor = token_factor(counts, sequence, known, denominator, S, REDUCTION)
    if importance_weights is not None:
        factor *= tl.load(importance_weights + t, mask=valid, other=0.0)
    tl.store(gradient + t, tl.where(valid, slope * factor, 0.0), mask=t < T)
    sums = partial_sums + block * 3
    tl.store(sums, tl.sum(tl.where(valid, loss * factor, 0.0)))
    tl.store(sums + 1, tl.sum((valid & clipped).to(tl.float32)))
    tl.store(sums + 2, tl.sum(tl.where(valid, divergence, 0.0)))


def count_tokens(sequence_ids: torch.Tensor, targets: torch.Tensor | None, S: int) -> torch.Tensor:
    """How many valid tokens each sequence has: int32 [S + 2], the last two being how many sequences have any (S′), and
    how many valid tokens there are (N).

    Args:
        sequence_ids: [T] int64, contiguous. Ids outside [0, S) count in N alone.
        targets: [T] int64, contiguous: a token is valid if its target is not -100. None: if its sequence id is not -1.
        S: Number of sequences.
    """
    counts = torch.zeros(S + 2, dtype=torch.int32, device=sequence_ids.device)
    T = sequence_ids.numel()
    if T > 0:
        _count_kernel[(triton.cdiv(T, BLOCK),)](sequence_ids, targets, counts, T, S, BLOCK=BLOCK)
    return counts


def loss_of_tokens(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor | None,
    reward_advantages: torch.Tensor,
    cost_advantages: torch.Tensor,
    sequence_ids: torch.Tensor,
    violations: torch.Tensor,
    counts: torch.Tensor,
    multiplier: torch.Tensor,
    denominator: torch.Tensor | None,
    ref_log_probs: torch.Tensor | None,
    importance_weights: torch.Tensor | None,
    *,
    clip: tuple[float, float],
    kl_coefficient: float,
    rectify: bool,
    mixed: bool,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and its gradient.

    Args:
        log_probs, old_log_probs (None: on-policy), reward_advantages, cost_advantages, ref_log_probs (None: no
            penalty), importance_weights: [T] float32, contiguous.
        sequence_ids: [T] int64, contiguous; -1 is a token to leave out.
        violations: [S] float32, contiguous.
        counts: As from `count_tokens`.
        multiplier: λ, 0-d float32.
        denominator: 0-d float32, or None: the one that `counts` has.
        clip, kl_coefficient, rectify, mixed, reduction: As in the formulas.

    Returns:
        (sums [3] float32 of the reduced loss, the clipped tokens and the divergences; d loss/d log_probs [T])
    """
    T, S = log_probs.numel(), violations.numel()
    gradient = torch.empty_like(log_probs)
    blocks = triton.cdiv(T, BLOCK)
    partial_sums = log_probs.new_zeros(blocks, 3)
    if T > 0:
        _loss_kernel[(blocks,)](
            log_probs, old_log_probs, reward_advantages, cost_advantages, sequence_ids, violations, counts, multiplier,
            denominator, ref_log_probs, importance_weights, gradient, partial_sums, T, S, *clip, kl_coefficient,
            RECTIFY=rectify, MIXED=mixed, REDUCTION=reduction, BLOCK=BLOCK,
        )  # fmt: skip
    return partial_sums.sum(0), gradient
