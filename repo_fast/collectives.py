"""What the ranks of a run say to each other, apart from what DeepSpeed does inside its engines.

All messages are small: a number or two a response, or a word of whether something went wrong. They travel over gloo
also where training uses NCCL, so that they never wait for, or in, a GPU stream.
"""

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from repo_fast.errors import InputError, RankError, as_input_error, first_line, where

# How long ranks wait for one that does not come.
TIMEOUT_SECONDS = 7200.0
# How long those that wait for another may take to find out that it does not come.
_ROLL_CALL_SECONDS = 10.0
# gloo's errors have no type of their own, but say where they are raised.
_OF_GLOO = "gloo/"


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: Of this process, from 0.
        size: How many processes there are.
        device: Where this process computes.
        group: The gloo group of all ranks; None in a run of one process.
        timeout: How long each waits for the others (seconds).
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    timeout: float = TIMEOUT_SECONDS

    @classmethod
    def connect(cls, timeout: float = TIMEOUT_SECONDS) -> "Ranks":
        """Join the group that `engine.start_distributed` opened."""
        rank, size = dist.get_rank(), dist.get_world_size()
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        patience = datetime.timedelta(seconds=timeout)
        group = dist.new_group(backend="gloo", timeout=patience) if size > 1 else None
        return cls(rank, size, device, group, timeout)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor [..., S], one after the other in order of rank, on the CPU. S may differ, even be 0."""
        values = values.detach().cpu()
        if self.group is None:
            return values
        parts: list[torch.Tensor] = [None] * self.size  # type: ignore[list-item]
        dist.all_gather_object(parts, values, group=self.group)
        return torch.cat(parts, dim=-1)

    def gather_list(self, items: list) -> list:
        """Every rank's list, one after the other in order of rank."""
        if self.group is None:
            return items
        parts: list[list] = [[]] * self.size
        dist.all_gather_object(parts, items, group=self.group)
        return [item for part in parts for item in part]

    def share(self, items: Sequence) -> list:
        """This rank's part of a list that all ranks have; the parts' sizes differ by one at most."""
        return list(items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size])

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in float64 on the CPU; the same bits on every rank."""
        total = values.detach().double().cpu()
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total

    def max(self, value: int) -> int:
        """The largest of every rank's value."""
        if self.group is None:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.max(int(flag)))

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)

    @contextlib.contextmanager
    def together(self, phase: str) -> Iterator[None]:
        """Run a phase that can fail on one rank alone; if it does on any, raise on all.

        Without this the others would wait for the failed one in their next collective. So a phase run under it must
        hold no collective after a point where a rank can fail.

        Args:
            phase: Named in the error of the ranks that did not fail themselves.

        Raises:
            InputError: On every rank, if one raised it, or its disk failed; what that one said.
            RankError: On the other ranks, if one raised anything else; that one re-raises its own.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = as_input_error(error) or error
        if self.group is None:
            if failure is not None:
                raise failure
            return
        said = None if failure is None else (isinstance(failure, InputError), f"{type(failure).__name__}: {failure}")
        everyone: list = [None] * self.size
        dist.all_gather_object(everyone, said, group=self.group)
        if failure is not None:
            raise failure
        for rank, word in enumerate(everyone):
            if word is not None:
                is_input, text = word
                if is_input:
                    raise InputError(text.removeprefix("InputError: "))
                raise RankError(f"rank {rank} failed in {phase}: {text}", by=everyone.index(None))

    @contextlib.contextmanager
    def accounted_for(self) -> Iterator[None]:
        """Say which rank it is, where one is gone or does not answer: what libraries raise then does not.

        Those that wait for it learn it at about the same time, and say so in the store where the run began; the others
        do not.

        Raises:
            RankError: On every rank that waits for another in vain.
        """
        try:
            yield
        except RuntimeError as error:
            if self.group is None or not _is_of_another(error):
                raise
            waiting = self._roll_call()
            raise RankError(self._said_of_the_others(error, waiting), by=min(waiting)) from error

    def _roll_call(self) -> list[int]:
        """The ranks that wait too. This one is among them."""
        waiting = {self.rank}
        # A call of a store behind a link that was cut does not return.
        asking = threading.Thread(target=self._ask_who_waits, args=(waiting,), daemon=True)
        asking.start()
        asking.join(_ROLL_CALL_SECONDS)
        return sorted(waiting)

    def _ask_who_waits(self, waiting: set[int]) -> None:
        # There is no store where the rank that keeps it is the one that is gone.
        with contextlib.suppress(RuntimeError):
            store = dist.distributed_c10d._get_default_store()
            store.set(f"waits/{self.rank}", "")
            while len(waiting) < self.size:
                waiting |= {rank for rank in range(self.size) if store.check([f"waits/{rank}"])}
                time.sleep(0.1)

    def _said_of_the_others(self, error: RuntimeError, waiting: list[int]) -> str:
        absent = [rank for rank in range(self.size) if rank not in waiting]
        doing, resume = where(error), "; --resume auto goes on from the last checkpoint"
        if not absent:
            return f"the ranks lost each other{doing}: {first_line(error)}{resume}"
        who = f"rank {absent[0]}" if len(absent) == 1 else f"one of the ranks {', '.join(map(str, absent))}"
        if "timed out" in str(error).lower():
            return (
                f"{who} does not answer: rank {self.rank} waited for it in vain{doing}, expected it within timeout "
                f"({self.timeout:g} s), or what DeepSpeed waits in an update (10 minutes, or DEEPSPEED_TIMEOUT){resume}"
            )
        return f"{who} is gone: rank {self.rank} lost its connection to it{doing}{resume}"


def _is_of_another(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or _OF_GLOO in str(error)
