"""The responses of an evaluation, grouped by prompt, and packed so that they travel inside the page.

A browser has to open thousands of prompts at once, so the page holds three kinds of zlib streams: the numbers of all
prompts, which sorting and filtering need, the texts of the prompts, and the responses in chunks of prompts, each of
which is unpacked when one of its prompts is opened. Responses that would make the page too large are left out, those
of low cost first, and counted.
"""

import base64
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from repo_fast.report.measures import Evaluation, Thresholds, score_prompts
from repo_fast.report.page_parts.wording import decimals_of, number, visible

PROMPTS_PER_CHUNK = 64
# Of compressed bytes; in base64 they are 18 MB, which leaves room for the charts below 20 MB.
_STREAM_BYTES = 13_500_000
# Of all prompts together. A prompt is not cut below the minimum, by which it can still be recognised.
_PROMPT_CHARACTERS, _MIN_PROMPT_CHARACTERS = 4_000_000, 200


class Response(NamedTuple):
    """One response; NaN where a number is missing, and never safe then.

    Under several constraints `cost` is how far it is above the threshold of that constraint where it is most, and
    `costs` has them all, -inf where one is not about the prompt.
    """

    sample: int
    cost: float
    reward: float
    length: int | None
    finished: bool | None
    text: str
    costs: tuple[float, ...] = ()


@dataclass(frozen=True)
class PolicyScores:
    """What a policy did on each of the P prompts.

    Attributes:
        cost, reward: float64 [P]. Means over the prompt's responses, NaN where it has none; under several constraints
            the largest mean excess over a threshold instead of the cost.
        unsafe: bool [P].
        present: bool [P]. Whether the policy has responses to the prompt.
    """

    cost: np.ndarray
    reward: np.ndarray
    unsafe: np.ndarray
    present: np.ndarray


@dataclass(frozen=True)
class Collected:
    """All prompts, in the order of their ids, and what each policy answered.

    Attributes:
        prompt_ids: P ids.
        prompts: P texts.
        categories: P names, None where there is none.
        responses: By policy, P lists of responses, highest cost first.
        scores: By policy.
        by_constraint: Under several constraints, by name: the scores under each, by policy.
    """

    prompt_ids: list[Any]
    prompts: list[str]
    categories: list[str | None]
    responses: dict[str, list[list[Response]]]
    scores: dict[str, PolicyScores]
    by_constraint: dict[str, dict[str, PolicyScores]]


@dataclass(frozen=True)
class Streams:
    """What the page embeds, each in base64 of a zlib stream of JSON.

    Attributes:
        index: The numbers of all prompts.
        prompts: Their texts.
        chunks: The responses, `PROMPTS_PER_CHUNK` prompts each.
        responses: How many there are.
        left_out: How many of them are not in the page.
        cut: How many responses lack their end.
        cut_prompts: How many prompts lack their end.
    """

    index: str
    prompts: str
    chunks: list[str]
    responses: int
    left_out: int
    cut: int
    cut_prompts: int


def collect(
    samples: Iterable[Mapping[str, Any]],
    policies: Sequence[str],
    reference: str,
    threshold: Thresholds,
    samples_per_prompt: int | None = None,
) -> Collected:
    """Groups responses by prompt, in one pass, and averages their scores.

    Args:
        samples: A mapping a response, in any order; see `page.write_page`.
        policies: The names to expect.
        reference: The policy that may have a second sample, which then is the one that counts, as it does in the rates
            of `report.comparison`.
        threshold: d, in the unit of the costs; of several constraints by name.
        samples_per_prompt: From which sample of the reference on its second sample begins; None for never.

    Raises:
        ValueError: a sample of a policy that is not expected.
    """
    several = threshold if isinstance(threshold, Mapping) else {}
    prompts: dict[Any, tuple[str, str | None]] = {}
    answers: dict[str, dict[Any, list[Response]]] = {policy: {} for policy in policies}
    for row in samples:
        policy, prompt_id = row["policy"], row["prompt_id"]
        if policy not in answers:
            raise ValueError(f"a sample is of the policy {policy!r}; the report has {', '.join(map(repr, policies))}")
        if prompt_id not in prompts:
            # A known prompt may be of several suites.
            groups = [row.get("category"), *row.get("also_in", {}).values()]
            prompts[prompt_id] = visible(row["prompt"]), " and ".join(filter(None, groups)) or None
        costs = tuple(-math.inf if row[name] is None else number(row[name]) for name in several)
        response = Response(
            row["sample"],
            _worst(costs, several) if several else number(row["cost"]),
            number(row["reward"]),
            row.get("response_length"),
            row.get("finished"),
            visible(row["response"]),
            costs,
        )
        answers[policy].setdefault(prompt_id, []).append(response)
    ids = sorted(prompts)
    if samples_per_prompt is not None:
        for prompt_id, group in answers[reference].items():
            second = [response for response in group if response.sample >= samples_per_prompt]
            answers[reference][prompt_id] = second or group
    responses = {policy: [answers[policy].get(prompt_id, []) for prompt_id in ids] for policy in policies}
    for lists in responses.values():
        for group in lists:
            group.sort(key=lambda response: (not math.isnan(response.cost), -response.cost, response.sample))
    return Collected(
        prompt_ids=ids,
        prompts=[prompts[prompt_id][0] for prompt_id in ids],
        categories=[prompts[prompt_id][1] for prompt_id in ids],
        responses=responses,
        scores={policy: _scores(lists, threshold) for policy, lists in responses.items()},
        by_constraint={
            name: {policy: _scores(_under(lists, place), own) for policy, lists in responses.items()}
            for place, (name, own) in enumerate(several.items())
        },
    )


def _worst(costs: Sequence[float], thresholds: Mapping[str, float]) -> float:
    """The largest excess, of the costs that are about the prompt; NaN where none is, or one is missing."""
    excess = [cost - threshold for cost, threshold in zip(costs, thresholds.values(), strict=True)]
    about = [own for own in excess if own != -math.inf]
    return float(np.max(about)) if about else math.nan


def is_unsafe(response: Response, threshold: Thresholds) -> bool:
    """In the type that costs are scored in, as `score_prompts` does."""
    several = isinstance(threshold, Mapping)
    pairs = zip(response.costs, threshold.values(), strict=True) if several else [(response.cost, threshold)]
    return any(not np.float32(cost) - np.float32(limit) <= 0 for cost, limit in pairs)


def _under(lists: list[list[Response]], place: int) -> list[list[Response]]:
    """The responses as they are under one of several constraints."""
    return [
        [
            response._replace(cost=response.costs[place], costs=())
            for response in group
            if response.costs[place] != -math.inf
        ]
        for group in lists
    ]


def _scores(lists: list[list[Response]], threshold: Thresholds) -> PolicyScores:
    cost, reward = np.full(len(lists), np.nan), np.full(len(lists), np.nan)
    unsafe, present = np.zeros(len(lists), dtype=bool), np.zeros(len(lists), dtype=bool)
    rows = [row for row, group in enumerate(lists) for _ in group]
    if rows:
        rewards = [response.reward for group in lists for response in group]
        costs: Any = np.array([response.cost for group in lists for response in group], dtype=np.float32)
        several = isinstance(threshold, Mapping)
        if several:
            each = np.array([response.costs for group in lists for response in group], dtype=np.float32)
            costs = dict(zip(threshold, each.T, strict=True))
        scores = score_prompts(Evaluation(rows, rewards, costs), threshold)
        excess = np.where(np.isneginf(scores.excess), np.nan, scores.excess)
        cost[scores.prompt_ids] = excess if several else scores.cost
        reward[scores.prompt_ids] = scores.reward
        unsafe[scores.prompt_ids], present[scores.prompt_ids] = ~(scores.excess <= 0), True
    return PolicyScores(cost, reward, unsafe, present)


def pack(collected: Collected, policies: Sequence[str], threshold: Thresholds, limit: int = _STREAM_BYTES) -> Streams:
    """Packs the responses for the page, as many as fit.

    Args:
        collected: What `collect` returned.
        policies: In the order of the page, the reference first.
        threshold: d, in the unit of the costs; of several constraints by name.
        limit: Of the compressed bytes of all streams together.
    """
    longest = max(_MIN_PROMPT_CHARACTERS, _PROMPT_CHARACTERS // max(len(collected.prompts), 1))
    cut_prompts = {row: len(text) - longest for row, text in enumerate(collected.prompts) if len(text) > longest}
    prompts = _compress([text[:longest] for text in collected.prompts])
    index = _compress(_index(collected, policies, threshold, cut_prompts))

    budget, room = math.inf, limit - len(prompts) - len(index)
    while True:
        chunks, kept_bytes, left_out, cut = _pack_responses(collected, policies, threshold, budget)
        size = sum(map(len, chunks))
        if size <= room or budget < 1:
            break
        # The budget of a prompt from how much of the last attempt fits; a little less, as fewer texts pack less well.
        budget = 0.98 * max(room, 0) / size * kept_bytes / len(collected.prompts)
    return Streams(
        index=_base64(index),
        prompts=_base64(prompts),
        chunks=[_base64(chunk) for chunk in chunks],
        responses=sum(len(group) for policy in policies for group in collected.responses[policy]),
        left_out=left_out,
        cut=cut,
        cut_prompts=len(cut_prompts),
    )


def _index(
    collected: Collected, policies: Sequence[str], threshold: Thresholds, cut_prompts: dict[int, int]
) -> dict[str, Any]:
    categories = sorted({category for category in collected.categories if category is not None})
    place = {category: position for position, category in enumerate(categories)}
    scores = [collected.scores[policy] for policy in policies]
    typical = {
        field: [
            float(np.median(np.abs(values[np.isfinite(values)]))) for values in columns if np.isfinite(values).any()
        ]
        for field, columns in (("cost", [s.cost for s in scores]), ("reward", [s.reward for s in scores]))
    }
    return {
        # Several constraints: what is called the cost is the largest excess over a threshold.
        "constraints": list(threshold) if isinstance(threshold, Mapping) else [],
        "policies": [visible(policy) for policy in policies],
        "categories": [visible(category) for category in categories],
        "ids": [visible(str(prompt_id)) for prompt_id in collected.prompt_ids],
        "category": [-1 if category is None else place[category] for category in collected.categories],
        "cost": [_rounded(s.cost) for s in scores],
        "reward": [_rounded(s.reward) for s in scores],
        # A character a prompt: unsafe, safe, or no responses.
        "unsafe": ["".join(np.where(s.present, np.where(s.unsafe, "1", "0"), "-").tolist()) for s in scores],
        "decimals": {field: decimals_of(values) for field, values in typical.items()},
        "cutPrompts": cut_prompts,
        "promptsPerChunk": PROMPTS_PER_CHUNK,
    }


def _pack_responses(
    collected: Collected, policies: Sequence[str], threshold: Thresholds, budget: float
) -> tuple[list[bytes], int, int, int]:
    """The chunks, the bytes of text in them, and how many responses were left out and cut."""
    chunks, kept_bytes, left_out, cut = [], 0, 0, 0
    for start in range(0, len(collected.prompts), PROMPTS_PER_CHUNK):
        chunk = []
        for row in range(start, min(start + PROMPTS_PER_CHUNK, len(collected.prompts))):
            answers = [collected.responses[policy][row] for policy in policies]
            kept, used = _choose(answers, budget)
            kept_bytes += used
            left_out += sum(map(len, answers)) - sum(map(len, kept))
            cut += sum(missing > 0 for group in kept for _, _, missing in group)
            chunk.append(
                [
                    [len(group), [_record(*choice, threshold=threshold) for choice in choices]]
                    for group, choices in zip(answers, kept, strict=True)
                ]
            )
        chunks.append(_compress(chunk))
    return chunks, kept_bytes, left_out, cut


def _choose(answers: list[list[Response]], budget: float) -> tuple[list[list[tuple[Response, str, int]]], int]:
    """The responses to a prompt that fit into a budget of bytes, by policy, and the bytes that they take.

    The policies take turns, each with its response of highest cost among those left, so that all can be compared. The
    first of each is always kept, cut to its share of the budget.

    Returns:
        For each policy: response, text, and how many characters of it are missing.
    """
    kept: list[list[tuple[Response, str, int]]] = [[] for _ in answers]
    used = 0
    for turn in range(max(map(len, answers))):
        for group, choices in zip(answers, kept, strict=True):
            if turn >= len(group):
                continue
            response = group[turn]
            text = response.text
            if turn == 0 and len(text) > budget / len(answers):
                text = text[: int(budget / len(answers))]
            size = len(text.encode())
            if turn and used + size > budget:
                return kept, used
            used += size
            choices.append((response, text, len(response.text) - len(text)))
    return kept, used


def _record(response: Response, text: str, missing: int, threshold: Thresholds) -> list[Any]:
    costs = [None if cost == -math.inf else _or_none(cost) for cost in response.costs]
    return [
        response.sample,
        _or_none(response.cost),
        _or_none(response.reward),
        response.length,
        response.finished,
        int(is_unsafe(response, threshold)),
        text,
        missing,
        *([costs] if costs else []),
    ]


def _rounded(values: np.ndarray) -> list[float | None]:
    return [_or_none(value) for value in values.tolist()]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.5g}")


def _compress(data: Any) -> bytes:
    # Level 9 is hardly slower than 6 on such short streams, and neither holds a time, so that equal input gives
    # equal bytes.
    return zlib.compress(json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(), 9)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
