"""Plain PyTorch, which holds the [T, V] logits, and the same under torch.compile."""

import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.loss_head.cases import CLIP, MULTIPLIER, RESPONSES, RESPONSES_PER_PROMPT, Case
from bench.loss_head.peers.peer import Peer, Prepare, autograd_tasks
from bench.measuring.measure import Task

# log-probabilities of the rows that are not ignored [N], those rows' old log-probabilities, reward and cost advantages
# [N] and sequence ids [N], costs [S] -> scalar
Objective = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _clipped(ratio: Tensor, advantages: Tensor) -> Tensor:
    return torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)


def rectified(log_probs: Tensor, old: Tensor, reward: Tensor, cost: Tensor, sequence: Tensor, costs: Tensor) -> Tensor:
    """RePO's loss, as one writes it for prompts with equally many responses."""
    ratio = (log_probs - old).exp()
    means = costs.view(-1, RESPONSES_PER_PROMPT).mean(1).repeat_interleave(RESPONSES_PER_PROMPT, output_size=RESPONSES)
    unsafe = (means > 0)[sequence]
    reward_weight = torch.where(unsafe, 1 / (1 + MULTIPLIER), 1.0)
    cost_weight = torch.where(unsafe, MULTIPLIER / (1 + MULTIPLIER), 0.0)
    return -(reward_weight * _clipped(ratio, reward) + cost_weight * _clipped(ratio, -cost)).mean()


def grpo(log_probs: Tensor, old: Tensor, reward: Tensor, cost: Tensor, sequence: Tensor, costs: Tensor) -> Tensor:
    """The clipped loss of the rewards alone."""
    return -_clipped((log_probs - old).exp(), reward).mean()


def cross_entropy(
    log_probs: Tensor, old: Tensor, reward: Tensor, cost: Tensor, sequence: Tensor, costs: Tensor
) -> Tensor:
    return -log_probs.mean()


OBJECTIVES: dict[str, Objective] = {"rectified": rectified, "grpo": grpo, "cross_entropy": cross_entropy}


def valid_tokens(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What an `Objective` takes of each token that is not ignored."""
    tokens = (case.old_log_probs, case.reward_advantages, case.cost_advantages, case.sequence_ids)
    return tuple(map(case.valid, tokens))


def expand(case: Case, values: Tensor) -> Tensor:
    """[N] values of the rows that are not ignored -> [T], 0 elsewhere."""
    if case.rows.numel() == case.targets.numel():
        return values
    return values.new_zeros(case.targets.shape).index_copy(0, case.rows, values)


def valid_row_tasks(log_probs: Prepare) -> Callable[[str, Case], Task]:
    """`Peer.task` from log-probabilities [N] of the rows that are not ignored, and the loss above on them."""

    def expanded(case: Case) -> Callable[[], Tensor]:
        compute = log_probs(case)
        return lambda: expand(case, compute())

    def policy_loss(case: Case) -> Callable[[], Tensor]:
        compute, tokens = log_probs(case), valid_tokens(case)
        return lambda: rectified(compute(), *tokens, case.costs)

    return autograd_tasks(expanded, policy_loss)


def full_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[N] from all the logits, by a float32 softmax."""
    return -F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


def full_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *objective: Tensor) -> Tensor:
    return rectified(full_log_probs(hidden, weight, targets), *objective)


# Ignored rows are left out of the product, which costs a line.


def _log_probs(case: Case, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
    return lambda: expand(case, function(case.valid(case.hidden), case.weight, case.valid(case.targets)))


def _policy_loss(case: Case, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
    objective = (*valid_tokens(case), case.costs)
    return lambda: function(case.valid(case.hidden), case.weight, case.valid(case.targets), *objective)


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch.compiler.reset()  # otherwise the limit on recompilations, reached after some cases, falls back to eager
    return torch.compile(function, fullgraph=True, dynamic=False)


def cannot_compile(device: torch.device) -> str | None:
    """Why torch.compile cannot run on a device, None if it can."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile needs a C++ compiler"
    return None


PLAIN = Peer(
    name="plain",
    notes="PyTorch, all logits, float32 softmax",
    task=autograd_tasks(
        log_probs=lambda case: _log_probs(case, full_log_probs), policy_loss=lambda case: _policy_loss(case, full_loss)
    ),
)
COMPILE = Peer(
    name="compile",
    notes="torch.compile of plain: fullgraph, static shapes, default mode",
    task=autograd_tasks(
        log_probs=lambda case: _log_probs(case, _compiled(full_log_probs)),
        policy_loss=lambda case: _policy_loss(case, _compiled(full_loss)),
    ),
    unavailable=cannot_compile,
)
