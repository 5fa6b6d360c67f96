"""QuACK's linear cross-entropy, of kernels in CuTe: `quack.linear_cross_entropy`.

Written from its source: it could be neither installed nor run where this was.
"""

from collections.abc import Callable

from torch import Tensor

from bench.loss_head.cases import Case
from bench.loss_head.peers.peer import Peer, autograd_tasks, needs_a_gpu

ALIGNMENT = 8  # of tokens, width and vocabulary, which its chunks ask for


def _losses(case: Case, reduction: str) -> Callable[[], Tensor]:
    """From all logits at once."""
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return lambda: linear_cross_entropy_func(case.hidden, case.weight, None, case.targets, reduction=reduction)


def _log_probs(case: Case) -> Callable[[], Tensor]:
    losses = _losses(case, "none")
    return lambda: -losses()


def _mean(case: Case) -> Callable[[], Tensor]:
    """In chunks where it can, as its module chooses."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if any(size % ALIGNMENT for size in (*case.hidden.shape, case.weight.shape[0])):
        return _losses(case, "mean")
    return lambda: chunked_linear_cross_entropy(case.hidden, case.weight, case.targets, reduction="mean")


QUACK = Peer(
    name="quack",
    notes="quack.linear_cross_entropy, default chunks of 4096 rows where 8 divides all sizes, else all logits, as for "
    "log-probabilities; the mean cross-entropy, no policy loss; computes ignored rows",
    task=autograd_tasks(_log_probs, _mean),
    objective="cross_entropy",
    unavailable=needs_a_gpu("quack.linear_cross_entropy"),
)
