"""Supervised learning of a policy: cross-entropy on responses given, through the loss head.

Used for the PTX loss of an update (`learning/learner.py`) and for supervised fine-tuning (`jobs/finetuning.py`).
"""

from collections.abc import Sequence

import torch

from repo_fast.engine import Engine
from repo_fast.models.loss_head import Projection, summed_cross_entropy
from repo_fast.packing.rows import PackedBatch, idle_batch, pack_dialogues, with_last

# A dialogue, int64 on the CPU: in turn the tokens that are given and those of the response to imitate. So a prompt and
# its response, and for a chat with several responses as many of such pairs.
Shown = tuple[torch.Tensor, ...]


def learned_tokens(shown: Shown) -> int:
    """How many tokens of a dialogue are to be imitated."""
    return sum(part.numel() for part in shown[1::2])


def imitation_backward(
    policy: Engine, rows: Sequence[Sequence[Shown]], scale: float, device: torch.device, backend: str
) -> torch.Tensor:
    """Add the gradients of the response tokens' cross-entropy, micro-batch by micro-batch, as a step's last.

    Args:
        policy: Under training.
        rows: This rank's micro-batches, as many as the other ranks'; an empty one only keeps the rank in step.
        scale: Factor on the summed cross-entropy in the loss.
        device: Where batches go.
        backend: Of the ops.

    Returns:
        The summed cross-entropy (nats) of this rank, without the scale: float64 scalar, CPU.
    """
    total = torch.zeros((), dtype=torch.float64)
    for row, last in with_last(rows):
        loss = _summed_loss(policy, row, device, backend)
        policy.backward(loss * scale, last=last)
        total += loss.detach().double().cpu()
    return total


@torch.no_grad()
def imitation_loss(policy: Engine, rows: Sequence[Sequence[Shown]], device: torch.device, backend: str) -> torch.Tensor:
    """The same without gradients: the summed cross-entropy (nats) of this rank, float64 scalar, CPU."""
    losses = [_summed_loss(policy, row, device, backend).double().cpu() for row in rows]
    return torch.stack(losses).sum() if losses else torch.zeros((), dtype=torch.float64)


def _summed_loss(policy: Engine, row: Sequence[Shown], device: torch.device, backend: str) -> torch.Tensor:
    def at_head(hidden: torch.Tensor, projection: Projection, packed: PackedBatch) -> torch.Tensor:
        return summed_cross_entropy(hidden, projection, packed.targets, backend=backend)

    return policy(pack_dialogues(row, device) if row else idle_batch(device), at_head)
