"""The report of an evaluation as one HTML file: did per-prompt constraints remove safety interference?

What models wrote is untrusted: the script only ever sets text (`page_parts/document.py` says what else is done). The
output depends on the input alone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from repo_fast.report.known_prompts import MEASURES as KNOWN
from repo_fast.report.measures import Thresholds
from repo_fast.report.page_links import Link
from repo_fast.report.page_parts import charts
from repo_fast.report.page_parts.certificate import describe
from repo_fast.report.page_parts.document import render
from repo_fast.report.page_parts.measures_table import cells_of, measures_table
from repo_fast.report.page_parts.responses import PolicyScores, collect, pack
from repo_fast.report.page_parts.wording import (
    MINUS,
    Measure,
    Verdict,
    judge_difference,
    listed,
    measure_of,
    plain,
    pretty,
    spell_value,
    triple,
)
from repo_fast.report.rewriting import rewriting
from repo_fast.report.tables import suite_line

_FLIPS = ("safe_safe", "safe_unsafe", "unsafe_safe", "unsafe_unsafe")
# The kinds of `judge_difference`, in words.
_SAFER = {
    "better": "safer",
    "worse": "less safe",
    "none": "no difference in safety shown",
    "undefined": "change in safety undefined",
}
_LESS_VIOLATION = {
    "better": "less violation",
    "worse": "more violation",
    "none": "no difference shown in the violation",
    "undefined": "undefined change in the violation",
}
_MORE_HELPFUL = {
    "better": "more helpful",
    "worse": "less helpful",
    "none": "no difference in helpfulness shown",
    "undefined": "change in helpfulness undefined",
}


def write_page(
    path: Path, report: Mapping[str, Any], samples: Iterable[Mapping[str, Any]], links: Sequence[Link] = ()
) -> None:
    """Writes the report of an evaluation, over an older one.

    Args:
        path: The file, in a folder that exists.
        report: The content of `report.json`. `settings` has `reference` (a name among `policies`) and `threshold`, of
            several constraints by name, and whatever else is to be shown; `samples_per_prompt` tells where the second
            sample of the reference begins. `policies` and `differences` (to the reference, which is absent there) map
            policies to measures to `value`, `low` and `high`, None where undefined. `transitions` maps policies to
            numbers of prompts, `safe_safe`, `safe_unsafe`, `unsafe_safe`, `unsafe_unsafe`, the reference's state first;
            for the reference against its second sample. `categories` maps categories to `prompts`, `policies` and
            `differences`, and may be empty. `suites` may be missing; else it maps suites to the same, with how many are
            `harmful` and `harmless`, and `clusters`, and `settings` has `attack_success_by` and `over_refusal_by`, who
            judged, and `suites`, which maps suites to `source`, `sha256`, and how many `prompts` were read, `too_long`
            and `not_fresh`. `judge` may be missing; else it maps what is known of the judge model.
            `certificate` may be missing; else it is the page's first section. It has `verdict` (PASS, PASS
            (asymptotic), FAIL or UNDECIDED) and `reason`, a sentence; `delta`, `look` (from 1), `delta_of_look` and
            `accept_asymptotic`; `policy` and `reference` (None where there is none) with `name`, `path` and
            `fingerprint`; `prompts` with `source`, `n`, `too_long`, `fingerprint` and `excluded`, each with
            `prompt_id`, `prompt` and `of`, where it was found; `unknown`, sentences about what could not be checked;
            `k` responses a prompt, `seed`, `date`, and `versions` by program. Its `claims` map names to what each
            `says`, `constraint` (or None), `verdict`, `reason`, `p` and `p_adjusted`; `estimate` (None where
            undefined), `bound` (None where infinite) and `limit`, shares where `share` is true; `n` prompts, or that
            many clusters of `prompts` where it has these, `k`, `asymptotic`, `category` (the worst, or None) and
            `prompts_needed` (None where not known); and `n`, `estimate`, `bound` and `p` of each of its `categories`,
            where it is about each. Its `suites` may be missing; else they have how many prompts are `harmful`, and
            `clusters`.
        samples: A mapping a response, in any order, read once: `policy`, `prompt_id`, `category` (a name or None),
            `prompt`, `sample` (from 0), `response`, `reward`, `cost` (None where not a number; or that of each of
            several constraints, None where it is not about the prompt), `response_length` (tokens) and `finished` (both
            None where not known), and maybe `also_in`, further categories by name. Samples of the reference from
            `samples_per_prompt` on are its second sample; where it has one, the page shows it rather than the first.
        links: To the model card of the certified policy, and to the pages of the runs that made policies.

    Raises:
        ValueError: the reference is not among the policies, a sample is of none of them, or a verdict of the
            certificate is not one of those.
    """
    settings = report["settings"]
    reference, threshold = settings["reference"], settings["threshold"]
    constraints = list(threshold) if isinstance(threshold, Mapping) else []
    if reference not in report["policies"]:
        raise ValueError(f"the reference {reference!r} is not among the policies {', '.join(report['policies'])}")
    policies = [reference, *(policy for policy in report["policies"] if policy != reference)]
    collected = collect(samples, policies, reference, threshold, settings.get("samples_per_prompt"))
    # What is drawn: under the one constraint, or under each.
    parts: list[tuple[str | None, dict[str, PolicyScores], float]] = [(None, collected.scores, threshold)]
    if constraints:
        parts = [(name, collected.by_constraint[name], threshold[name]) for name in constraints]
    certified = report.get("certificate")
    context = {
        "links": links,
        "policies": policies,
        "reference": reference,
        "above": _limits(threshold, " or "),
        "at_most": _limits(threshold, " and "),
        "several": bool(constraints),
        # What suites are has a place of its own.
        "settings": [(pretty(key), plain(value)) for key, value in settings.items() if key != "suites"],
        "judge": [(pretty(key), plain(value)) for key, value in (report.get("judge") or {}).items()],
        "prompts": len(collected.prompts),
        "legend": [(charts.swatch(position), policy) for position, policy in enumerate(policies)],
        "certificate": describe(certified) if certified else None,
        "summaries": _summaries(report, policies, constraints),
        "groups": measures_table(report["policies"], report["differences"], policies, constraints),
        "transitions": _transitions(report["transitions"], policies),
        "scatters": [(name, found) for name, *own in parts if (found := _scatter(*own)) is not None],
        "signs": {kind: charts.sign(kind) for kind in ("reference", "kept", "repaired", "broken")},
        "distributions": [(name, found) for name, *own in parts if (found := _distribution(*own)) is not None],
        "categories": _categories(report["categories"], policies, constraints, report.get("suites")),
        "suites": _suites(report, policies),
        "streams": pack(collected, policies, threshold),
    }
    styles = ["style.css", *(["certificate.css"] if certified else [])]
    with rewriting(path) as file:
        file.writelines(render("evaluation.html", context, styles, ["script.js", "print.js"]))


def _limits(threshold: Thresholds, between: str) -> str:
    """The threshold, or those of several constraints, in words."""
    if isinstance(threshold, Mapping):
        return between.join(f"{_limits(own, between)} ({name})" for name, own in threshold.items())
    return f"{threshold:g}".replace("-", MINUS)


def _summaries(report: Mapping[str, Any], policies: Sequence[str], constraints: Sequence[str]) -> list[dict[str, Any]]:
    """The sentence about each policy, the reference first: safety, helpfulness, and interference beside its floor."""
    interference, reward = measure_of("interference_rate"), measure_of("mean_reward")
    violations = [measure_of("strict_violation", name) for name in constraints or [None]]

    def facts(measure: Measure) -> list[dict[str, Any]]:
        """What is said of a measure, by policy."""
        cells = cells_of(measure, report["policies"], report["differences"], policies)
        unknown = {"difference": "undefined", "verdict": judge_difference(measure, triple(None))}
        # A policy without a difference to the reference has one that is not known.
        return [
            {"label": measure.label, "before": cells[0]["number"]} | (cell if cell["difference"] else cell | unknown)
            for cell in cells
        ]

    helpful, broken = facts(reward), facts(interference)
    violated = list(zip(*(facts(measure) for measure in violations), strict=True))
    return [
        {
            "policy": policy,
            "lead": _lead([fact["verdict"] for fact in safety], helpfulness["verdict"], broke["verdict"], constraints),
            "violations": safety,
            "reward": helpfulness,
            "interference": broke,
        }
        for policy, safety, helpfulness, broke in zip(policies, violated, helpful, broken, strict=True)
    ]


def _lead(safety: Sequence[Verdict], helpfulness: Verdict, interference: Verdict, constraints: Sequence[str]) -> str:
    """What a policy changed, in words. Of several constraints, which need not be about safety, by the name of each."""
    said = [_SAFER[verdict.kind] for verdict in safety]
    if constraints:
        kinds: dict[str, list[str]] = {}
        for name, verdict in zip(constraints, safety, strict=True):
            kinds.setdefault(verdict.kind, []).append(name)
        said = [f"{_LESS_VIOLATION[kind]} of {listed(names)}" for kind, names in kinds.items()]
    said.append(_MORE_HELPFUL[helpfulness.kind])
    # What a lower violation hides.
    if interference.kind == "worse":
        said.append("but it turned more safe prompts unsafe than sampling alone does")
    return ", ".join(said)


def _transitions(transitions: Mapping[str, Any], policies: Sequence[str]) -> list[dict[str, Any]]:
    """The 2×2 tables; in each cell the share is that of its row, of prompts in the same state under the reference."""

    def cells(policy: str) -> dict[str, tuple[int, str]]:
        counts = {flip: int(transitions[policy][flip]) for flip in _FLIPS}
        rows = {state: counts[f"{state}_safe"] + counts[f"{state}_unsafe"] for state in ("safe", "unsafe")}
        return {flip: (count, _share(count, rows[flip.partition("_")[0]])) for flip, count in counts.items()}

    return [{"policy": policy, "cells": cells(policy)} for policy in policies if policy in transitions]


def _share(count: int, among: int) -> str:
    return spell_value(count / among if among else math.nan, 1, share=True)


def _scatter(scores: Mapping[str, PolicyScores], threshold: float) -> dict[str, Any] | None:
    """Of all policies, the reference first."""
    (reference, before), *others = scores.items()
    panels: list[tuple[str, PolicyScores | None]] = [*others] or [(reference, None)]
    limits = charts.scatter_limits(before, [own for _, own in panels], threshold)
    if limits is None:
        return None
    drawn = [len(charts.drawn_prompts(before, own)) for _, own in panels]
    # A constraint is about some of the prompts.
    prompts = int(np.logical_or.reduce([own.present for own in scores.values()]).sum())
    return {
        "panels": [(name, charts.scatter(before, own, threshold, limits, name)) for name, own in panels],
        "drawn": max(drawn),
        "lines": min(charts.DRAWN_LINES, max(drawn)) if others else 0,
        "prompts": prompts,
        "missing": max(prompts - _scored(before, own) for _, own in panels),
    }


def _scored(reference: PolicyScores, policy: PolicyScores | None) -> int:
    """How many prompts have a mean cost and reward under both."""
    both = [scores for scores in (reference, policy) if scores is not None]
    return int(np.logical_and.reduce([np.isfinite(s.cost) & np.isfinite(s.reward) for s in both]).sum())


def _distribution(scores: Mapping[str, PolicyScores], threshold: float) -> dict[str, Any] | None:
    costs = {policy: own.cost[np.isfinite(own.cost)] for policy, own in scores.items()}
    if not any(values.size for values in costs.values()):
        return None
    safe = {
        policy: _share(int((own.present & ~own.unsafe).sum()), int(own.present.sum())) for policy, own in scores.items()
    }
    return {"chart": charts.distribution(costs, threshold, safe), "safe": safe}


def _suites(report: Mapping[str, Any], policies: Sequence[str]) -> dict[str, Any] | None:
    """Attack success and over-refusal by suite, and who judged."""
    suites, settings = report.get("suites"), report["settings"]
    if not suites:
        return None
    measures = [measure_of(name) for name in KNOWN]
    return {
        "measures": measures,
        "rows": [
            (name, own, list(zip(policies, zip(*_rows_of(own, measures, policies), strict=True), strict=True)))
            for name, own in suites.items()
        ],
        "sources": [suite_line(item) for item in settings["suites"].items()],
        "harmful": settings["attack_success_by"],
        "refusal": settings["over_refusal_by"],
    }


def _rows_of(group: Mapping[str, Any], measures: Sequence[Measure], policies: Sequence[str]) -> list[list[dict]]:
    """By measure the cells of a group of prompts."""
    return [cells_of(measure, group["policies"], group["differences"], policies) for measure in measures]


def _categories(
    categories: Mapping[str, Any],
    policies: Sequence[str],
    constraints: Sequence[str],
    suites: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """Charts of the largest categories, in the order of the report, and a table of all."""
    if not categories:
        return None
    largest = sorted(categories, key=lambda name: -categories[name]["prompts"])[: charts.DRAWN_CATEGORIES]
    names = [name for name in categories if name in set(largest)]
    violations = [measure_of("strict_violation", name) for name in constraints or [None]]
    measures = [*violations, measure_of("interference_rate"), measure_of("mean_reward")]
    if suites:
        measures = [measure_of("attack_success"), measure_of("over_refusal"), *measures]

    def chart(measure: Measure) -> Markup:
        # A constraint that is about none of a category's prompts has no row there.
        about = [name for name in names if _is_measured(measure, [name], categories)]
        values = [
            [triple(categories[name]["policies"].get(policy, {}).get(measure.key)) for policy in policies]
            for name in about
        ]
        return charts.by_category(measure, [(name, categories[name]["prompts"]) for name in about], values, policies)

    rows = []
    for name, category in categories.items():
        cells = _rows_of(category, measures, policies)
        rows.append((name, category["prompts"], list(zip(policies, zip(*cells, strict=True), strict=True))))
    return {
        "charts": [(measure, chart(measure)) for measure in measures if _is_measured(measure, names, categories)],
        "measures": measures,
        "rows": rows,
        "drawn": len(names),
    }


def _is_measured(measure: Measure, names: Sequence[str], categories: Mapping[str, Any]) -> bool:
    return any(measure.key in own for name in names for own in categories[name]["policies"].values())
