"""Liger-Kernel's heads: for GRPO, for log-probabilities of any loss, and for the cross-entropy.

LIGER          LigerFusedLinearGRPOLoss, and the log-probabilities that it is made of
LIGER_SCALED   LigerFusedLinearScaledCrossEntropyFunction, log-probabilities with a loss of ours on them
LIGER_CE       LigerFusedLinearCrossEntropyLoss, whose gradients are formed in the forward, of a mean alone
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.loss_head.cases import CLIP, RESPONSES, Case
from bench.loss_head.peers.peer import Peer, autograd_tasks, needs_a_gpu
from bench.loss_head.peers.plain import valid_row_tasks


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


def _scaled_log_probs(case: Case) -> Callable[[], Tensor]:
    """Of the rows that are not ignored, [N]."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    targets = case.valid(case.targets)
    return lambda: -LigerFusedLinearScaledCrossEntropyFunction.apply(case.valid(case.hidden), case.weight, targets)


def _scaled_unavailable(device: torch.device) -> str | None:
    try:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction  # noqa: F401
    except ImportError as error:
        return f"liger-kernel's scaled cross-entropy cannot be imported: {error}"
    return None


LIGER_SCALED = Peer(
    name="liger_scaled",
    notes="LigerFusedLinearScaledCrossEntropyFunction on the rows that are not ignored: its CuTe kernels on Hopper "
    "GPUs, elsewhere chunks of 512 rows in torch, which it has from verl",
    task=valid_row_tasks(_scaled_log_probs),
    unavailable=_scaled_unavailable,
)


def _cross_entropy(case: Case, reduction: str) -> Callable[[], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    # float32 sums of the weight's gradient, as ours.
    loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction, accum_dtype=torch.float32)
    return lambda: loss(case.weight, case.hidden, case.targets)


def _cross_entropy_log_probs(case: Case) -> Callable[[], Tensor]:
    losses = _cross_entropy(case, "none")
    return lambda: -losses()


LIGER_CE = Peer(
    name="liger_ce",
    notes="LigerFusedLinearCrossEntropyLoss, sums in float32: the mean cross-entropy, no policy loss, no gradient of "
    "single log-probabilities; computes ignored rows",
    task=autograd_tasks(_cross_entropy_log_probs, lambda case: _cross_entropy(case, "mean")),
    objective="cross_entropy",
    unavailable=needs_a_gpu("liger_kernel.transformers"),
    computations=("policy_loss", "log_probs"),
)
