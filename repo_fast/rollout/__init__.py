"""Rollouts: responses drawn from the current policy. One file an engine; all of them return a `Rollout`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch

from repo_fast.data import Dialogue, Prompt

if TYPE_CHECKING:
    from repo_fast.engine import Engine


# Told of responses as soon as they are there, while others are still drawn: the places of their requests, their texts.
Finished = Callable[[Sequence[int], Sequence[str]], None]


@dataclass(frozen=True)
class Request:
    """One response to draw: a prompt and its templated tokens (int64 [n], CPU)."""

    prompt: Prompt
    tokens: torch.Tensor


@dataclass(frozen=True)
class Rollout:
    """The responses that one rank drew, `S` of them. Ragged fields are lists with one entry a response.

    Attributes:
        prompt_ids: int64 [S], CPU. The dataset id of each response's prompt. The responses of one prompt share it, and
            may lie on different ranks.
        prompts: S strings. The prompt as the user wrote it, without template; of a dialogue, `Dialogue.text`.
        responses: S strings. The decoded response, without special tokens.
        prompt_tokens: S int64 CPU tensors. The templated prompt, never padded.
        response_tokens: S int64 CPU tensors, at least one token each. The end-of-sequence token is included when the
            policy produced it, and never added when it did not.
        finished: bool [S], CPU. Whether the response ended by itself, rather than at the length limit.
        sampler_log_probs: S float32 CPU tensors. What the sampler says its tokens' log-probabilities (nats) were, under
            the distribution it really drew from (temperature and top-p applied). Compared and logged; training uses
            those that the trainer computes itself, but for importance weights and `update.old_log_probs`. None for
            responses read from a file.
        scores: S dicts by scorer. What was scored while others were drawn. None: nothing was.
        computed_positions: How many positions the sampler computed for them, padding included. 0: not known.
        dialogues: S dialogues, what each response answers. None: each prompt is one turn of the user's.
    """

    prompt_ids: torch.Tensor
    prompts: list[str]
    responses: list[str]
    prompt_tokens: list[torch.Tensor]
    response_tokens: list[torch.Tensor]
    finished: torch.Tensor
    sampler_log_probs: list[torch.Tensor] | None = None
    scores: list[dict[str, float]] | None = None
    computed_positions: int = 0
    dialogues: list[Dialogue] | None = None

    def select(self, indices: Sequence[int]) -> "Rollout":
        """Some of its responses; `computed_positions` is not known of them."""

        def chosen(column: Any) -> Any:
            return column[list(indices)] if isinstance(column, torch.Tensor) else [column[i] for i in indices]

        columns = {
            entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "computed_positions"
        }
        return Rollout(**{name: column if column is None else chosen(column) for name, column in columns.items()})

    def asked(self, index: int) -> Dialogue:
        """What a response answers, turn by turn."""
        return Dialogue((self.prompts[index],)) if self.dialogues is None else self.dialogues[index]


class Sampler(Protocol):
    """Draws responses from a policy under training."""

    def draw(
        self, policy: "Engine", requests: Sequence[Request], seeds: Sequence[int], finished: Finished | None = None
    ) -> Rollout:
        """One response for each of this rank's requests, in their order; may be none. All ranks must call it.

        Args:
            policy: Whose weights are drawn from.
            requests: What is asked for.
            seeds: Of each response, below 2^32 (`seeds.py`): all that decides its random numbers.
            finished: Called on this rank as responses become known, each of them once.

        Raises:
            InputError, RuntimeError: On every rank, where it fails on one.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds; nothing is drawn after it. While the process group is open."""
        ...
