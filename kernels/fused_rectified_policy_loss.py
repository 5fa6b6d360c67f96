"""RePO's policy loss (arXiv 2410.19933) on rows of logits, and its gradient in their place, in one pass.

A token's loss follows from its row as soon as the row's log-sum-exp is known, and everything else that it depends on
was known before: the old log-probability, the advantages, its prompt's mean cost, λ. So one program takes a row from
logits to the gradient of the loss, and three matrix products suffice where recomputing needs four:

    row_statistics    maximum, log-sum-exp, log-probability, entropy   (linear_log_probs.py: the same bits as there)
    gate              w_r, w_c from the violation of the token's prompt
    token_terms       ratio, clipping, loss term, slope                (rectified_policy_loss.py)
    write_gradient    the logits overwritten

What a program cannot know is counted before, in two small launches: the mean cost of each prompt
(prompt_violations.py; skipped if violations are given) and the valid tokens of each sequence (`count_tokens`). Nothing
is read back to the host. The rows' loss terms go to memory, 12 bytes a token, and PyTorch adds them in one order.

Figures and what was rejected are in linear_log_probs.py, whose memory traffic this kernel has: one read and one write
of the logits. Its own arithmetic is that of one token beside the V elements of its row.
"""

import torch
import triton
import triton.language as tl

from .linear_log_probs import open_row, row_arguments, row_statistics, write_gradient
from .rectified_policy_loss import token_factor, token_terms


@triton.jit(do_not_specialize=["start", "T", "S"])
def _policy_kernel(
    logits, pitch, hidden, hidden_stride_t, hidden_stride_d, weight, weight_stride_v, weight_stride_d, targets, rows,
    start, V, D, scale, cap,
    old_log_probs, reward_advantages, cost_advantages, sequence_ids, violations, counts, multiplier, denominator,
    ref_log_probs, importance_weights, log_probs, entropies, terms,
    T, S, clip_low, clip_high, kl_coefficient, entropy_coefficient,
    RECTIFY: tl.constexpr, MIXED: tl.constexpr, REDUCTION: tl.constexpr, ENTROPY: tl.constexpr, GRADIENT: tl.constexpr,
    EXACT: tl.constexpr, TILE: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, PAD: tl.constexpr,
    D_TILE: tl.constexpr,
):  # fmt: skip
    token, row, target, sound, own = open_row(
        logits, pitch, hidden, hidden_stride_t, hidden_stride_d, weight, weight_stride_v, weight_stride_d, targets,
        rows, start, V, D, EXACT, D_TILE,
    )  # fmt: skip
    log_prob, entropy, rate, maximum, inverse, offset, rest = row_statistics(
        row, pitch, V, target, own, scale, cap, entropies is not None, GRADIENT, TILE, THREADS, VECTOR, PAD
    )
    log_prob = tl.where(sound, log_prob, float("nan"))
    tl.store(log_probs + token, log_prob)
    if entropies is not None:
        tl.store(entropies + token, entropy)

    sequence = tl.load(sequence_ids + token)
    known = (sequence >= 0) & (sequence < S)
    old_log_prob = log_prob
    if old_log_probs is not None:
        old_log_prob = tl.load(old_log_probs + token)
    ref_log_prob = log_prob
    if ref_log_probs is not None:
        ref_log_prob = tl.load(ref_log_probs + token)
    loss, slope, clipped, divergence = token_terms(
        log_prob,
        old_log_prob,
        tl.load(reward_advantages + token),
        tl.load(cost_advantages + token),
        tl.load(violations + sequence, mask=known, other=float("nan")),
        tl.load(multiplier),
        ref_log_prob,
        clip_low, clip_high, kl_coefficient, RECTIFY, MIXED, ref_log_probs is not None,
    )  # fmt: skip
    factor = token_factor(counts, sequence, known, denominator, S, REDUCTION)
    if importance_weights is not None:
        factor *= tl.load(importance_weights + token)
    if ENTROPY:
        loss -= entropy_coefficient * entropy
    tl.store(terms + token, loss * factor)
    tl.store(terms + T + token, clipped.to(tl.float32))
    tl.store(terms + T + T + token, divergence)

    if GRADIENT:
        write_gradient(
            row, pitch, target, own, scale, cap, log_prob, entropy, rate, maximum, inverse, offset, rest,
            slope * factor, -entropy_coefficient * factor, ENTROPY, TILE,
        )  # fmt: skip


def policy_rows(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor | None,
    start: int,
    temperature: float,
    softcap: float | None,
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
    log_probs: torch.Tensor,
    entropies: torch.Tensor | None,
    terms: torch.Tensor,
    *,
    clip: tuple[float, float],
    kl_coefficient: float,
    entropy_coefficient: float,
    rectify: bool,
    mixed: bool,
    reduction: str,
    gradient: bool,
) -> None:
    """Takes a chunk of logits through the loss; if `gradient`, overwrites them by the loss's gradient.

    Args:
        logits, hidden, weight, targets, rows, start, temperature, softcap: As `linear_log_probs.row_arguments`.
        old_log_probs (None: on-policy), reward_advantages, cost_advantages, sequence_ids, violations, counts,
            multiplier, denominator, ref_log_probs, importance_weights: Of all T tokens, as
            `rectified_policy_loss.loss_of_tokens`.
        log_probs: Written, [T] float32, nats.
        entropies: Written, [T] float32, nats; None: not wanted, and `entropy_coefficient` is 0.
        terms: Written, [3, T] float32: each token's share of the reduced loss, whether it was clipped, (ρ − 1) − log ρ.
        clip, kl_coefficient, entropy_coefficient, rectify, mixed, reduction: As in the formulas.
    """
    arguments, settings = row_arguments(logits, hidden, weight, targets, rows, start, temperature, softcap)
    _policy_kernel[(logits.shape[0],)](
        *arguments, old_log_probs, reward_advantages, cost_advantages, sequence_ids, violations, counts, multiplier,
        denominator, ref_log_probs, importance_weights, log_probs, entropies, terms,
        targets.numel(), violations.numel(), *clip, kl_coefficient, entropy_coefficient,
        RECTIFY=rectify, MIXED=mixed, REDUCTION=reduction, ENTROPY=entropy_coefficient > 0, GRADIENT=gradient,
        **settings,
    )  # fmt: skip
