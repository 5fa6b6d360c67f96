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
