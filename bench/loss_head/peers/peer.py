"""What an adapter of an implementation looks like, and the tasks that are measured."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.loss_head.cases import COMPUTATIONS, Case
from bench.measuring.measure import Task

Prepare = Callable[[Case], Callable[[], Tensor]]


def runs_anywhere(device: torch.device) -> None:
    """The `unavailable` of an implementation that needs nothing."""


@dataclass(frozen=True)
class Peer:
    """An implementation, at the settings that were fastest for it.

    Attributes:
        name: In tables.
        notes: Its settings, and what it computes where that is simpler than the rest.
        task: (a computation of `bench.loss_head.cases.COMPUTATIONS`, case) -> its task, which returns tensors that
            nothing else holds: log-probabilities [T], or the gradients to the case's leaves.
        objective: What its policy loss is, a key of `bench.loss_head.peers.plain.OBJECTIVES`; None for the floor.
        unavailable: Device -> why it cannot run there, None if it can.
        computations: Those that it has.
    """

    name: str
    notes: str
    task: Callable[[str, Case], Task]
    objective: str | None = "rectified"
    unavailable: Callable[[torch.device], str | None] = runs_anywhere
    computations: tuple[str, ...] = tuple(COMPUTATIONS)

    def why_not(self, computation: str, device: torch.device) -> str | None:
        """Why it cannot compute something on a device, None if it can."""
        if computation not in self.computations:
            return f"{self.name} has no {computation}"
        return self.unavailable(device)


def needs_a_gpu(package: str) -> Callable[[torch.device], str | None]:
    """`Peer.unavailable` of what a package has for GPUs alone."""

    def unavailable(device: torch.device) -> str | None:
        if device.type == "cpu":
            return f"{package} has it for GPUs alone"
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"{package} cannot be imported: {error}"
        return None

    return unavailable


def autograd_tasks(log_probs: Prepare, policy_loss: Prepare) -> Callable[[str, Case], Task]:
    """`Peer.task` from functions that get ready for a case and return what autograd can differentiate.

    Args:
        log_probs: Case -> function that returns log-probabilities [T] of any float dtype, 0 where ignored.
        policy_loss: Case -> function that returns a scalar.
    """

    def task(computation: str, case: Case) -> Task:
        if computation == "policy_loss":
            loss = policy_loss(case)
            return Task(lambda: torch.autograd.grad(loss(), case.leaves))
        compute = log_probs(case)
        if computation == "log_probs":
            return Task(torch.no_grad()(compute))

        def backward(output: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(output, case.leaves, case.incoming.to(output.dtype))

        return Task(backward, lambda: (compute(),))

    return task
