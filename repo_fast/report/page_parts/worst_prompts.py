"""The held-out prompts that a policy answers worst, and those that it answers worse than at the start."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from repo_fast.report.measures import Thresholds
from repo_fast.report.page_parts.responses import Collected, PolicyScores, Response, collect, is_unsafe
from repo_fast.report.page_parts.wording import decimals_of, spell_value

# Prompts of each kind, responses to each of them, and the characters of a response and of a prompt: a page is to be
# read, and the files beside it have all.
WORST, WORSE, RESPONSES, CHARACTERS, PROMPT_CHARACTERS = 20, 10, 3, 1200, 600
# Costs are scored in float32.
_ROUNDING = 1e-6


def worst_prompts(
    before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]], threshold: Thresholds
) -> dict[str, Any]:
    """What the page says of them.

    Args:
        before, after: Rows of `eval_before.jsonl`, or none, and of `eval_after.jsonl`.
        threshold: d, in the unit of the costs; of several constraints by name.

    Returns:
        `worst` by violation after, and `worse` of the others, by how much their violation rose; how many prompts there
        are in all (`prompts`), are `unsafe` after and `risen`; `compared`: whether there is a before.
    """
    rows = [*_numbered("before", before), *_numbered("after", after)]
    found = collect(rows, ["before", "after"], "before", threshold)
    old, new = (_violations(found.scores[side], threshold) for side in ("before", "after"))
    both = found.scores["before"].present & found.scores["after"].present
    # By more than rounding; of two that are both no number, the difference is none either.
    higher = both & (new > old + _ROUNDING * (1 + np.abs(old)))
    rise = np.subtract(new, old, where=higher, out=np.zeros(len(new)))
    worst = _largest(new)[:WORST]
    risen = _largest(rise)
    worse = [row for row in risen if row not in set(worst)][:WORSE]
    return {
        "prompts": int(found.scores["after"].present.sum()),
        "unsafe": int((new > 0).sum()),
        "risen": len(risen),
        "compared": bool(both.any()),
        "worst": [_shown(found, row, rise[row] > 0, threshold) for row in worst],
        "worse": [_shown(found, row, True, threshold) for row in worse],
    }


def _numbered(policy: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of an evaluation as those of a policy, whose samples are counted within a prompt."""
    samples: Counter[Any] = Counter()
    for row in rows:
        yield {"category": None, **row, "policy": policy, "sample": samples[row["prompt_id"]]}
        samples[row["prompt_id"]] += 1


def _violations(scores: PolicyScores, threshold: Thresholds) -> np.ndarray:
    """How far each prompt is above its threshold, 0 where it is safe, float64 [P]; one without a number is worst."""
    # Under several constraints it is the excess already.
    excess = scores.cost - (0.0 if isinstance(threshold, Mapping) else threshold)
    return np.where(scores.unsafe, np.where(np.isnan(excess), np.inf, excess), 0.0)


def _largest(values: np.ndarray) -> list[int]:
    """Where the values above 0 are, the largest first."""
    order = np.argsort(-values, kind="stable")
    return [int(row) for row in order if values[row] > 0]


def _shown(found: Collected, row: int, risen: bool, threshold: Thresholds) -> dict[str, Any]:
    old, new = found.scores["before"], found.scores["after"]
    if not old.present[row]:
        change = ""
    elif not old.unsafe[row]:
        change = "became unsafe" if new.unsafe[row] else ""
    else:
        change = "more unsafe" if risen else "unsafe before too" if new.unsafe[row] else "repaired"
    text = found.prompts[row]
    answered = [side for side in ("before", "after") if found.responses[side][row]]
    return {
        "id": found.prompt_ids[row],
        "prompt": text[:PROMPT_CHARACTERS],
        "missing": max(len(text) - PROMPT_CHARACTERS, 0),
        "category": found.categories[row],
        "change": change,
        "sides": [(side, _side(found, side, row, threshold)) for side in answered],
    }


def _side(found: Collected, side: str, row: int, threshold: Thresholds) -> dict[str, Any]:
    scores, answers = found.scores[side], found.responses[side][row]
    names = list(threshold) if isinstance(threshold, Mapping) else []
    return {
        "cost": _number(scores.cost[row]),
        "reward": _number(scores.reward[row]),
        "unsafe": bool(scores.unsafe[row]),
        "responses": len(answers),
        "answers": [
            {
                "text": answer.text[:CHARACTERS],
                "missing": max(len(answer.text) - CHARACTERS, 0),
                "costs": _costs(answer, names),
                "reward": _number(answer.reward),
                "unsafe": is_unsafe(answer, threshold),
            }
            for answer in answers[:RESPONSES]
        ],
    }


def _costs(answer: Response, names: Sequence[str]) -> str:
    """The cost of a response; of several constraints those that are about its prompt."""
    if not names:
        return f"cost {_number(answer.cost)}"
    pairs = zip(names, answer.costs, strict=True)
    return ", ".join(f"{name} {_number(cost)}" for name, cost in pairs if cost != -math.inf)


def _number(value: float) -> str:
    return spell_value(value, min(decimals_of([value]), 3))
