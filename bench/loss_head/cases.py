"""Inputs of the kernel benchmarks, and the three computations that are measured on them.

    policy_loss          the policy loss, forward and backward            3 products
    log_probs            log π_θ of each target, without gradients        1 product, the logits
    log_probs_backward   the backward of log_probs alone                  2 products, both gradients

The number of products is what the mathematics needs: it makes the floor, and the FLOP of a computation, whatever an
implementation computes again.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

# By name: how many products.
COMPUTATIONS = {"policy_loss": 3, "log_probs": 1, "log_probs_backward": 2}
RESPONSES, RESPONSES_PER_PROMPT = 16, 4
MULTIPLIER, CLIP = 0.7, 0.2
# log ρ, none where the clip range ends, so that a bfloat16 logit's error does not decide which branch is taken.
LOG_RATIOS = (-0.6, -0.05, 0.05, 0.6)
# Rows of logits that the case itself holds at a time.
BLOCK_ROWS = 512


@dataclass(frozen=True, eq=False)
class Case:
    """A packed batch of `RESPONSES` responses of equal length, each with one advantage, as GRPO's have.

    Attributes:
        hidden: [T, D] float32, bfloat16 or float16, a leaf that wants a gradient.
        weight: [V, D], likewise.
        targets: [T] int64; -100 = ignored: the same share at the start of each response, like a prompt.
        old_log_probs, reward_advantages, cost_advantages: [T] float32.
        sequence_ids: [T] int64, the response of each token.
        costs: [S] float32.
        prompt_ids: [S] int64.
        incoming: [T] float32, what `log_probs_backward` gets: d loss / d log_probs, of the size of a mean's.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_log_probs: Tensor
    reward_advantages: Tensor
    cost_advantages: Tensor
    sequence_ids: Tensor
    costs: Tensor
    prompt_ids: Tensor
    incoming: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @cached_property
    def rows(self) -> Tensor:
        """[N] int64, the rows that are not ignored."""
        return (self.targets != -100).nonzero().squeeze(1)

    def valid(self, values: Tensor) -> Tensor:
        """The rows of `values` that are not ignored; itself, if none is."""
        return values if self.rows.numel() == values.shape[0] else values.index_select(0, self.rows)

    def flop(self, computation: str) -> int:
        """What `computation` needs of the matrix unit: 2·N·D·V a product, N valid rows."""
        V, D = self.weight.shape
        return COMPUTATIONS[computation] * 2 * self.rows.numel() * D * V


def make_case(
    T: int, D: int, V: int, dtype: torch.dtype, device: torch.device | str, ignored: float = 0.0, seed: int = 0
) -> Case:
    """Random inputs with logits of order 1; T must be a multiple of `RESPONSES`. `ignored` is a share of the tokens."""
    if T % RESPONSES:
        raise ValueError(f"make_case: T must be a multiple of {RESPONSES}, got {T}")
    g = torch.Generator(device).manual_seed(seed)
    length = T // RESPONSES
    hidden = torch.randn(T, D, generator=g, device=device).to(dtype)
    weight = (torch.randn(V, D, generator=g, device=device) / D**0.5).to(dtype)
    targets = torch.randint(V, (T,), generator=g, device=device)
    log_probs = torch.cat(
        [
            -F.cross_entropy((h @ weight.T).float(), t, reduction="none")
            for h, t in zip(hidden.split(BLOCK_ROWS), targets.split(BLOCK_ROWS), strict=True)
        ]
    )
    log_ratios = torch.tensor(LOG_RATIOS, device=device)
    targets.view(RESPONSES, length)[:, : round(ignored * length)] = -100
    responses = torch.arange(RESPONSES, device=device)

    def per_response() -> Tensor:
        return torch.randn(RESPONSES, generator=g, device=device)

    return Case(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        targets=targets,
        old_log_probs=log_probs - log_ratios[torch.randint(len(LOG_RATIOS), (T,), generator=g, device=device)],
        reward_advantages=per_response().repeat_interleave(length),
        cost_advantages=per_response().repeat_interleave(length),
        sequence_ids=responses.repeat_interleave(length),
        costs=per_response(),
        prompt_ids=responses // RESPONSES_PER_PROMPT,
        incoming=torch.randn(T, generator=g, device=device) / T,
    )
