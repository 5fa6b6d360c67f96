"""The best of the evaluations of a run, by one measure: which direction is better, and what several constraints add up
to.

Its policy is `best_policy/`, a Hugging Face folder that comes and goes as a whole, with `best_evaluation.json` in it
(step, measure, its value there and at the start), and the record of what its training has read, by which certificates
know it.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from repo_fast.report.jsonl import Value
from repo_fast.report.rewriting import rewriting

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
        value_at_start: Of the measure before the first step, which no policy is kept of; None where it is not known.
    """

    step: int
    measure: str
    value: float
    value_at_start: float | None = None


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


def value_of(evaluation: Mapping[str, Value], measure: str, constraints: Collection[str]) -> float:
    """A measure of `measures_to_keep` in a row of `evaluations.jsonl`; NaN where nothing in it is that.

    Args:
        evaluation: The row.
        measure: Its name.
        constraints: Names of all: what is not in the row by itself is the sum of theirs. A single one that is not about
            all prompts is told by its name, too.
    """
    if measure in evaluation:
        return float(evaluation[measure])  # type: ignore[arg-type]
    own = [evaluation[key] for name in constraints if (key := f"{name}_{measure}") in evaluation]
    return float(sum(own)) if own else math.nan  # type: ignore[arg-type]


def better(
    evaluation: Mapping[str, Value],
    measure: str,
    best: Best | None,
    constraints: Collection[str] = (),
    start: Mapping[str, Value] | None = None,
) -> Best | None:
    """The evaluation, where it is better than the best so far; None where it is not: of equal ones the earlier stays.

    A value that is not finite is never better.

    Args:
        evaluation, measure, constraints: As for `value_of`.
        best: The best so far; None: there is none.
        start: The evaluation before the first step; None: it is not known.
    """
    value, own = value_of(evaluation, measure, constraints), constraint_of(measure)
    more = MORE_IS_BETTER[measure if own is None else measure.removeprefix(f"{own}_")]
    if not math.isfinite(value):
        return None
    if best is not None and not (value > best.value if more else value < best.value):
        return None
    at_start = math.nan if start is None else value_of(start, measure, constraints)
    step = int(evaluation["step"])  # type: ignore[arg-type]
    return Best(step, measure, value, at_start if math.isfinite(at_start) else None)


def write_best(folder: Path, best: Best) -> None:
    """Say in the folder of a policy of which evaluation it is."""
    with rewriting(folder / FILE) as file:
        file.write(json.dumps(asdict(best), indent=1) + "\n")


def read_best(folder: Path) -> Best | None:
    """Of which evaluation the policy in a folder is; None where it does not say, or is not there."""
    file = folder / FILE
    return Best(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
