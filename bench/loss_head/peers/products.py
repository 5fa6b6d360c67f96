"""The bare matrix products of a computation, through torch: the floor."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.loss_head.cases import Case
from bench.loss_head.peers.peer import Peer
from bench.measuring.measure import Task, median_ms

# The pitch, in bytes, that lets a GPU load rows of logits in whole vectors and by TMA; float32 on a CPU gains as well.
ALIGNMENT_BYTES = 128
TRIALS = 5


def _task(computation: str, case: Case) -> Task:
    """The products over the rows that are not ignored; the faster of V as it is and V padded with zeros."""
    hidden = case.valid(case.hidden.detach())
    weight = case.weight.detach()
    as_it_is = Task(_products(computation, hidden, weight))
    alignment = ALIGNMENT_BYTES // weight.element_size()
    if weight.shape[0] % alignment == 0:
        return as_it_is
    padded = Task(_products(computation, hidden, F.pad(weight, (0, 0, 0, -weight.shape[0] % alignment))))
    return min(as_it_is, padded, key=lambda task: median_ms(task, case.device, TRIALS))


def _products(computation: str, hidden: Tensor, weight: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def forward() -> tuple[Tensor]:
        return (torch.mm(hidden, weight.T),)

    def backward(logits: Tensor) -> tuple[Tensor, ...]:
        return torch.mm(logits, weight), torch.mm(logits.T, hidden)

    if computation == "log_probs":
        return forward
    if computation == "log_probs_backward":
        return partial(backward, *forward())
    return lambda: backward(*forward())


PRODUCTS = Peer(
    name="products",
    notes="the floor: torch.mm, the faster of V and V padded; like an op, it allocates what it returns",
    task=_task,
    objective=None,
)
