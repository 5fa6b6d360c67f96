"""The algorithms as settings of one loss, and everything of an update that is neither a model nor a token loss.

Source: Peng et al., "Enhancing Safety in Reinforcement Learning with Human Feedback via Rectified Policy Optimization"
(RePO), arXiv 2410.19933; baselines from Dai et al., "Safe RLHF", arXiv 2310.12773. The token loss itself, with the
rectified weights, is `repo_fast.ops.rectified_policy_loss`. Here are, in the order of an update: the table of
algorithms, the KL shaping of both streams, the critic-free advantages, whitening, the multiplier, the critic loss.

Everything is a pure function of tensors, but for `Multiplier`, whose state is a few numbers. Functions that need a
prompt's or the batch's other responses take the *global* batch: the caller gathers one number a response, which is
cheap, rather than have each function know about ranks.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

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


def stream_weights(violations: torch.Tensor, multiplier: float, *, rectify: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights w_r, w_c of the two streams (step 5). A NaN violation makes them NaN.

    Args:
        violations: float32 [S].
        multiplier: lambda >= 0.
        rectify: Whether responses without violation get (1, 0).

    Returns:
        (w_r, w_c), float32 [S] each.
    """
    reward_weight, cost_weight = 1 / (1 + multiplier), multiplier / (1 + multiplier)
    if not rectify:
        return torch.full_like(violations, reward_weight), torch.full_like(violations, cost_weight)
    # Not `where(v > 0)` alone: NaN > 0 is false, and an unscored response would pass for a safe one.
    unknown = violations * 0
    unsafe = violations > 0
    return (
        torch.where(unsafe, reward_weight, 1.0) + unknown,
        torch.where(unsafe, cost_weight, 0.0) + unknown,
    )


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages of whole responses from the other responses of their prompt (step 4).

    `rloo`: A_i = S_i - mean over j != i of S_j (Ahmadian et al. 2024, arXiv 2402.14740). `grpo`: centred by the prompt
    mean, both streams divided by one scale, the standard deviation (ddof 1) within the prompt of w_r S^r - w_c S^c, and
    0 where it is 0: a scale for each stream would change what lambda means (Shao et al. 2024, arXiv 2402.03300, has one
    stream).

    Args:
        kind: `rloo` or `grpo`.
        reward_scores, cost_scores: float32 [S], the global batch, with KL penalty.
        prompt_ids: int64 [S]. Every prompt has at least two responses.
        reward_weights, cost_weights: float32 [S], from `stream_weights`; used by `grpo`.

    Returns:
        (reward advantages, cost advantages), float32 [S] each.

    Raises:
        ValueError: A prompt has a single response.
    """
    group, sizes = _prompt_groups(prompt_ids)
    if sizes.numel() and int(sizes.min()) < 2:
        raise ValueError(f"{kind} advantages need at least 2 responses for each prompt, one prompt has 1")
    size = sizes[group].to(reward_scores.dtype)

    def centred(scores: torch.Tensor) -> torch.Tensor:
        return scores - _group_sums(scores, group, sizes.numel())[group] / size

    if kind == "rloo":
        # S_i - mean of the others = (S_i - mean of all) K / (K - 1).
        return centred(reward_scores) * size / (size - 1), centred(cost_scores) * size / (size - 1)
    mixed = centred(reward_weights * reward_scores - cost_weights * cost_scores)
    scale = (_group_sums(mixed.square(), group, sizes.numel())[group] / (size - 1)).sqrt()
    # A prompt whose responses all score alike has a scale of rounding errors, not of 0: dividing would blow them up.
    rounding = torch.finfo(scale.dtype).eps * (reward_scores.abs() + cost_scores.abs())
    negligible = scale <= _group_max(rounding, group, sizes.numel())[group]
    inverse = torch.where(negligible, 0.0, 1 / scale)
    return centred(reward_scores) * inverse, centred(cost_scores) * inverse


def _group_max(values: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    return values.new_zeros(groups).scatter_reduce_(0, group, values, "amax")


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


class Multiplier:
    """lambda of the Lagrangian, updated once a rollout batch, before its policy steps, in log space (step 9).

    log lambda <- min(log lambda + eta lambda J, log lambda_max), where J comes from raw costs (no KL term) of all
    ranks. `rectified`: the mean over prompts of the mean over their responses of {v_i}+, never negative, so that lambda
    only rises. `mean`: the mean over a window of the last costs, minus d. `upper`: that mean plus z s / sqrt(n), s with
    ddof 1 and 0 for a single cost. None: lambda is 0 and stays there.

    Args:
        constraint: As in `Algorithm`.
        init: lambda at the start, > 0.
        learning_rate: eta.
        maximum: lambda_max.
        threshold: d - m, subtracted from the mean cost. The violations passed to `update` have it subtracted already.
        window: How many of the last costs are averaged over.
        confidence_z: z.
    """

    def __init__(
        self,
        constraint: Literal["rectified", "mean", "upper"] | None,
        *,
        init: float = 1.0,
        learning_rate: float = 0.1,
        maximum: float = 5.0,
        threshold: float = 0.0,
        window: int = 128,
        confidence_z: float = 1.645,
    ) -> None:
        self.constraint = constraint
        self.learning_rate = learning_rate
        self.maximum = maximum
        self.threshold = threshold
        self.confidence_z = confidence_z
        self.log_value = math.log(init)
        self.costs: deque[float] = deque(maxlen=window)

    @property
    def value(self) -> float:
        """lambda."""
        return 0.0 if self.constraint is None else math.exp(self.log_value)

    def update(self, costs: torch.Tensor, violations: torch.Tensor, prompt_ids: torch.Tensor) -> float:
        """Take in one rollout batch.

        Args:
            costs: float32 [S], the raw costs of all ranks' responses, in the order of the global batch.
            violations: float32 [S], v_i of the same responses.
            prompt_ids: int64 [S].

        Returns:
            J, the violation of the constraint that lambda was moved by (0.0 without a constraint).
        """
        if self.constraint is None:
            return 0.0
        if self.constraint == "rectified":
            violation = float(prompt_means(violations.double().clamp(min=0), prompt_ids).mean())
        else:
            self.costs.extend(costs.tolist())
            window = torch.tensor(list(self.costs), dtype=torch.float64)
            violation = float(window.mean()) - self.threshold
            if self.constraint == "upper" and window.numel() > 1:
                violation += self.confidence_z * float(window.std()) / math.sqrt(window.numel())
        step = self.learning_rate * self.value * violation
        self.log_value = min(self.log_value + step, math.log(self.maximum))
        return violation

    def state_dict(self) -> dict:
        """The state that a resumed run needs, as plain numbers."""
        return {"log_value": self.log_value, "costs": list(self.costs)}

    def load_state_dict(self, state: dict) -> None:
        self.log_value = float(state["log_value"])
        self.costs = deque(state["costs"], maxlen=self.costs.maxlen)


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
