"""The two tables that a run prints, as plain ASCII that keeps its shape in pipes, logs and Markdown code blocks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from repo_fast.report.known_prompts import MEASURES
from repo_fast.report.measures import (
    Evaluation,
    Resampled,
    Thresholds,
    interval_of,
    prompt_measures,
    prompts_about,
    resample,
    score_prompts,
    standard_error,
)

# The rows of the before/after table: measure and label.
_ROWS = {
    "mean_reward": "mean reward",
    "mean_second_reward": "mean second reward",
    "mean_cost": "mean cost",
    "strict_violation": "strict violation",
    "safety_rate": "safety rate (responses)",
    "strict_safety_rate": "strict safety rate (prompts)",
    "interference_rate": "interference rate",
    "kl": "KL, nats a response",
    "well_formed": "well-formed responses",
    "response_length": "response length, tokens",
}
# Of them, those that come for each of several constraints.
_OF_CONSTRAINTS = ("mean_cost", "strict_violation", "safety_rate", "strict_safety_rate", "interference_rate")


def before_after_table(
    before: Evaluation,
    after: Evaluation,
    threshold: Thresholds = 0.0,
    before_again: Evaluation | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> str:
    """What training did to the policy, on held-out prompts, with 95 % bootstrap intervals over prompts.

    Args:
        before: The policy at the start; "safe before" in the interference rate means safe in this sample.
        after: The trained policy, on the same prompts.
        threshold: d, in the unit of the costs; of several constraints by name.
        before_again: A second, independent sample of `before`. Its interference rate, which is sampling alone, fills
            the "before" column of that row and is subtracted in the difference; without it both stay empty.
        resamples, seed: Of the bootstrap.

    Returns:
        Lines of at most 110 columns, but for long names of constraints, without a newline at the end. Rows whose field
        neither evaluation has are left out.

    Raises:
        ValueError: the evaluations are empty, ragged, or of different prompts.
    """
    measured = before_after_measures(before, after, threshold, before_again, resamples, seed)
    old, new = score_prompts(before, threshold), score_prompts(after, threshold)
    prompts, about = len(old.prompt_ids), prompts_about(before)
    labels = _labels(about)
    cells = [[labels[name], *_cells(name, own, prompts, about)] for name, own in measured.items()]
    table = grid(["", "before", "after", "difference"], cells)
    safe = int((old.excess <= 0).sum())
    return "\n".join(
        [
            table,
            f"{prompts} prompts, {_span(old.responses)} responses each before and {_span(new.responses)} after; "
            f"{unsafe(threshold)}.",
            "Brackets: 95 % interval over prompts, bootstrapped (a share of 0 or 1: exact); "
            "differences paired by prompt.",
            f"Interference rate: the share of the {safe} prompts safe before "
            + ("whose mean cost is unsafe after" if not isinstance(threshold, Mapping) else "that are unsafe after")
            + ("." if before_again is None else ";\nits column 'before' is a second sample of the same policy."),
        ]
    )


def before_after_measures(
    before: Evaluation,
    after: Evaluation,
    threshold: Thresholds = 0.0,
    before_again: Evaluation | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, Resampled]]:
    """The numbers of the before/after table, in its order: by measure `before`, `after` and their `difference`.

    What an evaluation lacks is left out. All else as for `before_after_table`.
    """
    prompts = len(score_prompts(before, threshold).prompt_ids)
    given = {
        "before": prompt_measures(before, threshold=threshold),
        "after": prompt_measures(after, before, threshold),
    }
    if before_again is not None:
        again = prompt_measures(before_again, before, threshold)
        given["before"].update({name: own for name, own in again.items() if name.endswith("interference_rate")})
    found: dict[str, dict[str, Resampled]] = {}
    for name in _labels(prompts_about(before)):
        sides = {side: measures[name] for side, measures in given.items() if name in measures}
        if sides:
            found[name] = resample(sides, prompts, resamples, seed)
            if len(sides) == 2:
                found[name]["difference"] = found[name]["after"] - found[name]["before"]
    return found


def _labels(constraints: Iterable[str]) -> dict[str, str]:
    """The measures of the table and their labels, those of several constraints after the others."""
    return _ROWS | {f"{own}_{name}": f"{own}: {_ROWS[name]}" for own in constraints for name in _OF_CONSTRAINTS}


def table_measures(evaluation: Evaluation, before: Evaluation | None, threshold: Thresholds = 0.0) -> dict[str, float]:
    """The measures of the before/after table, of one evaluation: a row of `evaluations.jsonl`.

    Args:
        evaluation: At least one response.
        before: The policy at the start, on the same prompts, for the interference rates; None leaves them out.
        threshold: As for the table.

    Returns:
        By name; and the standard errors over prompts, `NAME_error`, of those that are compared over time.

    Raises:
        ValueError: the evaluations are ragged, or of different prompts.
    """
    found = prompt_measures(evaluation, before, threshold)
    names = [name for name in _labels(prompts_about(evaluation)) if name in found]
    prompts = len(np.unique(np.asarray(evaluation.prompt_ids)))
    of_responses = {
        "mean_reward": evaluation.rewards,
        "mean_second_reward": evaluation.second_rewards,
        "well_formed": evaluation.well_formed,
    }
    errors = {
        f"{name}_error": standard_error(evaluation.prompt_ids, values)
        for name, values in of_responses.items()
        if values is not None
    }
    return {name: float(found[name](np.ones(prompts))) for name in names} | errors


def unsafe(threshold: Thresholds) -> str:
    """What is unsafe, in words."""
    if not isinstance(threshold, Mapping):
        return f"unsafe is a cost above {threshold:g}"
    names = " or ".join(f"{d:g} ({name})" for name, d in threshold.items())
    return f"unsafe is a cost above {names}; rows without a name are of all"


def comparison_table(report: Mapping) -> str:
    """The policies of an evaluation side by side, with 95 % intervals.

    Args:
        report: What `comparison.compare` returns, and its `settings`.

    Returns:
        A row for each measure of any policy; without a newline at the end.
    """
    policies, reference = report["policies"], report["settings"]["reference"]
    measures = list(dict.fromkeys(key for own in policies.values() for key in own))
    cells = [[measure, *(_measured(own.get(measure)) for own in policies.values())] for measure in measures]
    heads = ["", *(f"{name} (reference)" if name == reference else name for name in policies)]
    return "\n".join(
        [
            grid(heads, cells),
            f"{report['settings']['prompts']} prompts, {report['settings']['samples_per_prompt']} responses each; "
            f"{unsafe(report['settings']['threshold'])}.",
            f"Brackets: 95 % interval over {'clusters of ' if 'suites' in report else ''}prompts, bootstrapped (a "
            "share of 0 or 1: exact).",
            "Win, interference and repair rates, and safe prompts, are against a second sample of the reference;",
            "its own are what sampling alone does.",
            *_suites_table(report, heads[1:]),
        ]
    )


def _suites_table(report: Mapping, heads: Sequence[str]) -> list[str]:
    """Lines about known prompts: each suite and its categories, and who judged."""
    if "suites" not in report:
        return []
    cells = []
    groups = {**report["suites"], **report["categories"]}
    # Categories begin with their suite's name.
    for name in sorted(groups, key=lambda name: (name.partition(":")[0], name)):
        policies = groups[name]["policies"]
        for measure in MEASURES:
            own = [policies[policy].get(measure) for policy in policies]
            if any(own):
                about = groups[name]["harmful" if measure.startswith("attack") else "harmless"]
                cells.append([name, measure, str(about), *map(_measured, own)])
    settings = report["settings"]
    return [
        grid(["known prompts", "", "prompts", *heads], cells),
        *map(suite_line, settings["suites"].items()),
        f"Harmful is {settings['attack_success_by']}; a refusal is {settings['over_refusal_by']}.",
        "Rows with any: the share of clusters of prompts with any such response. An empty answer is no refusal.",
    ]


def suite_line(item: tuple[str, Mapping[str, Any]]) -> str:
    """What a suite was read from, and what of it was left out, in words: its name and what `settings.suites` has."""
    name, own = item
    why = {"too_long": "too long (max_prompt_tokens)", "not_fresh": "known to the policy or its scorers"}
    out = " and ".join(f"{own[key]:,} {word}" for key, word in why.items() if own[key])
    left_out = f", of which left out: {out}" if out else ""
    return f"{name}: {own['prompts']:,} prompts{left_out}; read from {own['source']}, SHA-256 {own['sha256']}."


def _measured(entry: Mapping | None) -> str:
    if entry is None or entry["value"] is None:
        return "-"
    numbers = [entry[key] for key in ("value", "low", "high")]
    decimals = _decimals([number for number in numbers if number is not None])
    value, low, high = ("-" if number is None else f"{number:.{decimals}f}" for number in numbers)
    return value if entry["low"] is None else f"{value} [{low}, {high}]"


def batch_size_table(rows: Mapping[str, Sequence[int | str | None]], notes: Sequence[str] = ()) -> str:
    """What each batch size means, so that nobody has to guess which are global.

    Args:
        rows: By what is counted (e.g. "prompts", "responses", "tokens, at most", "optimizer steps"): three values, per
            step of all ranks together, per step on each rank, and per micro-batch. Integers get thousands separators,
            strings stay (e.g. "<= 4,096"), None is a dash.
        notes: Lines to print below.

    Returns:
        The table without a newline at the end.

    Raises:
        ValueError: a row without exactly three values.
    """
    cells = []
    for name, values in rows.items():
        if len(values) != 3:
            raise ValueError(f"row {name!r} has {len(values)} values; expected per step, per rank, per micro-batch")
        cells.append([name, *("-" if v is None else f"{v:,}" if isinstance(v, int) else v for v in values)])
    return "\n".join([grid(["", "per step", "per rank", "per micro-batch"], cells), *notes])


def _cells(name: str, measured: Mapping[str, Resampled], prompts: int, about: Mapping[str, int]) -> list[str]:
    """A row of the before/after table; a dash for what was not measured."""
    numbers = {side: (entry.value, *interval_of(name, entry, prompts, about)) for side, entry in measured.items()}
    decimals = _decimals([number for triple in numbers.values() for number in triple])
    texts = []
    for side, sign in (("before", ""), ("after", ""), ("difference", "+")):
        if side not in numbers:
            texts.append("-")
        else:
            value, low, high = (format(number, f"{sign}.{decimals}f") for number in numbers[side])
            texts.append(f"{value} [{low}, {high}]" if np.isfinite(numbers[side][1]) else value)
    return texts


def _decimals(numbers: Sequence[float]) -> int:
    largest = max((abs(number) for number in numbers if np.isfinite(number)), default=0.0)
    return 3 if largest < 10 else 2 if largest < 100 else 1 if largest < 1000 else 0


def _span(counts: np.ndarray) -> str:
    low, high = counts.min(), counts.max()
    return f"{low}" if low == high else f"{low} to {high}"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with lines around it, its first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = "+".join("-" * (width + 2) for width in widths)
    lines = [f"+{rule}+"]
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("| " + " | ".join(cells) + " |")
        if row is header:
            lines.append(f"+{rule}+")
    return "\n".join([*lines, f"+{rule}+"])
