"""Importance weights of responses that something else drew than the policy that learns from them.

The sampler's probabilities differ from the trainer's by kernels and precision. The token losses, whose clipped ratio is
that of pi_theta to pi_old as the trainer computes it, are multiplied by pi_old / pi_sampler (decoupled PPO, Hilton et
al. 2021, arXiv 2110.00641), at one of two levels:

    token       w_t = pi_old(y_t | x, y_<t) / pi_sampler(y_t | x, y_<t)
    sequence    w = pi_old(y | x) / pi_sampler(y | x) = prod_t w_t, for all tokens of the response

`sequence` is the importance weight proper: over what the sampler draws, w f(x, y) has the mean that f has under pi_old.
`token` leaves out the tokens before, which is a bias, and varies less (Liu et al. 2025, "When Speed Kills Stability").
The product spreads with the length of the response. Its geometric mean does not, but with it that mean is another.

Two bounds keep the variance down. A cap truncates, min(w, cap) (Ionides 2008, "Truncated Importance Sampling"). A mask
[low, high] takes w inside and 0 outside (IcePop, arXiv 2510.18855, for tokens; Liu et al. for responses).

What counts 0 stays in the denominators: the loss is the mean of w 1[low <= w <= high] l over all that was drawn.
Divided by what is left it would learn at full rate from however little that is, and under `sequence_mean` the one token
left of a response would count as much as a whole response.
"""

import math
from typing import Literal

import torch


def importance_weights(
    log_ratios: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    level: Literal["token", "sequence"],
    cap: float | None = None,
    mask: tuple[float, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounded weights of a rank's responses, and sums that `importance_metrics` makes its numbers of.

    A ratio that is not finite makes its weight NaN, and so the loss: no bound takes it for a large or small one.

    Args:
        log_ratios: float32 [T], log pi_old - log pi_sampler of each token (nats), packed.
        cu_seqlens: int32 [S + 1], where each response starts and ends.
        level: Whether each token has a weight of its own, or each response.
        cap: Weights count this at most.
        mask: (low, high); weights outside count 0.

    Returns:
        float32 [T], what each token's loss is multiplied by, and float64 [5]: how many weights there are, how many of
        them are capped, and masked, the sum of what they count, and that of its squares.
    """
    lengths = cu_seqlens.diff()
    highest = math.inf if cap is None else cap
    low, high = (0.0, math.inf) if mask is None else mask
    logs = torch.where(log_ratios.isfinite(), log_ratios, math.nan)
    if level == "sequence":
        # In float64: float32 would round a long response's sum. Out of range, exp is 0 or infinite, as the bounds need.
        zeros = torch.zeros(lengths.numel(), dtype=torch.float64)
        logs = zeros.index_add_(0, torch.repeat_interleave(lengths), logs.double())
    weights = logs.exp()
    # A NaN is neither.
    masked = (weights < low) | (weights > high)
    capped = (weights > highest) & ~masked
    weights = torch.where(masked, 0.0, weights).clamp(max=highest).float()
    counted = weights.double()
    sums = torch.stack([torch.ones_like(counted), capped.double(), masked.double(), counted, counted.square()]).sum(1)
    return weights.repeat_interleave(lengths) if level == "sequence" else weights, sums


def importance_metrics(sums: torch.Tensor) -> dict[str, float]:
    """What the bounds cut, from the sums of all ranks (`importance_weights`).

    Returns:
        The shares of weights that are capped and masked: of tokens, or at the level `sequence` of responses. The mean
        of what weights count. The effective share, (sum w)^2 / (n sum w^2), which is Kish's effective sample size over
        n: 1 where all count alike, 0 where all are masked.
    """
    weights, capped, masked, total, squares = sums.tolist()
    return {
        "importance_capped_share": capped / weights,
        "importance_masked_share": masked / weights,
        "importance_mean": total / weights,
        "importance_effective_share": total**2 / (weights * squares) if squares else 0.0,
    }
