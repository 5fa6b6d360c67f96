"""PyTorch's own chunked linear cross-entropy, `torch.nn.functional.linear_cross_entropy` with options."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.loss_head.cases import Case
from bench.loss_head.peers.peer import Peer, autograd_tasks

CPU_CHUNK_ROWS = 512  # its own choice of a few rows makes it 2 to 5 times slower on a CPU


def _make(case: Case, reduction: str) -> Callable[[], Tensor]:
    rows = CPU_CHUNK_ROWS if case.device.type == "cpu" else None
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

    def compute() -> Tensor:
        return F.linear_cross_entropy(case.hidden, case.weight, case.targets, reduction=reduction, options=options)

    return compute


def _log_probs(case: Case) -> Callable[[], Tensor]:
    losses = _make(case, "none")
    return lambda: -losses()


def _unavailable(device: torch.device) -> str | None:
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked linear_cross_entropy"


TORCH_LINEAR = Peer(
    name="torch_linear",
    notes="torch.nn.functional.linear_cross_entropy, default options but for chunks of 512 rows on CPUs; the mean "
    "cross-entropy, no policy loss; computes ignored rows",
    task=autograd_tasks(_log_probs, lambda case: _make(case, "mean")),
    objective="cross_entropy",
    unavailable=_unavailable,
)
