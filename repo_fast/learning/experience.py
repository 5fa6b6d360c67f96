"""What an update learns from: a rank's responses with everything computed of them, and its micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from repo_fast.packing.rows import PackedBatch, idle_batch, pack, sent
from repo_fast.rollout import Rollout


@dataclass(frozen=True)
class Experience:
    """A rank's `S` responses with all that the losses need, `T` response tokens packed in order of the responses.

    Attributes:
        rollout: The responses themselves.
        cu_seqlens: int32 [S + 1], where each response's tokens start and end.
        costs: float32 [S], raw, or [K, S] of several constraints; -inf where one does not apply.
        violations: float32, in the shape of `costs`: v_i, not rectified (units of the cost); -inf likewise.
        old_log_probs: float32 [T], log pi_old (nats), computed by the trainer.
        reward_advantages: float32 [T].
        cost_advantages: float32 [T] or [K, T]; 0 where a constraint does not apply.
        reward_values, reward_returns: float32 [T], with critics; else None.
        cost_values, cost_returns: float32 [T] or [K, T], with critics of costs; else None.
        importance_weights: float32 [T], a factor on the policy loss of each token; None: 1.
    """

    rollout: Rollout
    cu_seqlens: torch.Tensor
    costs: torch.Tensor
    violations: torch.Tensor
    old_log_probs: torch.Tensor
    reward_advantages: torch.Tensor
    cost_advantages: torch.Tensor
    reward_values: torch.Tensor | None = None
    reward_returns: torch.Tensor | None = None
    cost_values: torch.Tensor | None = None
    cost_returns: torch.Tensor | None = None
    importance_weights: torch.Tensor | None = None

    @property
    def responses(self) -> int:
        return len(self.rollout.responses)

    def lengths(self) -> list[int]:
        """Tokens of each sequence, prompt included."""
        pairs = zip(self.rollout.prompt_tokens, self.rollout.response_tokens, strict=True)
        return [prompt.numel() + response.numel() for prompt, response in pairs]

    def select(self, indices: Sequence[int], device: torch.device, share: bool = False) -> "MicroBatch":
        """The micro-batch of some responses. With no indices: an idle one, which has no valid token.

        With `share`, responses to one prompt that follow each other share it.
        """
        if indices:
            starts = self.cu_seqlens.tolist()
            tokens = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in indices])
            batch = pack(
                [self.rollout.prompt_tokens[i] for i in indices],
                [self.rollout.response_tokens[i] for i in indices],
                device,
                share,
            )

            def cut(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
                return sent(values[..., where], device)
        else:
            tokens, batch = torch.empty(0), idle_batch(device)

            def cut(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
                return torch.zeros(*values.shape[:-1], 1, dtype=values.dtype, device=device)

        responses = torch.tensor(indices, dtype=torch.int64)
        per_response = {"costs": self.costs, "violations": self.violations, "prompt_ids": self.rollout.prompt_ids}
        per_token = {name: getattr(self, name) for name in _TOKEN_FIELDS}
        return MicroBatch(
            batch=batch,
            **{name: cut(values, responses) for name, values in per_response.items()},
            **{name: None if values is None else cut(values, tokens) for name, values in per_token.items()},
        )


@dataclass(frozen=True)
class MicroBatch:
    """Some responses of an `Experience`: the packed row, and the fields cut to its `T` tokens and `S` responses."""

    batch: PackedBatch
    costs: torch.Tensor
    violations: torch.Tensor
    prompt_ids: torch.Tensor
    old_log_probs: torch.Tensor
    reward_advantages: torch.Tensor
    cost_advantages: torch.Tensor
    reward_values: torch.Tensor | None
    reward_returns: torch.Tensor | None
    cost_values: torch.Tensor | None
    cost_returns: torch.Tensor | None
    importance_weights: torch.Tensor | None


_TOKEN_FIELDS = [field.name for field in fields(MicroBatch)][4:]
