"""Draws batches of prompts, epoch after epoch, so that a resumed run sees exactly what it would have seen.

An epoch's order depends on the seed and the epoch alone, not on any global random state, so all ranks draw the same
batches without talking to each other, and the position is two numbers and a short list. A batch may cross the
end of an epoch; the prompts it took before are then put behind it in the new order, so that no batch holds a
prompt twice (its responses would count as one prompt's).
"""

import random
from typing import Any

from repo_fast.errors import InputError


class PromptSampler:
    """An endless sequence of batches of distinct indices; each index comes once an epoch.

    Args:
        n_prompts: Indices run from 0 to `n_prompts - 1`.
        prompts_per_step: Batch size, over all ranks.
        seed: Of the order.

    Raises:
        InputError: A batch is empty, or larger than the number of prompts.
    """

    def __init__(self, n_prompts: int, prompts_per_step: int, seed: int) -> None:
        if not 1 <= prompts_per_step <= n_prompts:
            raise InputError(
                f"prompts_per_step is {prompts_per_step}, expected 1 to the number of prompts, which is {n_prompts}"
            )
        self._identity = {"n_prompts": n_prompts, "prompts_per_step": prompts_per_step, "seed": seed}
        self._n_prompts, self._batch_size, self._seed = n_prompts, prompts_per_step, seed
        self._position = 0
        self._start_epoch(epoch=0, head=[])

    def next(self) -> list[int]:
        """The next `prompts_per_step` indices, all different."""
        batch = self._order[self._position : self._position + self._batch_size]
        self._position += len(batch)
        missing = self._batch_size - len(batch)
        if missing:
            self._start_epoch(self._epoch + 1, head=batch)
            batch = batch + self._order[:missing]
            self._position = missing
        return batch

    @property
    def epochs(self) -> float:
        """How many were drawn, with the part of the one that is under way."""
        return (self._epoch * self._n_prompts + self._position) / self._n_prompts

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here: plain numbers and lists."""
        return {**self._identity, "epoch": self._epoch, "head": list(self._head), "position": self._position}

    def load_state_dict(self, state: dict[str, Any], changed: bool = False) -> None:
        """Goes on from a state.

        Args:
            state: From `state_dict`.
            changed: Whether the prompts may be others than they were. Where their number is another, positions of the
                epoch that was under way mean nothing any more: the next one starts.

        Raises:
            InputError: The state is of another number of prompts, batch size or seed.
        """
        if changed and state["n_prompts"] != self._n_prompts:
            self._start_epoch(state["epoch"] + 1, head=[])
            self._position = 0
            return
        for key, ours in self._identity.items():
            if state[key] != ours:
                raise InputError(f"the checkpoint's data position has {key} {state[key]}, this run has {ours}")
        self._start_epoch(state["epoch"], list(state["head"]))
        self._position = state["position"]

    def _start_epoch(self, epoch: int, head: list[int]) -> None:
        """`head`: the indices that the batch across the boundary already took from the epoch before."""
        order = list(range(self._n_prompts))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        if head:
            taken = set(head)
            first = [i for i in order if i not in taken][: self._batch_size - len(head)]
            chosen = set(first)
            order = first + [i for i in order if i not in chosen]
        self._epoch, self._head, self._order = epoch, head, order
