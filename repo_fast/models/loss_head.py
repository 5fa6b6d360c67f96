"""The language-model head that computes a loss where its weight is.

Under ZeRO-3 a parameter is whole only while the module that owns it runs. So whatever needs the LM head's weight, and
must not build the [T, V] logits, has to run inside the head's own forward: DeepSpeed then gathers the weight before,
and the gradient hook fires after. A loaded model's head becomes a `LossHead` by assigning `__class__`, which keeps its
parameters, its place in the model, and its being tied to the embedding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from repo_fast.ops import fused_rectified_policy_loss


class LossHead(nn.Linear):
    """`nn.Linear` without a bias, that can hand its weight to a loss instead of multiplying by it."""

    def forward(self, hidden: torch.Tensor, loss: Callable[[torch.Tensor, torch.Tensor], Any] | None = None) -> Any:
        """Logits, or what a loss makes of hidden states and weight.

        Args:
            hidden: [..., D] without `loss`; [T, D] with one.
            loss: Called as `loss(hidden, weight)` with the weight [V, D] whole.

        Returns:
            Logits [..., V], or the loss's own return value.
        """
        if loss is None:
            return super().forward(hidden)
        return loss(hidden, self.weight)


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """The negative log-likelihood of the targets, summed: what supervised losses need, at three matrix products.

    -sum log p has the gradient of the policy loss, on-policy, where every reward advantage is 1: the fused op knows it
    in its forward, where a cross-entropy made of `linear_log_probs` would have to compute the logits again.

    Args:
        hidden: [T, D].
        weight: [V, D], in the dtype of `hidden`.
        targets: [T] int64; -100 is ignored.
        backend: Of the op.

    Returns:
        Scalar, float32, in nats, with gradients to `hidden` and `weight`; one backward.
    """
    T = targets.shape[0]
    result = fused_rectified_policy_loss(
        hidden,
        weight,
        targets,
        old_log_probs=None,
        reward_advantages=hidden.new_ones(T, dtype=torch.float32),
        cost_advantages=hidden.new_zeros(T, dtype=torch.float32),
        sequence_ids=torch.zeros_like(targets),
        costs=None,
        prompt_ids=None,
        violations=hidden.new_zeros(1, dtype=torch.float32),
        multiplier=0.0,
        entropy=False,
        reduction="sum",
        backend=backend,
    )
    # The op's loss is the sum of -ratio = -1; its gradient is what is wanted of it.
    return (result.loss - result.loss.detach()) - result.log_probs.sum()
