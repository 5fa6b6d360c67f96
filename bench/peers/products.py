"""The bare matrix products of a computation, through torch, into buffers that are there already: the floor."""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case
from bench.measure import Task, elapsed_ms
from bench.peers.peer import Peer

# The pitch, in bytes, that lets a GPU load rows of logits in whole vectors and by TMA.
ALIGNMENT_BYTES = 128
TRIALS = 5


def _task(computation: str, case: Case) -> Task:
    """The products over the rows that are not ignored; on a GPU the faster of V as it is and V padded with zeros."""
    hidden = case.valid(case.hidden.detach())
    weight = case.weight.detach()
    as_it_is = Task(_products(computation, hidden, weight))
    alignment = ALIGNMENT_BYTES // weight.element_size()
    if case.device.type == "cpu" or weight.shape[0] % alignment == 0:
        return as_it_is
    padded = Task(_products(computation, hidden, F.pad(weight, (0, 0, 0, -weight.shape[0] % alignment))))
    return min(as_it_is, padded, key=lambda task: _median_ms(task, case.device))


def _median_ms(task: Task, device: torch.device) -> float:
    elapsed_ms(task, device)
    return statistics.median(elapsed_ms(task, device) for _ in range(TRIALS))


def _products(computation: str, hidden: Tensor, weight: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    logits = hidden @ weight.T
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def forward() -> None:
        torch.mm(hidden, weight.T, out=logits)

    def backward() -> None:
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.T, hidden, out=grad_weight)

    steps = {"log_probs": [forward], "log_probs_backward": [backward], "policy_loss": [forward, backward]}[computation]

    def run() -> tuple[Tensor, ...]:
        for step in steps:
            step()
        return logits, grad_hidden, grad_weight

    return run


PRODUCTS = Peer(
    name="products",
    notes="the floor: torch.mm into buffers that are there already; on GPUs the faster of V and V padded",
    task=_task,
    objective=None,
)
