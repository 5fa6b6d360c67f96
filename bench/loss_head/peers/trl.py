"""TRL's own head, `trl.kernels.ChunkedLogProbFunction`: log-probabilities tile by tile, again in the backward."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.loss_head.cases import Case
from bench.loss_head.peers.peer import Peer
from bench.loss_head.peers.plain import valid_row_tasks

COLUMNS = 32768  # of a tile, as `trl.trainer.utils.add_fused_lm_head` has it; rows are 4096


def _log_probs(case: Case) -> Callable[[], Tensor]:
    """Of the rows that are not ignored, [N]."""
    from trl.kernels import ChunkedLogProbFunction

    targets = case.valid(case.targets)

    def compute() -> Tensor:
        hidden = case.valid(case.hidden)
        temperature, softcap, scale = 1.0, None, 1.0
        outputs = ChunkedLogProbFunction.apply(
            hidden, case.weight, None, targets, temperature, COLUMNS, softcap, scale, ("log_probs",)
        )
        return outputs[0]

    return compute


def _unavailable(device: torch.device) -> str | None:
    try:
        from trl.kernels import ChunkedLogProbFunction  # noqa: F401
    except ImportError as error:
        return f"TRL's head cannot be imported: {error}"
    return None


TRL = Peer(
    name="trl",
    notes="trl.kernels.ChunkedLogProbFunction at the tiles of its trainers (4096 rows, 32768 columns), without "
    "entropies; row passes in Triton on GPUs, in torch on CPUs; it gets the rows that are not ignored, as its trainers "
    "choose them on GPUs alone",
    task=valid_row_tasks(_log_probs),
    unavailable=_unavailable,
)
