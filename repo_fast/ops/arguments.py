"""What the registered policy losses hand to a backend. Fields are in the order of the ops' schemas, which are made of
these classes; their meanings are those of the public functions' arguments, but that `temperature` and `softcap` are of
the bare products, over `logit_scale`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class StreamsArguments(NamedTuple):
    """Of `rectified_policy_loss_streams`: [T] or [K, T] of tokens, [K, S] of responses, K of the rest."""

    reward_advantages: Tensor
    cost_advantages: Tensor
    sequence_ids: Tensor
    violations: Tensor
    multiplier: Tensor
    rectify: Sequence[bool]
    mixed: bool


class RectifiedArguments(NamedTuple):
    """Of `rectified_policy_loss`."""

    log_probs: Tensor
    old_log_probs: Tensor | None
    reward_advantages: Tensor
    cost_advantages: Tensor
    sequence_ids: Tensor
    violations: Tensor
    multiplier: Tensor
    rectify: bool
    surrogate: str
    clip_low: float
    clip_high: float
    ref_log_probs: Tensor | None
    kl_coefficient: float
    reduction: str
    denominator: Tensor | None
    importance_weights: Tensor | None


class FusedArguments(NamedTuple):
    """Of `fused_rectified_policy_loss_and_gradients`; `costs` and `prompt_ids`, or `violations`, are given."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_log_probs: Tensor | None
    reward_advantages: Tensor
    cost_advantages: Tensor
    sequence_ids: Tensor
    costs: Tensor | None
    prompt_ids: Tensor | None
    multiplier: Tensor
    scope: str
    threshold: float
    rectify: bool
    surrogate: str
    clip_low: float
    clip_high: float
    temperature: float
    softcap: float | None
    ref_log_probs: Tensor | None
    kl_coefficient: float
    entropy_coefficient: float
    entropy: bool
    reduction: str
    denominator: Tensor | None
    violations: Tensor | None
    importance_weights: Tensor | None
    need_hidden: bool
    need_weight: bool


PolicyArguments = RectifiedArguments | FusedArguments
