"""The two tables that a run prints, as plain ASCII that keeps its shape in pipes, logs and Markdown code blocks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from repo_fast.report.measures import (
    Evaluation,
    PromptScores,
    bootstrap_interval,
    check_same_prompts,
    interference_rate,
    score_prompts,
    strict_violation,
    sum_by_prompt,
)


def before_after_table(
    before: Evaluation,
    after: Evaluation,
    threshold: float = 0.0,
    before_again: Evaluation | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> str:
    """What training did to the policy, on held-out prompts, with 95 % bootstrap intervals over prompts.

    Args:
        before: The policy at the start; "safe before" in the interference rate means safe in this sample.
        after: The trained policy, on the same prompts.
        threshold: d, in the unit of the costs.
        before_again: A second, independent sample of `before`. Its interference rate, which is sampling alone, fills
            the "before" column of that row and is subtracted in the difference; without it both stay empty.
        resamples, seed: Of the bootstrap.

    Returns:
        Lines of at most 110 columns without a newline at the end. Rows whose field neither evaluation has are left out.

    Raises:
        ValueError: the evaluations are empty, ragged, or of different prompts.
    """
    old, new = score_prompts(before, threshold), score_prompts(after, threshold)
    check_same_prompts(old, new)
    rows = [
        _Row("mean reward", old.reward, new.reward, np.mean),
        _Row("mean cost", old.cost, new.cost, np.mean),
        _Row("strict violation", old.excess, new.excess, strict_violation),
        _Row("safety rate (responses)", _safe_responses(old), _safe_responses(new), _ratio),
        _Row("strict safety rate (prompts)", _all_safe(old), _all_safe(new), np.mean),
        _interference_row(old, new, before_again, threshold),
        _Row("KL, nats a response", _means(before, before.kl), _means(after, after.kl), np.mean),
        _Row(
            "well-formed responses",
            _sums_and_counts(before, before.well_formed),
            _sums_and_counts(after, after.well_formed),
            _ratio,
        ),
        _Row(
            "response length, tokens",
            _means(before, before.response_lengths),
            _means(after, after.response_lengths),
            np.mean,
        ),
    ]
    cells = [row.cells(resamples, seed) for row in rows if row.before is not None or row.after is not None]
    table = _grid(["", "before", "after", "difference"], cells)
    prompts, safe = len(old.prompt_ids), int((old.excess <= 0).sum())
    return "\n".join(
        [
            table,
            f"{prompts} prompts, {_span(old.responses)} responses each before and {_span(new.responses)} after; "
            f"unsafe is a cost above {threshold:g}.",
            "Brackets: 95 % bootstrap interval over prompts; the difference is paired by prompt.",
            f"Interference rate: the share of the {safe} prompts safe before whose mean cost is unsafe after"
            + ("." if before_again is None else ";\nits column 'before' is a second sample of the same policy."),
        ]
    )


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
    return "\n".join([_grid(["", "per step", "per rank", "per micro-batch"], cells), *notes])


@dataclass(frozen=True)
class _Row:
    """A measure of both policies: values by prompt, [P] or [P, F] (None: not measured), and what is made of them."""

    name: str
    before: np.ndarray | None
    after: np.ndarray | None
    statistic: Callable[[np.ndarray], float]

    def cells(self, resamples: int, seed: int) -> list[str]:
        columns = [_interval(values, self.statistic, resamples, seed) for values in (self.before, self.after)]
        both = None
        if self.before is not None and self.after is not None:
            both = np.stack([self.before, self.after], axis=1)
        columns.append(
            _interval(both, lambda pair: self.statistic(pair[:, 1]) - self.statistic(pair[:, 0]), resamples, seed)
        )
        decimals = _decimals([number for column in columns if column for number in column])
        texts = []
        for column, sign in zip(columns, ("", "", "+"), strict=True):
            if column is None:
                texts.append("-")
            else:
                value, low, high = (format(number, f"{sign}.{decimals}f") for number in column)
                texts.append(f"{value} [{low}, {high}]")
        return [self.name, *texts]


def _interval(
    values: np.ndarray | None, statistic: Callable[[np.ndarray], float], resamples: int, seed: int
) -> tuple[float, float, float] | None:
    if values is None:
        return None
    return float(statistic(values)), *bootstrap_interval(values, statistic, resamples, seed)


def _interference_row(old: PromptScores, new: PromptScores, before_again: Evaluation | None, threshold: float) -> _Row:
    floor = None
    if before_again is not None:
        again = score_prompts(before_again, threshold)
        check_same_prompts(old, again)
        floor = np.stack([old.excess, again.excess], axis=1)
    return _Row(
        "interference rate",
        floor,
        np.stack([old.excess, new.excess], axis=1),
        lambda pair: interference_rate(pair[:, 0], pair[:, 1]),
    )


def _all_safe(scores: PromptScores) -> np.ndarray:
    return scores.safe_responses == scores.responses


def _safe_responses(scores: PromptScores) -> np.ndarray:
    return np.stack([scores.safe_responses, scores.responses], axis=1)


def _means(evaluation: Evaluation, values: ArrayLike | None) -> np.ndarray | None:
    sums_and_counts = _sums_and_counts(evaluation, values)
    return None if sums_and_counts is None else sums_and_counts[:, 0] / sums_and_counts[:, 1]


def _sums_and_counts(evaluation: Evaluation, values: ArrayLike | None) -> np.ndarray | None:
    if values is None:
        return None
    counts = sum_by_prompt(evaluation.prompt_ids, np.ones(np.shape(values)))
    return np.stack([sum_by_prompt(evaluation.prompt_ids, values), counts], axis=1)


def _ratio(sums_and_counts: np.ndarray) -> float:
    total, count = sums_and_counts.sum(axis=0)
    return float(total / count)


def _decimals(numbers: Sequence[float]) -> int:
    largest = max((abs(number) for number in numbers if np.isfinite(number)), default=0.0)
    return 3 if largest < 10 else 2 if largest < 100 else 1 if largest < 1000 else 0


def _span(counts: np.ndarray) -> str:
    low, high = counts.min(), counts.max()
    return f"{low}" if low == high else f"{low} to {high}"


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = "+".join("-" * (width + 2) for width in widths)
    lines = [f"+{rule}+"]
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("| " + " | ".join(cells) + " |")
        if row is header:
            lines.append(f"+{rule}+")
    return "\n".join([*lines, f"+{rule}+"])
