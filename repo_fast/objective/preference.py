"""The losses that reward and cost models learn preferences by: pure tensors.

Safe RLHF (Dai et al. 2023, arXiv 2310.12773): a reward model learns that the better response scores higher (equation
5), a cost model that the more harmful one does, and, from labels, on which side of zero each belongs (equation 6):

    reward:  -log sigma(r_better - r_worse)
    cost:    -log sigma(c_unsafer - c_safer)  -  sum over the labelled responses of  log sigma(s c)

with s = +1 for a response labelled unsafe and -1 for a safe one, so that a cost above 0 means unsafe. Both carry a
penalty on the mean squared score, which keeps scores near zero; differences alone would leave them free to drift.

A cost model with several heads has both equations for each, and the mean of these: however many heads there are, the
trunk's learning rate, the penalty and the clipping of gradients then mean what they do with one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F


class PreferenceLoss(NamedTuple):
    """The loss of a batch and its parts, each summed over the batch's examples: scalars in the dtype of the scores.

    Attributes:
        loss: ranking + sign + regularization * penalty; differentiable, the others are not.
        ranking: -log sigma of the differences.
        sign: -log sigma of the scores with the sign of their labels.
        penalty: The mean squared score of each example's responses.
    """

    loss: torch.Tensor
    ranking: torch.Tensor
    sign: torch.Tensor
    penalty: torch.Tensor


def preference_loss(
    scores: torch.Tensor,
    example_ids: torch.Tensor,
    labels: torch.Tensor,
    orders: torch.Tensor | None = None,
    *,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    regularization: float = 0.0,
) -> PreferenceLoss:
    """The loss of reward models (without labels) and of cost models, summed over examples.

    An example is a pair, whose first score should be the higher one, or a single labelled response.

    Args:
        scores: [S] floating point.
        example_ids: [S] int64, ascending: the example that each response belongs to, one or two of each.
        labels: [S] in the dtype of the scores: +1 where a response is labelled unsafe, -1 safe, 0 not at all.
        orders: [P] in that dtype, of the P pairs: +1 where the first score should be the higher one, -1 the second, 0
            neither, without a ranking term. None: the first of all.
        margin: What the first score of a pair must exceed the second by (score units).
        label_smoothing: Share of preferences and labels taken to be wrong: each term is mixed with its opposite.
        regularization: Weight of the mean squared score.

    Returns:
        Sums over examples. Divide by the number of examples of the global batch for the mean.
    """
    S = scores.numel()
    first = torch.zeros(S, dtype=torch.bool, device=scores.device)
    first[:-1] = example_ids[:-1] == example_ids[1:]
    second = first.roll(1)
    difference = scores[first] - scores[second]
    if orders is None:
        ranking = _smoothed(difference - margin, label_smoothing).sum()
    else:
        ranking = (orders.abs() * _smoothed(orders * difference - margin, label_smoothing)).sum()
    sign = (labels.abs() * _smoothed(labels * scores, label_smoothing)).sum()
    penalty = (scores.square() * torch.where(first | second, 0.5, 1.0)).sum()
    loss = ranking + sign + regularization * penalty
    return PreferenceLoss(loss, ranking.detach(), sign.detach(), penalty.detach())


def mean_over_heads(losses: Sequence[PreferenceLoss]) -> PreferenceLoss:
    """The loss of a model whose heads have these, at least one."""
    return PreferenceLoss(*(torch.stack(parts).mean(0) for parts in zip(*losses, strict=True)))


def _smoothed(logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    """-log sigma(logits), mixed with -log sigma(-logits)."""
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)
