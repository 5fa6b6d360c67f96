"""Several constraints, each with a cost of its own: the section `constraints`.

A policy with one is written `cost` and `algorithm`. With several each has a name, and everything that is written down
of a run has a column for each. What the values do is in `repo_fast/objective/`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, TypeVar

from repo_fast.config.checks import require, require_at_least
from repo_fast.config.sections import Plain, ScorerConfig, check_scorer
from repo_fast.config.suites import REFUSED
from repo_fast.errors import InputError
from repo_fast.objective.algorithm import ALGORITHMS

if TYPE_CHECKING:
    from repo_fast.config.train import AlgorithmConfig

# The only constraint, of either form, is called as its scores always were.
ONLY = "cost"
# The column of the reward that is not trained on.
SECOND_REWARD = "second_reward"
_NAME = re.compile(r"[A-Za-z]\w*")
# Other columns of what is written down of responses.
_TAKEN = {
    *("reward", SECOND_REWARD, ONLY, "kl", "response_length", "well_formed", "step", "policy", "prompt_id", "category"),
    *("prompt", "sample", "response", "tokens", "finished"),
}
# What only some controllers have a use for; written, it is a value that is not null.
_CONTROLLERS = {
    "multiplier_learning_rate": ("dual",),
    "multiplier_max": ("dual", "pid"),
    "pid": ("pid",),
}


@dataclass(frozen=True)
class CostConfig(ScorerConfig):
    """One of several costs, and the prompts that it is about."""

    threshold: float = 0.0
    """d: a cost above it is unsafe (units of the cost)."""
    applies_to: dict[str, Plain] = field(default_factory=dict)
    """The prompts it is about, by a field of their rows such as `category`: the value, or the list of values, that they
    have there. Of several fields all have to fit. Empty: all prompts. Others are not given to the scorer."""
    applies_to_missing: bool | None = None
    """Whether it is about prompts that have no such field, or null there. Null: they are an error."""


@dataclass(frozen=True)
class PidConfig:
    """Gains of `controller: pid` (Stooke et al. 2020, arXiv 2007.03964): lambda = kp e + ki (sum of e) + kd (rise)."""

    kp: float = 1.0
    """Of the error e = J - tolerance."""
    ki: float = 0.1
    """Of its sum, > 0."""
    kd: float = 0.0
    """Of the rise of the smoothed J."""
    tolerance: float = 0.0
    """The J that is aimed at (units of the cost). A rectified J is never below 0: only where this is above 0 does the
    sum of errors fall again."""
    smoothing: float = 0.0
    """Weight of the past in the smoothed J, in [0, 1)."""


@dataclass(frozen=True)
class ConstraintConfig(CostConfig):
    """One of several constraints of a training run."""

    margin: float = 0.0
    """m >= 0: training uses the threshold d - m, evaluation always d (units of the cost)."""
    scope: Literal["prompt", "response", "batch"] | None = None
    """What is to be safe: the mean of each prompt's responses, each response, both rectified; or `batch`, the mean over
    responses, as in the Lagrangian baselines. Null: the algorithm's own, or `algorithm.scope`."""
    controller: Literal["dual", "fixed", "pid"] = "dual"
    """What drives lambda: ascent of its logarithm, nothing, or a PID controller."""
    multiplier_init: float | Literal["dual"] | None = None
    """lambda at the start, > 0 (`fixed`, `pid`: >= 0). `dual`: what the reference's responses to the held-out prompts
    ask for (MoCAN, arXiv 2405.19544). Null: 1."""
    multiplier_learning_rate: float | None = None
    """`dual`: eta of the ascent. Null: 0.1."""
    multiplier_max: float | None = None
    """`dual`, `pid`, and where lambda starts from `dual`: the largest lambda. Null: 5."""
    cost_window: int | None = None
    """`batch`: costs, over all ranks, that their mean is estimated from (responses). Null: 128."""
    confidence_z: float | None = None
    """`hc_lag`: standard errors added to the mean cost. Null: 1.645."""
    confidence: Literal["z", "t"] | None = None
    """`hc_lag`: as `algorithm.confidence`. Null: z."""
    pid: PidConfig | None = None
    """`pid`: its gains. Null: the defaults."""


_Cost = TypeVar("_Cost", bound=CostConfig)


def by_column(costs: Mapping[str, _Cost]) -> dict[str, _Cost]:
    """Constraints by the names of the columns that have their costs: their own, but a single one's is `cost`."""
    return dict(zip([ONLY] if len(costs) == 1 else costs, costs.values(), strict=True))


def section_of(column: str, constraints: Mapping[str, CostConfig]) -> str:
    """The section that a column's scorer is written in."""
    if column == SECOND_REWARD:
        return f"evaluation.{column}"
    if column == REFUSED:
        return "suites.refusal"
    if column == "reward" or not constraints:
        return column
    return f"constraints.{column if column in constraints else next(iter(constraints))}"


def check_costs(cost: ScorerConfig, constraints: Mapping[str, CostConfig]) -> None:
    """Raise `InputError` for both forms at once, names that cannot be columns, scorers and prompts that cannot be."""
    if not constraints:
        check_scorer(ONLY, cost)
    elif cost != ScorerConfig():
        raise InputError(
            f"cost.path is {cost.path!r} with constraints {', '.join(map(str, constraints))}, expected one form: "
            "either cost, or constraints with a path each"
        )
    for name, own in constraints.items():
        check_name("constraint", name)
        key = f"constraints.{name}"
        check_scorer(key, own)
        _check_applies_to(key, own)


def check_name(of: str, name: object) -> None:
    """Raise `InputError` for a name that columns and measures cannot begin with."""
    valid = isinstance(name, str) and _NAME.fullmatch(name) is not None
    require(valid, f"the {of} name", name, "a letter, then letters, digits and _")
    # strict_safety_rate is a measure of all.
    taken = name in _TAKEN or str(name).split("_")[-1] == "strict"
    require(not taken, f"the {of} name", name, "one that no other column or measure has")


def _check_applies_to(key: str, cost: CostConfig) -> None:
    for column, wanted in cost.applies_to.items():
        values = wanted if isinstance(wanted, list) else [wanted]
        plain = all(isinstance(value, str | int | float) for value in values)
        require(bool(values) and plain, f"{key}.applies_to.{column}", wanted, "a value, or a list of some")
    if cost.applies_to_missing is not None and not cost.applies_to:
        raise InputError(
            f"{key}.applies_to_missing is {cost.applies_to_missing} without {key}.applies_to, expected null: it "
            "applies to all prompts"
        )


def check_constraints(constraints: Mapping[str, ConstraintConfig], algorithm: "AlgorithmConfig") -> None:
    """Raise `InputError` for a value of the section that cannot be honoured."""
    row = ALGORITHMS[algorithm.name]
    if constraints and not row.has_cost_stream:
        raise InputError(
            f"constraints has {', '.join(constraints)} with algorithm.name {algorithm.name!r}, which has no "
            "multiplier; expected repo, ppo_lag or hc_lag"
        )
    defaults = type(algorithm)()
    for entry in fields(ConstraintConfig):
        # Scopes that algorithms leave open may be set for all.
        of_all = getattr(algorithm, entry.name, None)
        if constraints and entry.name != "scope" and of_all != getattr(defaults, entry.name, None):
            raise InputError(
                f"algorithm.{entry.name} is {of_all!r} with constraints, expected to be left alone: write it for each, "
                f"as constraints.{next(iter(constraints))}.{entry.name}"
            )
    for name, own in constraints.items():
        _check_constraint(f"constraints.{name}", own, algorithm)


def _check_constraint(key: str, own: ConstraintConfig, algorithm: "AlgorithmConfig") -> None:
    row = ALGORITHMS[algorithm.name]
    require_at_least(0, {f"{key}.margin": own.margin, f"{key}.multiplier_learning_rate": own.multiplier_learning_rate})
    require_at_least(1, {f"{key}.cost_window": own.cost_window})
    if own.scope in ("prompt", "response") and not row.rectify:
        raise InputError(
            f"{key}.scope is {own.scope!r} with algorithm.name {algorithm.name!r}, which is not rectified; expected "
            "batch or null"
        )
    scope = own.scope or algorithm.scope or row.scope
    uses: dict[str, tuple[bool, str]] = {
        option: (own.controller in users, f"{key}.controller {own.controller!r}")
        for option, users in _CONTROLLERS.items()
    }
    if own.multiplier_init == "dual":
        uses.pop("multiplier_max")
    uses["cost_window"] = scope == "batch", f"the scope {scope!r}"
    for option in ("confidence_z", "confidence"):
        uses[option] = row.constraint == "upper", f"algorithm.name {algorithm.name!r}"
    for option, (used, by) in uses.items():
        value = getattr(own, option)
        if value is not None and not used:
            raise InputError(f"{key}.{option} is {value!r} with {by}, which has no use for it; expected null")
    most = algorithm.multiplier_max if own.multiplier_max is None else own.multiplier_max
    require(most > 0, f"{key}.multiplier_max", most, "a number above 0")
    init = algorithm.multiplier_init if own.multiplier_init is None else own.multiplier_init
    if init != "dual":
        least = "above 0" if own.controller == "dual" else "of at least 0"
        valid = init > 0 or (own.controller != "dual" and init == 0)
        require(valid, f"{key}.multiplier_init", init, f"a number {least}, or dual")
        bounded = own.controller == "fixed" or init <= most
        require(bounded, f"{key}.multiplier_init", init, f"at most {key}.multiplier_max ({most:g})")
    if own.pid is not None:
        gains = {f"{key}.pid.{name}": getattr(own.pid, name) for name in ("kp", "kd", "tolerance")}
        require_at_least(0, gains)
        require(own.pid.ki > 0, f"{key}.pid.ki", own.pid.ki, "a number above 0")
        require(0 <= own.pid.smoothing < 1, f"{key}.pid.smoothing", own.pid.smoothing, "a number in [0, 1)")
