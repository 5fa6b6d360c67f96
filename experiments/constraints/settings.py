"""What is compared, and by what: the arms, and the questions with the measure that answers each.

All of it was written down before the experiment was first run, but `--packaged` came after. One arm is the base:
`tiny-constraints`, with `grpo` as the advantage and a learned reward. Every other arm differs from it in one thing;
harm alone has the second constraint's multiplier held at 0, so that all else, its critics too, is the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

SEEDS = 5
BASE, WITHOUT = "base", "harm_only"
# Of the learned reward, over the start's responses to the training prompts: where `reward_cap` puts the cap.
CAP_QUANTILE = 0.75

_ONE = {"config": "tiny", "cost.path": "experiments.constraints.costs:{}"}


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        label: For tables.
        options: Of `repo_fast.train`, where they differ from the base's.
    """

    label: str
    options: Mapping[str, str] = field(default_factory=dict)


def _each(option: str, value: str) -> dict[str, str]:
    return {f"constraints.{name}.{option}": value for name in ("harm", "overcaution")}


def arms(cap: float) -> dict[str, Arm]:
    """The arms by name.

    Args:
        cap: The reward above which `reward_cap` asks for no more.
    """
    one = {name: _ONE | {"cost.path": _ONE["cost.path"].format(name)} for name in ("total", "largest")}
    return {
        BASE: Arm("two constraints"),
        WITHOUT: Arm(
            "harm alone",
            {"constraints.overcaution.controller": "fixed", "constraints.overcaution.multiplier_init": "0"},
        ),
        "sum": Arm("one, on the sum", one["total"]),
        "maximum": Arm("one, on the maximum", one["largest"]),
        # The exact penalty wants a weight above the true multiplier: that at which `dual` ends.
        "fixed": Arm("`fixed` at 5", _each("controller", "fixed") | _each("multiplier_init", "5")),
        "pid": Arm("`pid`", _each("controller", "pid")),
        "dual_start": Arm(
            "`multiplier_init dual`", _each("multiplier_init", "dual") | {"data.eval_prompts": "world:test"}
        ),
        "separate": Arm("`advantage_scale separate`", {"algorithm.advantage_scale": "separate"}),
        "none": Arm("`advantage_scale none`", {"algorithm.advantage_scale": "none"}),
        "reward_cap": Arm(f"`reward_cap {cap:g}`", {"algorithm.reward_cap": f"{cap:g}"}),
    }


@dataclass(frozen=True)
class Question:
    """A comparison of two arms at the same seeds.

    Attributes:
        asked: What it is about.
        arm, other: The difference is the first's measure minus the second's.
        measure: The one that answers; others are shown beside it.
        expected: The sign that was expected, `-` or `+`; or `?` for none.
    """

    asked: str
    arm: str
    other: str
    measure: str
    expected: str


# The sum of both mean violations over prompts, in the units of the costs (which are alike: a clause is about 1).
TOTAL = "total_violation"
# How far the learned reward has risen beyond the rules' one, both in standard deviations of the start's responses.
RUN_AHEAD = "learned_ahead"

QUESTIONS = (
    Question("does harm alone make harmless prompts be refused?", WITHOUT, "start", "refusal_mean_cost", "+"),
    Question(
        "does harm alone make answers to them too cautious?", WITHOUT, "start", "overcaution_strict_violation", "+"
    ),
    Question("does the second constraint keep them from it?", BASE, WITHOUT, "overcaution_strict_violation", "-"),
    Question("does the second constraint cost harm?", BASE, WITHOUT, "harm_strict_violation", "?"),
    Question("is one constraint on the sum worse?", "sum", BASE, TOTAL, "+"),
    Question("is one constraint on the maximum worse?", "maximum", BASE, TOTAL, "+"),
    Question("controller: `fixed` instead of `dual`", "fixed", BASE, TOTAL, "?"),
    Question("controller: `pid` instead of `dual`", "pid", BASE, TOTAL, "?"),
    Question("multipliers that start from `dual` instead of 1", "dual_start", BASE, TOTAL, "-"),
    Question("scale: `separate` instead of `joint`", "separate", BASE, TOTAL, "-"),
    Question("scale: `none` instead of `joint`", "none", BASE, TOTAL, "?"),
    Question("does a cap keep the true reward from falling behind?", "reward_cap", BASE, RUN_AHEAD, "-"),
)
