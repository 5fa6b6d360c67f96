"""Prompts, demonstrations and preferences of the embedded world, generated from its grammar.

In each family four of the twenty (verb, object) pairs are held out: what is for testing uses only those, what is for
training only the others. A test prompt therefore always combines known words in a way never seen before, by the
supervised stage, by the reward and cost models, or by reinforcement learning.

Preferences compare more than demonstrations show. The careless author's are seldom safe where it matters, and seldom
unsafe where it does not, so some responses are edited by somebody careful, some by somebody reckless. And a policy
leaves the grammar as soon as that pays, so three in ten are damaged, in the ways that a model writes badly: reward and
cost models learn what such text is worth.
"""

import itertools
import math
import random
from collections.abc import Sequence
from functools import cache

from repo_fast.world import rules
from repo_fast.world.families import FAMILIES, Family
from repo_fast.world.grammar import (
    CLOSINGS,
    MAX_EXTRAS,
    MAX_RESPONSE_TOKENS,
    OPENINGS,
    PHRASINGS,
    REFUSALS,
    SITUATIONS,
    STEPS,
    Request,
    extras,
    sample_response,
    write_prompt,
)

TRAIN_PROMPTS_PER_FAMILY = 20
TEST_PROMPTS_PER_FAMILY = 8
CERTIFY_PROMPTS_PER_FAMILY = 24
_SEED = 20241019
_CAREFUL, _RECKLESS, _REFUSED, _DAMAGED = 0.25, 0.37, 0.15, 0.2
# What a labeller would see: responses closer than this in reward, or in cost, are not compared.
_VISIBLE = 0.25
_HAZARDS, _PROTECTIONS = ("preparation", "detail", "shortcut"), ("caution", "general", "referral")
_EXTRAS = {family.name: extras(family) for family in FAMILIES}


def _held_out(family: Family, verb: str, object_: str) -> bool:
    verbs = list(family.tools)
    return verbs.index(verb) == family.objects.index(object_)


def _draw(held_out: bool, per_family: int, seed: int, taken: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    rng = random.Random(seed)
    rows = []
    for family in FAMILIES:
        pairs = [p for p in itertools.product(family.tools, family.objects) if _held_out(family, *p) == held_out]
        options = [
            write_prompt(Request(family, verb, object_, situation), phrasing)
            for (verb, object_), situation, phrasing in itertools.product(pairs, SITUATIONS, PHRASINGS)
        ]
        left = [prompt for prompt in options if prompt not in taken]
        rows += [{"prompt": prompt, "category": family.name} for prompt in rng.sample(left, per_family)]
    rng.shuffle(rows)
    return rows


@cache
def _prompts(split: str) -> tuple[dict[str, str], ...]:
    match split:
        case "train":
            return tuple(_draw(False, TRAIN_PROMPTS_PER_FAMILY, _SEED))
        case "test":
            return tuple(_draw(True, TEST_PROMPTS_PER_FAMILY, _SEED + 1))
        case _:
            taken = frozenset(row["prompt"] for row in _prompts("test"))
            return tuple(_draw(True, CERTIFY_PROMPTS_PER_FAMILY, _SEED + 2, taken))


def train_prompts() -> list[dict[str, str]]:
    """The training prompts, all different: dicts with `prompt` and `category` (the family's name)."""
    return [dict(row) for row in _prompts("train")]


def test_prompts() -> list[dict[str, str]]:
    """The held-out prompts, all different: dicts with `prompt` and `category` (the family's name)."""
    return [dict(row) for row in _prompts("test")]


def certify_prompts() -> list[dict[str, str]]:
    """Held-out prompts that the test prompts have none of, to certify policies on: dicts as those."""
    return [dict(row) for row in _prompts("certify")]


def _draw_request(rng: random.Random, held_out: bool) -> Request:
    while True:
        family = rng.choice(FAMILIES)
        verb, object_ = rng.choice(list(family.tools)), rng.choice(family.objects)
        if _held_out(family, verb, object_) == held_out:
            return Request(family, verb, object_, rng.choice(list(SITUATIONS)))


def demonstrations(n: int, seed: int, held_out: bool = False) -> list[dict[str, str]]:
    """Sample demonstrations for supervised training.

    Args:
        n: How many.
        seed: Of the sampling; the same seed gives the same list on every platform.
        held_out: Whether to use the held-out pairs, and only those; or any other prompt of the grammar.

    Returns:
        Dicts with `prompt` and `response`.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        request = _draw_request(rng, held_out)
        prompt = write_prompt(request, rng.choice(PHRASINGS))
        rows.append({"prompt": prompt, "response": sample_response(request, rng)})
    return rows


def preferences(n: int, seed: int, held_out: bool) -> list[dict[str, str | int | bool]]:
    """Sample pairs of responses, with the labels that `repo_fast.world.rules` gives them.

    Args:
        n: How many.
        seed: Of the sampling; the same seed gives the same list on every platform.
        held_out: Whether to use the held-out pairs of verb and object, and only those; or any other prompt.

    Returns:
        Dicts with the fields of PKU-SafeRLHF: `prompt`, `response_0`, `response_1`, `better_response_id` (the higher
        reward), `safer_response_id` (the lower cost), `is_response_0_safe`, `is_response_1_safe` (cost <= 0),
        `response_0_severity_level`, `response_1_severity_level` (the cost rounded up, 0 where it is safe; at most 3).
        The two responses differ by at least 0.25 in reward and in cost.
    """
    rng = random.Random(seed)
    rows: list[dict[str, str | int | bool]] = []
    while len(rows) < n:
        request = _draw_request(rng, held_out)
        prompt = write_prompt(request, rng.choice(PHRASINGS))
        responses = [_sample_varied(request, rng) for _ in range(2)]
        rewards, costs = rules.reward([prompt] * 2, responses), rules.cost([prompt] * 2, responses)
        if any(abs(first - second) < _VISIBLE for first, second in (rewards, costs)):
            continue
        rows.append(
            {
                "prompt": prompt,
                "response_0": responses[0],
                "response_1": responses[1],
                "better_response_id": int(rewards[1] > rewards[0]),
                "safer_response_id": int(costs[1] < costs[0]),
                "is_response_0_safe": costs[0] <= 0,
                "is_response_1_safe": costs[1] <= 0,
                "response_0_severity_level": max(0, math.ceil(costs[0])),
                "response_1_severity_level": max(0, math.ceil(costs[1])),
            }
        )
    return rows


def _sample_varied(request: Request, rng: random.Random) -> str:
    """A response of the careless author, edited by a careful or a reckless one or not at all, then damaged or not."""
    response = sample_response(request, rng)
    family, editor = request.family, rng.random()
    if editor < _CAREFUL:
        hazards = _HAZARDS if family.tier == "hardest" else ("shortcut",)
        referred = family.tier == "hardest" and rng.random() < 0.7
        refused = [rng.choice(REFUSALS), *([family.referral] if rng.random() < 0.5 else [])]
        careful = _edit(response, family, hazards, _PROTECTIONS, rng, always=[family.referral] if referred else [])
        response = _join(refused) if rng.random() < _REFUSED else careful
    elif editor < _CAREFUL + _RECKLESS:
        response = _edit(response, family, _PROTECTIONS, ("shortcut",), rng)
    return _damage(response, request, rng) if rng.random() < _DAMAGED else response


def _edit(
    response: str,
    family: Family,
    out: Sequence[str],
    into: Sequence[str],
    rng: random.Random,
    always: Sequence[str] = (),
) -> str:
    """The same beginning, with one or two clauses of the kinds `into`, `always` first, and mostly none of `out`."""
    kinds = _EXTRAS[family.name]
    start, *rest = _clauses(response)
    count = rng.randint(1, 2)
    added = [*always, *rng.sample([clause for clause, kind in kinds.items() if kind in into], count)][:count]
    kept = [clause for clause in rest if clause in kinds and (kinds[clause] not in out or rng.random() < 0.2)]
    body = sorted({*added, *kept[: MAX_EXTRAS - count]}, key=list(kinds).index)
    closing = [clause for clause in rest if clause in CLOSINGS and len(body) < MAX_EXTRAS]
    return _join([start, *body, *closing])


def _damage(response: str, request: Request, rng: random.Random) -> str:
    """A response spoilt in one way, never blank and not longer than a response can be."""
    clauses = _clauses(response)
    place = rng.randrange(len(clauses))
    own, other = request.family, rng.choice([family for family in FAMILIES if family is not request.family])
    match rng.choice(_DAMAGES):
        case "repeated clause":
            clauses.insert(place, clauses[place])
        case "foreign clause":
            clauses.insert(place + 1, rng.choice(list(_EXTRAS[other.name])))
        case "foreign answer":
            verb, object_ = rng.choice(list(other.tools)), rng.choice(other.objects)
            clauses = _clauses(sample_response(Request(other, verb, object_, request.situation), rng))
        case "wrong step":
            verb, object_ = rng.choice(list(own.tools)), rng.choice(own.objects)
            clauses[0] = rng.choice(STEPS).format(verb=verb, object=object_, tool=rng.choice(own.all_tools))
        case "no step":
            clauses = clauses[1:] or [rng.choice(list(_EXTRAS[own.name]))]
        case "next to nothing":
            clauses = [rng.choice(["", *OPENINGS, *CLOSINGS, request.verb, f"the {request.object}"])]
        case "everything":
            more = [clause for clause in _EXTRAS[own.name] if clause not in clauses]
            clauses += rng.sample(more, rng.randint(2, len(more)))
        case "run into each other":
            clauses = [*clauses[:place], " ".join(clauses[place : place + 2]), *clauses[place + 2 :]]
        case "shuffled words":
            words = _join(clauses).split()
            rng.shuffle(words)
            return " ".join(words)
        case "no full stop":
            return _join(clauses).removesuffix(" .")
        case "cut":
            words = _join(clauses).split()
            return " ".join(words[: rng.randrange(1, len(words))])
    return " ".join(_join(clauses).split()[: MAX_RESPONSE_TOKENS - 1])


_DAMAGES = (
    "repeated clause",
    "foreign clause",
    "foreign answer",
    "wrong step",
    "no step",
    "next to nothing",
    "everything",
    "run into each other",
    "shuffled words",
    "no full stop",
    "cut",
)


def _clauses(response: str) -> list[str]:
    return response.removesuffix(" .").split(" . ")


def _join(clauses: list[str]) -> str:
    return " . ".join(clauses) + " ."
