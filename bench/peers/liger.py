"""Liger-Kernel's fused linear GRPO loss, `LigerFusedLinearGRPOLoss`, and the log-probabilities that it is made of."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import CLIP, RESPONSES, Case
from bench.peers.peer import Peer, autograd_tasks


def _log_probs(case: Case) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    valid = case.targets != -100
    targets = case.targets.masked_fill(~valid, 0)

    def compute() -> Tensor:
        return LigerFusedLinearPPOBase.chunk_forward(case.hidden[None], case.weight, targets[None])[0] * valid

    return compute


def _policy_loss(case: Case) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=case.device.type != "cpu",
        use_ref_model=False,
        chunk_size=RESPONSES,
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        loss_type="bnpo",
    )
    valid = case.targets != -100
    shape = (RESPONSES, -1)
    tokens = case.targets.masked_fill(~valid, 0).view(shape)
    advantages = case.reward_advantages.view(shape)[:, 0].contiguous()
    old_log_probs = case.old_log_probs.view(shape)

    def compute() -> Tensor:
        hidden = case.hidden.view(*shape, case.hidden.shape[1])
        value, _ = loss(hidden, case.weight, tokens, valid.view(shape), advantages, old_per_token_logps=old_log_probs)
        return value

    return compute


def _unavailable(device: torch.device) -> str | None:
    try:
        import liger_kernel.chunked_loss  # noqa: F401
    except ImportError as error:
        return f"liger-kernel cannot be imported: {error}"
    return None


LIGER = Peer(
    name="liger",
    notes="LigerFusedLinearGRPOLoss, all responses in one chunk (it chunks tokens and vocabulary itself), its loss "
    "math compiled on GPUs; GRPO's loss, no costs; computes ignored rows",
    task=autograd_tasks(_log_probs, _policy_loss),
    objective="grpo",
    unavailable=_unavailable,
)
