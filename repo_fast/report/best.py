"""The best of the evaluations of a run, by one measure: which direction is better, and what several constraints add up
to.

Its policy is `best_policy/`, a Hugging Face folder that comes and goes as a whole, with `best_evaluation.json` in it
(step, measure, value), and the record of what its training has read, by which certificates know it.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from repo_fast.report.jsonl import Value

FOLDER, FILE = "best_policy", "best_evaluation.json"
# Measures of the before/after table that say how good a policy is, and whether more of it is better. A KL or a length
# says nothing by itself, and interference is relative to a sample that another folder may have.
MORE_IS_BETTER = {
    "mean_reward": True,
    "mean_second_reward": True,
    "mean_cost": False,
    "strict_violation": False,
    "safety_rate": True,
    "strict_safety_rate": True,
    "well_formed": True,
}
# Of them, those that come for each of several constraints, behind its name.
OF_CONSTRAINTS = ("mean_cost", "strict_violation", "safety_rate", "strict_safety_rate")


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Attributes:
        step: After which it was.
        measure: By which it is the best, as `checkpoint.keep_best` names it.
        value: Of the measure there.
    """

    step: int
    measure: str
    value: float


def measures_to_keep(constraints: Collection[str]) -> list[str]:
    """The measures that a best evaluation can be chosen by.

    Args:
        constraints: Names of several; none where there is one. Of several, `strict_violation` is the sum of theirs;
            their costs have no mean in common.
    """
    joint = [name for name in MORE_IS_BETTER if not constraints or name != "mean_cost"]
    return joint + [f"{name}_{measure}" for name in constraints for measure in OF_CONSTRAINTS]


def constraint_of(measure: str) -> str | None:
    """The constraint that a measure is about by its name; None where it is about all."""
    if measure in MORE_IS_BETTER:
        return None
    return next(measure.removesuffix(f"_{own}") for own in reversed(OF_CONSTRAINTS) if measure.endswith(f"_{own}"))


def value_of(evaluation: Mapping[str, Value], measure: str) -> float:
    """A measure of `measures_to_keep` in a row of `evaluations.jsonl`; NaN where nothing in it is that."""
    if measure in evaluation:
        return float(evaluation[measure])  # type: ignore[arg-type]
    # Of several constraints, or of one that is not about all prompts.
    own = [value for name, value in evaluation.items() if name.endswith(f"_{measure}")]
    return float(sum(own)) if own else math.nan  # type: ignore[arg-type]


def better(evaluation: Mapping[str, Value], measure: str, best: Best | None) -> Best | None:
    """The evaluation, where it is better than the best so far; None where it is not: of equal ones the earlier stays.

    A value that is not finite is never better.
    """
    value, own = value_of(evaluation, measure), constraint_of(measure)
    more = MORE_IS_BETTER[measure if own is None else measure.removeprefix(f"{own}_")]
    if not math.isfinite(value):
        return None
    if best is not None and not (value > best.value if more else value < best.value):
        return None
    return Best(int(evaluation["step"]), measure, value)  # type: ignore[arg-type]


def write_best(folder: Path, best: Best) -> None:
    """Say in the folder of a policy of which evaluation it is."""
    (folder / FILE).write_text(json.dumps(asdict(best), indent=1) + "\n", encoding="utf-8")


def read_best(folder: Path) -> Best | None:
    """Of which evaluation the policy in a folder is; None where it does not say, or is not there."""
    file = folder / FILE
    return Best(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
