"""Several constraints on one policy: whom each is about, what drives its multiplier, and where multipliers start.

A constraint k has a cost C_k, a threshold d_k and a multiplier lambda_k of its own. What they have in common with a
single one, the weights of the streams and their advantages, is in `algorithm.py`.

Sources: the penalty of a fixed multiplier, CS-RLHF, arXiv 2510.03520; PID control of multipliers, Stooke et al. 2020,
arXiv 2007.03964; multipliers from the reference's samples, MoCAN, arXiv 2405.19544; capped rewards, Moskovitz et al.
2023, arXiv 2310.04373.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import scipy.optimize
import scipy.special
import torch

from repo_fast.errors import InputError
from repo_fast.objective.algorithm import Violation, prompt_means

# ------------------------------------------------------------------------------------------------------ applicability


def applicable(
    name: str,
    applies_to: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    missing: bool | None = None,
    places: Sequence[str] = (),
    some: bool = True,
) -> torch.Tensor:
    """Which prompts a constraint counts for: those that have one of the values in each of the fields.

    Args:
        name: Of the constraint, for messages.
        applies_to: By field of a prompt's row, the value or values that it counts for. Empty: all prompts.
        rows: The fields of each prompt. One that is a list has each of its values, one that is a mapping, as
            PKU-SafeRLHF's categories are, those keys whose value is true.
        missing: Whether it counts for prompts that lack a field, or have null there. None: that is an error.
        places: Where each prompt was read, for messages.
        some: Whether there must be a prompt that it counts for, and one with each of the values.

    Returns:
        bool [P].

    Raises:
        InputError: A prompt lacks a field and `missing` is None; or, with `some`, no prompt has one of the values, or
            the constraint counts for none.
    """
    found = torch.ones(len(rows), dtype=torch.bool)
    for field, wanted in applies_to.items():
        values = _values(name, field, wanted)
        known: set[tuple[bool, Any]] = set()
        for i, row in enumerate(rows):
            if row.get(field) is not None:
                own = _values(name, field, row[field])
                known |= own
                found[i] &= not own.isdisjoint(values)
            elif missing is not None:
                found[i] &= missing
            else:
                which = places[i] if places else f"prompt {i} of {len(rows)}"
                raise InputError(
                    f"constraint {name!r} applies to prompts by {field!r}, which {which} lacks; "
                    "expected it for all, or applies_to_missing: true or false"
                )
        for value in sorted(values, key=str) if some else ():
            if value not in known:
                nearest = _nearest(value[1], {own for _, own in known})
                raise InputError(f"constraint {name!r} applies to {field} {value[1]!r}, which no prompt has{nearest}")
    if some and not found.any():
        raise InputError(f"constraint {name!r} applies to none of the {len(rows)} prompts, expected at least one")
    return found


def _values(name: str, field: str, value: Any) -> set[tuple[bool, Any]]:
    """What a prompt has in a field; beside each whether it is a truth value, which equals a number in Python."""
    if isinstance(value, Mapping):
        for key, flag in value.items():
            if not isinstance(flag, bool | int | float):
                raise InputError(
                    f"constraint {name!r} applies to prompts by {field!r}, where {key!r} is {flag!r}, expected true or "
                    "false"
                )
        value = [key for key, is_so in value.items() if is_so]
    try:
        return {(isinstance(own, bool), own) for own in (value if isinstance(value, list | tuple) else [value])}
    except TypeError:
        raise InputError(
            f"constraint {name!r} applies to prompts by {field!r}, where {value!r} is, expected a value or several"
        ) from None


def _nearest(value: Any, known: set[Any]) -> str:
    """What was probably meant by a value, or all that there is."""
    if not known:
        return ", nor any other"
    # 2 and '2' are not the same.
    some = sorted(map(repr, known))
    if near := difflib.get_close_matches(repr(value), some, n=1):
        return f"; did you mean {near[0]}?"
    return f"; expected one of {', '.join(some[:10])}{', ...' if len(some) > 10 else ''}"


# -------------------------------------------------------------------------------------------------------- controllers


class Controller(Protocol):
    """What sets the multiplier of a constraint: `algorithm.Multiplier`, by dual ascent, or one of those below."""

    @property
    def value(self) -> float:
        """lambda_k."""

    def begin(self, value: float) -> None:
        """Start from this lambda, before the first update."""

    def update(self, costs: torch.Tensor, violations: torch.Tensor, prompt_ids: torch.Tensor) -> float | None:
        """Take in one rollout batch, as `algorithm.Violation.update` does; returns its J."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FixedMultiplier:
    """lambda stays where it is: the exact penalty, which needs no ascent once it is large enough (CS-RLHF).

    Args:
        init: lambda >= 0.
        violation: Of the constraint, which is measured all the same.
    """

    def __init__(self, init: float, violation: Violation) -> None:
        self.value, self.violation = init, violation

    def begin(self, value: float) -> None:
        self.value = value

    def update(self, costs: torch.Tensor, violations: torch.Tensor, prompt_ids: torch.Tensor) -> float | None:
        return self.violation.update(costs, violations, prompt_ids)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "costs": self.violation.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = float(state["value"])
        self.violation.load_state_dict(state["costs"])


class PidMultiplier:
    """lambda by a PID controller of J, after Stooke et al. 2020, with a tolerance:

        e = J - tolerance, I <- I + e, Jbar <- a Jbar + (1 - a) J, D = {Jbar - Jbar before}+
        lambda = clip(kp e + ki I + kd D, 0, maximum)

    I stands still while lambda is at a bound and e pushes further, and begins at init / ki, so that lambda begins at
    init. Under a rectified J, which is never negative, I falls only where the tolerance is above 0.

    Args:
        init: lambda at the start, >= 0.
        maximum: lambda_max.
        violation: Measures J.
        kp, ki, kd: Gains of the error, its sum and the rise of the smoothed J; ki > 0.
        tolerance: The J that is aimed at.
        smoothing: a, in [0, 1).
    """

    def __init__(
        self,
        init: float,
        maximum: float,
        violation: Violation,
        *,
        kp: float,
        ki: float,
        kd: float,
        tolerance: float = 0.0,
        smoothing: float = 0.0,
    ) -> None:
        self.maximum, self.violation = maximum, violation
        self.kp, self.ki, self.kd, self.tolerance, self.smoothing = kp, ki, kd, tolerance, smoothing
        self._smoothed: float | None = None
        self.begin(init)

    def begin(self, value: float) -> None:
        self.value, self._integral = value, value / self.ki

    def update(self, costs: torch.Tensor, violations: torch.Tensor, prompt_ids: torch.Tensor) -> float | None:
        violation = self.violation.update(costs, violations, prompt_ids)
        if violation is None:
            return None
        error = violation - self.tolerance
        if not (self.value >= self.maximum and error > 0 or self.value <= 0 and error < 0):
            self._integral += error
        before = violation if self._smoothed is None else self._smoothed
        self._smoothed = self.smoothing * before + (1 - self.smoothing) * violation
        # A NaN cost must not pass for none: max(x, NaN) is x.
        rise = self._smoothed - before
        rise = 0.0 if rise < 0 else rise
        wanted = self.kp * error + self.ki * self._integral + self.kd * rise
        self.value = wanted if math.isnan(wanted) else min(max(wanted, 0.0), self.maximum)
        return violation

    def state_dict(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "integral": self._integral,
            "smoothed": self._smoothed,
            "costs": self.violation.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self._integral = float(state["value"]), float(state["integral"])
        self._smoothed = None if state["smoothed"] is None else float(state["smoothed"])
        self.violation.load_state_dict(state["costs"])


@dataclass(frozen=True)
class Constraint:
    """What an update needs to know of a constraint.

    Attributes:
        scope: What its violations are means over (`repo_fast.ops.prompt_violations`).
        rectify: Whether responses that do not violate it are free of its stream.
        threshold: d - m, what training compares its costs with.
        controller: Its multiplier.
    """

    scope: Literal["prompt", "response", "batch"]
    rectify: bool
    threshold: float
    controller: Controller


# ----------------------------------------------------------------------------------------------------- the dual start


@dataclass(frozen=True)
class DualStart:
    """Multipliers that a reference's samples ask for.

    Attributes:
        multipliers: lambda* of each constraint.
        infeasible: Whether lambda* is at its maximum: up to there none makes these samples meet the constraint.
        gap: Value of the tilted samples (mean reward less beta' KL) minus the dual's, for the last beta'. 0 where each
            constraint is met, and met exactly where its lambda is not 0.
        effective_samples: Of a prompt, 1 / sum of squares of the tilted probabilities, mean over prompts. Below 2 the
            answer is one sample's.
        converged: Whether beta' and lambda* agreed within 1e-4 at the end.
    """

    multipliers: list[float]
    infeasible: list[bool]
    gap: float
    effective_samples: float
    converged: bool


def dual_start(
    rewards: torch.Tensor,
    costs: torch.Tensor,
    applies: torch.Tensor,
    thresholds: Sequence[float],
    maxima: Sequence[float],
    *,
    kl_coefficient: float,
    minima: Sequence[float] | None = None,
) -> DualStart:
    """Multipliers at which the reference, tilted to the best policy of the regularised problem, meets the constraints.

    Minimises over 0 <= lambda <= lambda_max, after MoCAN (arXiv 2405.19544),

        D(lambda) = E_x[sum_k lambda_k d_k + beta'_x log mean_j exp((R_j - sum_k lambda_k C_kj) / beta'_x)],

    k over the constraints that apply to x. The trainer's weights sum to 1, so that the full beta of the loss stands
    beside a reward of weight 1 / (1 + sum of lambda): beta'_x = beta (1 + sum_k lambda_k), which is held fixed in each
    convex problem and iterated until lambda moves by less than 1e-4. A start, not an answer: costs count on average
    here, also of rectified constraints.

    Args:
        rewards: [P, J], of J samples of the reference for each of P prompts.
        costs: [K, P, J], of the same; what does not apply is not looked at.
        applies: bool [K, P].
        thresholds: d_k - m_k.
        maxima: lambda_max of each constraint.
        kl_coefficient: beta, > 0.
        minima: Least lambda of each constraint; where it is the largest too, lambda is given. None: 0.

    Raises:
        ValueError: There are no samples, a score that applies is not finite, or beta is 0.
    """
    R, C = (scores.detach().double().numpy() for scores in (rewards, costs))
    if not R.size:
        raise ValueError(f"dual_start: rewards must be of at least one sample, got {list(R.shape)}")
    counts = applies.numpy().astype(float)
    C = np.where(counts[:, :, None] > 0, C, 0.0)
    if not (np.isfinite(R).all() and np.isfinite(C).all()):
        raise ValueError("dual_start: rewards and the costs that apply must be finite")
    if not kl_coefficient > 0:
        raise ValueError(f"dual_start: kl_coefficient must be above 0, got {kl_coefficient}")
    # One that applies to nobody stays at 0.
    maxima = np.where(counts.any(1), maxima, 0.0)
    least = np.minimum(np.zeros(len(maxima)) if minima is None else minima, maxima)
    d, bounds = np.asarray(thresholds, float), list(zip(least, maxima, strict=True))

    def tilted(multipliers: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log of the normalisation over the samples' mean, [P], and the probabilities of the tilted samples, [P, J]."""
        exponents = (R - np.tensordot(multipliers, C, 1)) / beta[:, None]
        return scipy.special.logsumexp(exponents, 1) - math.log(R.shape[1]), scipy.special.softmax(exponents, 1)

    def dual(multipliers: np.ndarray, beta: np.ndarray) -> tuple[float, np.ndarray]:
        log_mean, probabilities = tilted(multipliers, beta)
        value = (multipliers @ (d[:, None] * counts) + beta * log_mean).mean()
        slack = counts * (d[:, None] - (C * probabilities).sum(2))
        return float(value), slack.mean(1)

    multipliers, converged = np.clip(1.0, least, maxima), False
    for _ in range(100):
        beta = kl_coefficient * (1 + multipliers @ counts)
        best = scipy.optimize.minimize(
            dual, multipliers, (beta,), "L-BFGS-B", jac=True, bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-9}
        ).x
        moved, multipliers = float(np.abs(best - multipliers).max(initial=0.0)), best
        if moved < 1e-4:
            converged = True
            break
    _, probabilities = tilted(multipliers, beta)
    logs = np.log(probabilities * R.shape[1], where=probabilities > 0, out=np.zeros_like(probabilities))
    primal = float(((probabilities * R).sum(1) - beta * (probabilities * logs).sum(1)).mean())
    return DualStart(
        multipliers=[float(value) for value in multipliers],
        infeasible=[bool(value >= most > 0) for value, most in zip(multipliers, maxima, strict=True)],
        gap=primal - dual(multipliers, beta)[0],
        effective_samples=float((1 / np.square(probabilities).sum(1)).mean()),
        converged=converged,
    )


# ------------------------------------------------------------------------------------------------------- the reward cap


def capped_rewards(rewards: torch.Tensor, cap: float | None) -> torch.Tensor:
    """min(R, cap): where the usefulness that was asked for is reached, pressure ends. A NaN stays one.

    Args:
        rewards: float32 [S].
        cap: None: the rewards as they are.
    """
    return rewards if cap is None else rewards.clamp(max=cap)


def wholly_capped(rewards: torch.Tensor, prompt_ids: torch.Tensor, cap: float) -> float:
    """The share of prompts all of whose responses reach the cap: of their reward nothing is left but its KL penalty."""
    return float((prompt_means((rewards >= cap).double(), prompt_ids) == 1).double().mean())
