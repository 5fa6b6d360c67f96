"""The ops of this repository."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from bench.loss_head.cases import CLIP, MULTIPLIER, Case
from bench.loss_head.peers.peer import Peer, autograd_tasks
from repo_fast.ops import fused_rectified_policy_loss, linear_log_probs


def _log_probs(case: Case, options: dict[str, Any]) -> Callable[[], Tensor]:
    return lambda: linear_log_probs(case.hidden, case.weight, case.targets, **options)


def _policy_loss(case: Case, options: dict[str, Any]) -> Callable[[], Tensor]:
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
            **{"multiplier": MULTIPLIER, **options},
            clip=(CLIP, CLIP),
            reduction="token_mean",
        ).loss

    return compute


def _four_constraints(case: Case) -> Callable[[], Tensor]:
    costs, advantages = case.costs.repeat(4, 1), case.cost_advantages.repeat(4, 1)
    four = replace(case, costs=costs, cost_advantages=advantages)
    return _policy_loss(four, {"multiplier": MULTIPLIER / 4})


def _peer(name: str, notes: str, **options: Any) -> Peer:
    return Peer(
        name, notes, autograd_tasks(lambda case: _log_probs(case, options), lambda case: _policy_loss(case, options))
    )


OURS = _peer("repo_fast", 'backend="auto"', backend="auto")
# So far off that the results are the same: what a cap costs, whatever it is.
OURS_CAPPED = _peer("repo_fast softcap", 'backend="auto", softcap=1e6, which changes no result', softcap=1e6)
OURS_CONSTRAINED = Peer(
    "repo_fast 4 constraints",
    'backend="auto", four equal constraints at a quarter of the multiplier, whose loss is that of one',
    autograd_tasks(lambda case: _log_probs(case, {}), _four_constraints),
    computations=("policy_loss",),
)
OURS_TORCH = _peer("repo_fast torch", 'backend="torch", chunked PyTorch', backend="torch")
