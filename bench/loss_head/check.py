"""Whether an implementation computes what it says: its result beside one formed by hand in float32, block by block.

A plausibility check: it runs on every case that is timed, so that no wrong result, however fast, gets into a table. The
ops' own exactness is tested in tests/ops.
"""

from functools import lru_cache

import torch
from torch import Tensor

from bench.loss_head.cases import BLOCK_ROWS, Case
from bench.loss_head.peers import Peer
from bench.loss_head.peers.plain import OBJECTIVES, valid_tokens


def check(peer: Peer, computation: str, case: Case, results: Tensor | tuple[Tensor, ...]) -> None:
    """Compares what a task of `peer` returned with the truth, norm-wise.

    Raises:
        AssertionError: a result is further off than rounding explains.
    """
    names = ["log_probs"] if computation == "log_probs" else ["grad_hidden", "grad_weight"]
    values = [results] if isinstance(results, Tensor) else results
    # Operands, logits, their gradients and results are each rounded to the dtype of the inputs, and rounding errors of
    # float32 sums over V add up like a random walk.
    V, dtype = case.weight.shape[0], case.hidden.dtype
    bound = 4 * torch.finfo(dtype).eps + V**0.5 * torch.finfo(torch.float32).eps
    for name, value, true in zip(names, values, truth(computation, case, peer.objective), strict=True):
        error = ((value - true).norm() / true.norm()).item()
        assert error <= bound, f"{peer.name}, {computation}: {name} is off by {error:.1e} of its norm, not {bound:.1e}"


@lru_cache(maxsize=2)  # every peer of a case is compared with it
def truth(computation: str, case: Case, objective: str | None) -> tuple[Tensor, ...]:
    """(log_probs [T],) or (grad_hidden [T, D], grad_weight [V, D]), float32."""
    log_probs = _log_probs(case)
    if computation == "log_probs":
        return (log_probs,)
    if computation == "log_probs_backward":
        return _gradients(case, case.incoming)
    log_probs.requires_grad_()
    loss = OBJECTIVES[objective](case.valid(log_probs), *valid_tokens(case), case.costs)
    return _gradients(case, *torch.autograd.grad(loss, log_probs))


def _log_probs(case: Case) -> Tensor:
    result = torch.zeros(case.targets.shape, device=case.device)
    weight = case.weight.detach().float()
    for rows in case.rows.split(BLOCK_ROWS):
        logits = case.hidden.detach()[rows].float() @ weight.T
        result[rows] = logits.log_softmax(1).gather(1, case.targets[rows, None]).squeeze(1)
    return result


def _gradients(case: Case, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a loss whose derivative in the log-probabilities is `slopes` [T]."""
    hidden, weight = case.hidden.detach().float(), case.weight.detach().float()
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    for rows in case.rows.split(BLOCK_ROWS):
        grad_logits = (hidden[rows] @ weight.T).softmax(1).neg_()
        grad_logits[torch.arange(rows.numel(), device=case.device), case.targets[rows]] += 1
        grad_logits *= slopes[rows, None]
        grad_hidden[rows] = grad_logits @ weight
        grad_weight += grad_logits.T @ hidden[rows]
    return grad_hidden, grad_weight
