"""The algorithms as settings of one loss, and everything of an update that is neither a model nor a token loss.

Source: Peng et al., "Enhancing Safety in Reinforcement Learning with Human Feedback via Rectified Policy Optimization"
(RePO), arXiv 2410.19933; baselines from Dai et al., "Safe RLHF", arXiv 2310.12773. The token loss itself, with the
rectified weights, is `repo_fast.ops.rectified_policy_loss`. Here are, in the order of an update: the table of
algorithms, the KL shaping of both streams, the critic-free advantages, whitening, the multiplier, the critic loss.

Everything is a pure function of tensors, but for `Violation` and `Multiplier`, whose state is a few numbers. Functions
that need a prompt's or the batch's other responses take the *global* batch: the caller gathers one number a response,
which is cheap, rather than have each function know about ranks.

A policy may have K constraints (`constraints.py`), each with a cost stream of its own: what takes costs of shape [S]
takes [K, S] too. A violation of -inf says that a constraint does not apply to a response.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import scipy.special
import torch


@dataclass(frozen=True)
class Algorithm:
    """One row of the table.

    Attributes:
        scope: What a response's violation is the mean over (`repo_fast.ops.prompt_violations`).
        rectify: Whether safe responses are freed of the cost stream (RePO), or all carry the same weights.
        surrogate: Clip the streams separately, or their weighted sum.
        constraint: What drives the multiplier: `rectified` violations of prompts, the `mean` cost, its `upper`
            confidence bound, or nothing (no multiplier: lambda is 0).
        shaped: Whether a fixed weight of the cost is subtracted from the reward.
    """

    scope: Literal["prompt", "response", "batch"]
    rectify: bool
    surrogate: Literal["separate", "mixed"]
    constraint: Literal["rectified", "mean", "upper"] | None
    shaped: bool = False

    @property
    def has_cost_stream(self) -> bool:
        """Whether the loss has a cost stream of its own (and with `gae` a cost critic)."""
        return self.constraint is not None


ALGORITHMS: dict[str, Algorithm] = {
    "repo": Algorithm(scope="prompt", rectify=True, surrogate="separate", constraint="rectified"),
    "ppo_lag": Algorithm(scope="batch", rectify=False, surrogate="mixed", constraint="mean"),
    "hc_lag": Algorithm(scope="batch", rectify=False, surrogate="mixed", constraint="upper"),
    "reward_shaping": Algorithm(scope="prompt", rectify=False, surrogate="mixed", constraint=None, shaped=True),
    "ppo": Algorithm(scope="prompt", rectify=False, surrogate="mixed", constraint=None),
}


def token_rewards(
    scores: torch.Tensor, kl: torch.Tensor, cu_seqlens: torch.Tensor, *, kl_coefficient: float, clamp: float
) -> torch.Tensor:
    """Per-token rewards: the KL penalty on each token and the score on the last (step 4, `gae`).

    r_t = -beta (log pi_old - log pi_ref) + R [last token], clamped. For the cost stream pass a negative
    `kl_coefficient`, which makes it c_t = +beta (...) + C [last token]: both streams carry the full beta.

    Args:
        scores: float32 [S], the reward or cost of each response.
        kl: float32 [T], log pi_old - log pi_ref of each token (nats), packed.
        cu_seqlens: int32 [S + 1], where each response starts and ends. None is empty.
        kl_coefficient: beta, or -beta for costs.
        clamp: Each token's value is clamped to +- this.

    Returns:
        float32 [T].
    """
    rewards = -kl_coefficient * kl
    rewards[cu_seqlens[1:].long() - 1] += scores
    return rewards.clamp_(-clamp, clamp)


def penalised_scores(
    scores: torch.Tensor, kl_sums: torch.Tensor, *, kl_coefficient: float, clamp: float
) -> torch.Tensor:
    """Scores of whole responses with the KL penalty (step 4, critic-free): S = clamp(score) - beta sum_t kl_t.

    Args:
        scores: float32 [S], rewards, or costs with a negative `kl_coefficient`.
        kl_sums: float32 [S], sum over the response of log pi_old - log pi_ref (nats).
        kl_coefficient: beta, or -beta for costs.
        clamp: The score, not the sum, is clamped to +- this.

    Returns:
        float32 [S].
    """
    return scores.clamp(-clamp, clamp) - kl_coefficient * kl_sums


def stream_weights(
    violations: torch.Tensor, multiplier: float | Sequence[float], *, rectify: bool | Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights w_r, w_c of the streams (step 5). A NaN violation makes all weights of its response NaN.

    With lambda_k of the constraints k that are active for a response, Z = 1 + their sum: w_r = 1 / Z and w_k = lambda_k
    / Z, and 0 for the others. Active are those that apply, and rectified ones only where they are violated.

    Args:
        violations: float32 [S], or [K, S] of K constraints. -inf: does not apply.
        multiplier: lambda >= 0, or K of them.
        rectify: Whether responses without violation are free of the constraint, or K of such.

    Returns:
        w_r, float32 [S], and w_c in the shape of `violations`.
    """
    streams = torch.atleast_2d(violations)
    # In float64, so that a weight is rounded once.
    multipliers = torch.as_tensor(multiplier, dtype=torch.float64, device=streams.device).reshape(-1, 1)
    rectified = torch.as_tensor(rectify, device=streams.device).reshape(-1, 1)
    applies = streams != -torch.inf
    active = torch.where(applies & (~rectified | (streams > 0)), multipliers, 0.0)
    total = 1 + active.sum(0)
    # NaN > 0 is false, and an unscored response would pass for a safe one.
    unknown = torch.where(applies, streams * 0, 0.0).sum(0)
    reward_weights, cost_weights = ((part / total).to(violations.dtype) + unknown for part in (1.0, active))
    return reward_weights, cost_weights.view_as(violations)


def _prompt_groups(prompt_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Group index [S] and group sizes [P] of each prompt, whatever the ids."""
    _, group, sizes = torch.unique(prompt_ids, return_inverse=True, return_counts=True)
    return group, sizes


def _group_sums(values: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    return values.new_zeros(groups).index_add_(0, group, values)


def critic_free_advantages(
    kind: Literal["rloo", "grpo"],
    reward_scores: torch.Tensor,
    cost_scores: torch.Tensor,
    prompt_ids: torch.Tensor,
    reward_weights: torch.Tensor,
    cost_weights: torch.Tensor,
    *,
    scaled: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages of whole responses from the other responses of their prompt (step 4).

    `rloo`: A_i = S_i - mean over j != i of S_j (Ahmadian et al. 2024, arXiv 2402.14740). `grpo`: centred by the prompt
    mean, all streams divided by one scale, the standard deviation (ddof 1) within the prompt of w_r S^r - sum_k w_k
    S^k, and 0 where it is 0: a scale for each stream would change what lambda means (Shao et al. 2024, arXiv
    2402.03300, has one stream). The other scales are `separately_scaled_advantages` and, with `scaled` False, none.

    Args:
        kind: `rloo` or `grpo`.
        reward_scores: float32 [S], the global batch, with KL penalty.
        cost_scores: float32 [S] or [K, S], likewise; 0 for prompts that a constraint does not apply to.
        prompt_ids: int64 [S]. Every prompt has at least two responses.
        reward_weights, cost_weights: From `stream_weights`; used by `grpo`.
        scaled: `grpo` only: whether to divide.

    Returns:
        (reward advantages, cost advantages), in the shapes of the scores.

    Raises:
        ValueError: A prompt has a single response.
    """
    groups = _Groups(kind, prompt_ids)
    if kind == "rloo":
        # S_i - mean of the others = (S_i - mean of all) K / (K - 1).
        size = groups.size
        return groups.centred(reward_scores) * size / (size - 1), groups.centred(cost_scores) * size / (size - 1)
    if not scaled:
        return groups.centred(reward_scores), groups.centred(cost_scores)
    streams = torch.atleast_2d(cost_scores)
    mixed = reward_weights * reward_scores - (torch.atleast_2d(cost_weights) * streams).sum(0)
    inverse = groups.inverse_scale(mixed, reward_scores.abs() + streams.abs().sum(0))
    return groups.centred(reward_scores) * inverse, groups.centred(cost_scores) * inverse


def separately_scaled_advantages(
    reward_scores: torch.Tensor,
    cost_scores: torch.Tensor,
    kl_sums: torch.Tensor,
    prompt_ids: torch.Tensor,
    applies: torch.Tensor,
    *,
    kl_coefficient: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`grpo` with a scale of its own for each stream, its scores' standard deviation (ddof 1) within the prompt:

        A_r = centred(R) / sigma_r - beta centred(KL)        A_k = centred(C_k) / sigma_k + beta centred(KL)

    A score whose sigma is below rounding adds 0. The KL is not divided: a binary cost that is equal in all responses
    would leave it at unit size. Source: Constrained GRPO, arXiv 2602.05863, Theorem 4.1, and GDPO, arXiv 2601.05242,
    argue for scales of their own.

    Args:
        reward_scores: float32 [S], the global batch, clamped, without KL penalty.
        cost_scores: float32 [S] or [K, S], likewise.
        kl_sums: float32 [S], sum over the response of log pi_old - log pi_ref (nats).
        prompt_ids: int64 [S]. Every prompt has at least two responses.
        applies: bool, in the shape of `cost_scores`: where its constraint applies. The advantages are 0 elsewhere.
        kl_coefficient: beta.

    Returns:
        (reward advantages, cost advantages), in the shapes of the scores.

    Raises:
        ValueError: A prompt has a single response.
    """
    groups = _Groups("grpo", prompt_ids)
    penalty = kl_coefficient * groups.centred(kl_sums)

    def standardised(scores: torch.Tensor) -> torch.Tensor:
        return groups.centred(scores) * groups.inverse_scale(scores, scores.abs())

    costs = torch.atleast_2d(cost_scores)
    cost_advantages = torch.stack([standardised(stream) for stream in costs]).view_as(cost_scores) + penalty
    return standardised(reward_scores) - penalty, torch.where(applies, cost_advantages, 0.0)


class _Groups:
    """The responses of each prompt, at least two, whatever the ids: int64 [S]."""

    def __init__(self, kind: str, prompt_ids: torch.Tensor) -> None:
        self._index, sizes = _prompt_groups(prompt_ids)
        self._count = sizes.numel()
        if self._count and int(sizes.min()) < 2:
            raise ValueError(f"{kind} advantages need at least 2 responses for each prompt, one prompt has 1")
        self.size = sizes[self._index].to(torch.float32)  # whole numbers

    def centred(self, scores: torch.Tensor) -> torch.Tensor:
        """[..., S], less the prompt's mean."""
        sums = scores.new_zeros(*scores.shape[:-1], self._count).index_add_(-1, self._index, scores)
        return scores - sums[..., self._index] / self.size

    def inverse_scale(self, scores: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
        """1 over the prompt's standard deviation (ddof 1) of `scores`, or 0 for what rounding of `magnitude` makes.

        The mean of n equal numbers may be off by n / 2 roundings of one.
        """
        squares = self.centred(scores).square()
        scale = (_group_sums(squares, self._index, self._count)[self._index] / (self.size - 1)).sqrt()
        # A prompt whose responses all score alike has a scale of rounding errors, which dividing would blow up.
        rounding = magnitude.new_zeros(self._count).scatter_reduce_(
            0, self._index, torch.finfo(scale.dtype).eps * self.size * magnitude, "amax"
        )
        return torch.where(scale <= rounding[self._index], 0.0, 1 / scale)


def whitening(
    reward_advantages: torch.Tensor, cost_advantages: torch.Tensor, mixed_advantages: torch.Tensor
) -> tuple[float, float, float]:
    """The centres of both streams and their one scale: the standard deviation of w_r A_r - w_c A_c over all tokens.

    Args:
        reward_advantages, cost_advantages, mixed_advantages: float32 [T], every valid token of the global batch.

    Returns:
        (centre of the rewards, centre of the costs, factor); the factor is 0 where the scale is 0.
    """
    scale = float(mixed_advantages.double().std()) if mixed_advantages.numel() > 1 else 0.0
    factor = 1 / scale if scale > 0 else 0.0
    return float(reward_advantages.double().mean()), float(cost_advantages.double().mean()), factor


def prompt_means(values: torch.Tensor, prompt_ids: torch.Tensor) -> torch.Tensor:
    """The mean of `values` [S] over the responses of each prompt: float [P], in order of prompt id."""
    group, sizes = _prompt_groups(prompt_ids)
    return _group_sums(values, group, sizes.numel()) / sizes


class Violation:
    """J, by how much a rollout batch violates a constraint (step 9). From raw costs (no KL term) of all ranks.

    `rectified`: the mean over prompts of the mean over their responses of {v_i}+, never negative. `mean`: the mean over
    a window of the last costs, minus d. `upper`: that mean plus z s / sqrt(n), s with ddof 1 and 0 for a single cost.

    Args:
        kind: As `Algorithm.constraint`.
        threshold: d - m, subtracted from the mean cost. The violations passed to `update` have it subtracted already.
        window: How many of the last costs are averaged over, n.
        confidence_z: z.
        student: `upper`: instead of z the quantile of the same level of Student's t with n - 1 degrees of freedom,
            since s is estimated: 6.31 for 1.645 where n is 2, 1.83 at 10, 1.66 at 128.
    """

    def __init__(
        self,
        kind: Literal["rectified", "mean", "upper"],
        *,
        threshold: float = 0.0,
        window: int = 128,
        confidence_z: float = 1.645,
        student: bool = False,
    ) -> None:
        self.kind, self.threshold, self.confidence_z, self.student = kind, threshold, confidence_z, student
        self.costs: deque[float] = deque(maxlen=window)

    def update(self, costs: torch.Tensor, violations: torch.Tensor, prompt_ids: torch.Tensor) -> float | None:
        """Take in one rollout batch.

        Args:
            costs: float32 [S], the raw costs of all ranks' responses, in the order of the global batch.
            violations: float32 [S], v_i of the same responses; -inf where the constraint does not apply.
            prompt_ids: int64 [S].

        Returns:
            J; None, and nothing is moved, where the constraint applies to no response.
        """
        applies = violations != -torch.inf
        if not applies.any():
            return None
        if self.kind == "rectified":
            return float(prompt_means(violations[applies].double().clamp(min=0), prompt_ids[applies]).mean())
        self.costs.extend(costs[applies].tolist())
        window = torch.tensor(list(self.costs), dtype=torch.float64)
        violation = float(window.mean()) - self.threshold
        if self.kind == "upper" and window.numel() > 1:
            violation += self._quantile(window.numel()) * float(window.std()) / math.sqrt(window.numel())
        return violation

    def state_dict(self) -> list[float]:
        """The window, which a resumed run needs."""
        return list(self.costs)

    def load_state_dict(self, costs: Sequence[float]) -> None:
        self.costs.clear()
        self.costs.extend(costs)

    def _quantile(self, n: int) -> float:
        if not self.student:
            return self.confidence_z
        return float(-scipy.special.stdtrit(n - 1, scipy.special.ndtr(-self.confidence_z)))


class Multiplier:
    """lambda of the Lagrangian, updated once a rollout batch, before its policy steps, in log space (step 9).

    log lambda <- min(log lambda + eta lambda J, log lambda_max). J of a rectified constraint is never negative, so that
    lambda only rises.

    Args:
        constraint: `Violation`'s kind. None: lambda is 0 and stays there.
        init: lambda at the start, > 0.
        learning_rate: eta.
        maximum: lambda_max.
        measured: Arguments of `Violation`.
    """

    def __init__(
        self,
        constraint: Literal["rectified", "mean", "upper"] | None,
        *,
        init: float = 1.0,
        learning_rate: float = 0.1,
        maximum: float = 5.0,
        **measured: Any,
    ) -> None:
        self.learning_rate = learning_rate
        self.maximum = maximum
        self.violation = None if constraint is None else Violation(constraint, **measured)
        self.begin(init)

    def begin(self, value: float) -> None:
        """Start from this lambda > 0, before the first update."""
        self.log_value = math.log(value)

    @property
    def value(self) -> float:
        """lambda."""
        return 0.0 if self.violation is None else math.exp(self.log_value)

    def update(self, costs: torch.Tensor, violations: torch.Tensor, prompt_ids: torch.Tensor) -> float | None:
        """Take in one rollout batch, as `Violation.update` does; returns its J, and 0.0 without a constraint."""
        if self.violation is None:
            return 0.0
        violation = self.violation.update(costs, violations, prompt_ids)
        if violation is not None:
            step = self.learning_rate * self.value * violation
            self.log_value = min(self.log_value + step, math.log(self.maximum))
        return violation

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs, as plain numbers."""
        return {"log_value": self.log_value, "costs": [] if self.violation is None else self.violation.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.log_value = float(state["log_value"])
        if self.violation is not None:
            self.violation.load_state_dict(state["costs"])


def reduce_tokens(
    values: torch.Tensor,
    sequence_ids: torch.Tensor,
    *,
    reduction: Literal["sequence_mean", "token_mean", "sum"],
    sequences: int,
    denominator: float,
) -> torch.Tensor:
    """Token losses as one number, with the denominator of the whole global batch (step 6).

    Args:
        values: float32 [T], the loss of each token. A sequence's tokens are all here.
        sequence_ids: int64 [T] in [0, sequences).
        reduction: `sum` ignores the denominator, `token_mean` divides the sum by it, `sequence_mean` the sum of the
            sequences' token means.
        sequences: How many sequences there are here.
        denominator: Tokens (`token_mean`) or sequences (`sequence_mean`) of the global batch.

    Returns:
        A scalar, differentiable.
    """
    if reduction == "sum":
        return values.sum()
    if reduction == "token_mean":
        return values.sum() / denominator
    # Whole numbers, so exact in any order; `bincount` would wait for a GPU.
    lengths = values.new_zeros(sequences).index_add_(0, sequence_ids, torch.ones_like(values))
    return (values / lengths[sequence_ids]).sum() / denominator


def clipped_value_losses(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, clip: float
) -> torch.Tensor:
    """The critic loss of each token (step 7): 0.5 max((V - G)^2, (clip(V, V_old +- clip) - G)^2).

    Args:
        values: float32 [T], the critic's values, with gradient.
        old_values: float32 [T], its values when the rollout was scored.
        returns: float32 [T], G.
        clip: Largest step of a value that is rewarded.

    Returns:
        float32 [T].
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
