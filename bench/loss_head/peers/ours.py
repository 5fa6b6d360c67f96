"""The ops of this repository."""

from collections.abc import Callable

from torch import Tensor

from bench.loss_head.cases import CLIP, MULTIPLIER, Case
from bench.loss_head.peers.peer import Peer, autograd_tasks
from repo_fast.ops import fused_rectified_policy_loss, linear_log_probs


def _log_probs(case: Case, backend: str) -> Callable[[], Tensor]:
    return lambda: linear_log_probs(case.hidden, case.weight, case.targets, backend=backend)


def _policy_loss(case: Case, backend: str) -> Callable[[], Tensor]:
    def compute() -> Tensor:
        return fused_rectified_policy_loss(
            case.hidden,
            case.weight,
            case.targets,
            case.old_log_probs,
            case.reward_advantages,
            case.cost_advantages,
            case.sequence_ids,
            case.costs,
            case.prompt_ids,
            multiplier=MULTIPLIER,
            clip=(CLIP, CLIP),
            reduction="token_mean",
            backend=backend,
        ).loss

    return compute


def _peer(name: str, backend: str, notes: str) -> Peer:
    return Peer(
        name, notes, autograd_tasks(lambda case: _log_probs(case, backend), lambda case: _policy_loss(case, backend))
    )


OURS = _peer("repo_fast", "auto", 'backend="auto"')
OURS_TORCH = _peer("repo_fast torch", "torch", 'backend="torch", chunked PyTorch')
