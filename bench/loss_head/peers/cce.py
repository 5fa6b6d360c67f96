"""Apple's cut-cross-entropy, arXiv 2411.09009, exact: without gradient filtering."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.loss_head.cases import Case
from bench.loss_head.peers.peer import Peer, autograd_tasks
from bench.loss_head.peers.plain import cannot_compile, rectified, valid_tokens


def _log_probs(case: Case) -> Callable[[], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    torch.compiler.reset()  # see bench.loss_head.peers.plain
    impl = "torch_compile" if case.device.type == "cpu" else "cce"

    def compute() -> Tensor:
        return -linear_cross_entropy(
            case.hidden, case.weight, case.targets, reduction="none", filter_eps=None, impl=impl
        )

    return compute


def _policy_loss(case: Case) -> Callable[[], Tensor]:
    log_probs = _log_probs(case)

    def compute() -> Tensor:
        return rectified(case.valid(log_probs()), *valid_tokens(case), case.costs)

    return compute


def _unavailable(device: torch.device) -> str | None:
    try:
        import cut_cross_entropy  # noqa: F401
    except ImportError as error:
        return f"cut-cross-entropy cannot be imported: {error}"
    return cannot_compile(device)


CCE = Peer(
    name="cce",
    notes='cut-cross-entropy, reduction="none", filter_eps=None; impl="cce" on GPUs, "torch_compile" on CPUs, where it '
    "holds all logits",
    task=autograd_tasks(_log_probs, _policy_loss),
    unavailable=_unavailable,
)
