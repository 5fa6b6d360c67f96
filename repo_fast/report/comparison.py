"""Policies side by side: what `report.json` of an evaluation holds.

    policies.NAME.MEASURE       {value, low, high}: 95 % interval over prompts (`measures.Resampled`); null where
                                there is none, as for the maximum, the worst 5 % of few prompts, and what no
                                resample changes, but for shares of 0 or 1
    differences.NAME.MEASURE    the same for NAME minus the reference, paired by prompt
    transitions.NAME            how many prompts went from safe or unsafe under the reference to which under NAME
    categories.CATEGORY         its number of `prompts`, and `policies` and `differences` over them alone
    suites.SUITE                of known prompts the same, over all of the suite, some of which may be of others too;
                                here, and in their categories, how many are `harmful` and `harmless`, and in how
                                many `clusters`

The measures are those of `repo_fast.report.measures`, under several constraints of each behind its name. Those that
compare with the reference compare with a second, independent sample of it, for every policy and for the reference
itself, whose values are the floor: what sampling alone does. Policies may share random states with the reference's
first sample, so compared with that one, a policy close to the reference would come out below the floor. Of known
prompts there are those of `repo_fast.report.known_prompts` too, and intervals are over clusters.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from repo_fast.report.known_prompts import KnownPrompts, known_measures
from repo_fast.report.measures import (
    Evaluation,
    Measure,
    Resampled,
    Thresholds,
    interval_of,
    prompt_measures,
    prompts_about,
    ratio,
    resample,
    score_prompts,
    share_of,
)


@dataclass(frozen=True)
class Judgments:
    """J judgments of a policy's responses by another model, of any number a prompt; averaged within prompts first.

    Attributes:
        measure: Name, such as `judge_win_rate`.
        prompt_ids: Integers [J].
        scores: Numbers [J].
        reference: What the reference has by definition, such as 0.5 of comparisons with itself; None: its own
            judgments.
    """

    measure: str
    prompt_ids: ArrayLike
    scores: ArrayLike
    reference: float | None = None


def compare(
    policies: Mapping[str, Evaluation],
    second_sample: Evaluation,
    reference: str,
    *,
    threshold: Thresholds = 0.0,
    categories: Mapping[str, Collection[int]] | None = None,
    judgments: Mapping[str, Judgments] | None = None,
    known: KnownPrompts | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures policies and compares them with one of them.

    Args:
        policies: By name, all of the same prompts.
        second_sample: Of the reference, independent of the one in `policies`.
        reference: A name in `policies`.
        threshold: d, in the unit of the costs; of several constraints by name.
        categories: By name the ids of its prompts, of which one may be in several; None for a set without categories.
        judgments: Of some of the policies.
        known: Of the prompts, where they are of suites; the evaluations then have `failed` and `blank`.
        resamples, seed: Of the bootstrap.

    Returns:
        The module's docstring says what, as plain numbers, strings, None and dictionaries of them.

    Raises:
        ValueError: the evaluations are empty, ragged, or of different prompts.
    """
    judgments = judgments or {}
    everything = _measured(policies, second_sample, reference, threshold, judgments, known, resamples, seed)
    before = score_prompts(second_sample, threshold).excess <= 0
    transitions = {}
    for name, evaluation in policies.items():
        after = score_prompts(evaluation, threshold).excess <= 0
        transitions[name] = {
            f"{_word(was)}_{_word(now)}": int(((before == was) & (after == now)).sum())
            for was in (True, False)
            for now in (True, False)
        }

    def by_group(groups: Mapping[str, Collection[int]]) -> dict[str, Any]:
        """The same over the prompts of each group that has any."""
        found = {}
        for group in sorted(name for name, own in groups.items() if own):
            ids = np.array(sorted(groups[group]))
            counts = {} if known is None else known.counts(ids)
            found[group] = {"prompts": len(ids), **counts} | _measured(
                {name: _of_prompts(evaluation, ids) for name, evaluation in policies.items()},
                _of_prompts(second_sample, ids),
                reference,
                threshold,
                {name: _judgments_of_prompts(judged, ids) for name, judged in judgments.items()},
                known,
                resamples,
                seed,
            )
        return found

    report = {**everything, "transitions": transitions, "categories": by_group(categories or {})}
    if known is not None:
        report["suites"] = by_group(known.suites)
    return report


def _word(safe: bool) -> str:
    return "safe" if safe else "unsafe"


def _of_prompts(evaluation: Evaluation, ids: np.ndarray) -> Evaluation:
    return evaluation.of(np.isin(np.asarray(evaluation.prompt_ids), ids))


def _judgments_of_prompts(judged: Judgments, ids: np.ndarray) -> Judgments:
    kept = np.isin(np.asarray(judged.prompt_ids), ids)
    return replace(judged, prompt_ids=np.asarray(judged.prompt_ids)[kept], scores=np.asarray(judged.scores)[kept])


def _measured(
    policies: Mapping[str, Evaluation],
    second_sample: Evaluation,
    reference: str,
    threshold: Thresholds,
    judgments: Mapping[str, Judgments],
    known: KnownPrompts | None,
    resamples: int,
    seed: int,
) -> dict[str, dict]:
    measures: dict[str, dict[str, Measure]] = {}
    for name, evaluation in policies.items():
        measures[name] = prompt_measures(evaluation, second_sample, threshold)
        if known is not None:
            measures[name] |= known_measures(evaluation, known)
    ids = np.unique(np.asarray(policies[reference].prompt_ids))
    by_prompt = {name: _by_prompt(judged, ids) for name, judged in judgments.items()}
    for name, judged in judgments.items():
        # Shares have a value by definition; ratings are of any range.
        is_share = judged.reference is not None
        measures[name][judged.measure] = _mean_defined(by_prompt[name], is_share)
        if judged.reference is not None:
            by_prompt[reference] = np.full(len(ids), judged.reference)
            measures[reference][judged.measure] = _mean_defined(by_prompt[reference])
    flat = {(name, key): measure for name, own in measures.items() for key, measure in own.items()}
    for name in judgments:
        if name != reference and reference in by_prompt:
            # On the prompts that both have judgments of.
            flat[name, "difference"] = _mean_defined(by_prompt[name] - by_prompt[reference])
    units = None if known is None else known.units(ids)
    drawn = resample(flat, len(ids), resamples, seed, units)

    def difference(name: str, key: str) -> Resampled:
        if name in judgments and key == judgments[name].measure:
            return drawn[name, "difference"]
        return drawn[name, key] - drawn[reference, key]

    independent = len(ids) if units is None else len(np.unique(units))
    about = prompts_about(second_sample) if known is None else prompts_about(second_sample, known.units)

    def numbers(key: str, measured: Resampled) -> dict[str, float | None]:
        low, high = interval_of(key, measured, independent, about)
        found = {"value": measured.value, "low": low, "high": high}
        return {name: number if math.isfinite(number) else None for name, number in found.items()}

    return {
        "policies": {name: {key: numbers(key, drawn[name, key]) for key in own} for name, own in measures.items()},
        "differences": {
            name: {key: numbers(key, difference(name, key)) for key in own if key in measures[reference]}
            for name, own in measures.items()
            if name != reference
        },
    }


def _by_prompt(judged: Judgments, ids: np.ndarray) -> np.ndarray:
    """The mean judgment of each prompt [P], however many have a score; NaN where none has."""
    place = np.searchsorted(ids, np.asarray(judged.prompt_ids, dtype=ids.dtype))
    sums = np.bincount(place, weights=np.asarray(judged.scores, dtype=np.float64), minlength=len(ids))
    counts = np.bincount(place, minlength=len(ids))
    return np.divide(sums, counts, out=np.full(len(ids), np.nan), where=counts > 0)


def _mean_defined(values: np.ndarray, is_share: bool = False) -> Measure:
    """The mean of the values [P] that are not NaN."""
    defined = ~np.isnan(values)
    numbers = np.where(defined, values, 0.0)
    return share_of(numbers, defined) if is_share else partial(ratio, numbers, defined)
