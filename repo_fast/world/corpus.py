"""Prompts and demonstrations of the embedded world, generated from its grammar.

In each family four of the twenty (verb, object) pairs are held out: test prompts use only those, training prompts and
demonstrations only the others. A test prompt therefore always combines known words in a way never seen before, by the
supervised stage or by reinforcement learning.
"""

import itertools
import random
from functools import cache

from repo_fast.world.families import FAMILIES, Family
from repo_fast.world.grammar import PHRASINGS, SITUATIONS, Request, sample_response, write_prompt

TRAIN_PROMPTS_PER_FAMILY = 20
TEST_PROMPTS_PER_FAMILY = 8
_SEED = 20241019


def _held_out(family: Family, verb: str, object_: str) -> bool:
    verbs = list(family.tools)
    return verbs.index(verb) == family.objects.index(object_)


def _draw(held_out: bool, per_family: int) -> list[dict[str, str]]:
    rng = random.Random(_SEED + held_out)
    rows = []
    for family in FAMILIES:
        pairs = [p for p in itertools.product(family.tools, family.objects) if _held_out(family, *p) == held_out]
        options = [
            write_prompt(Request(family, verb, object_, situation), phrasing)
            for (verb, object_), situation, phrasing in itertools.product(pairs, SITUATIONS, PHRASINGS)
        ]
        rows += [{"prompt": prompt, "category": family.name} for prompt in rng.sample(options, per_family)]
    rng.shuffle(rows)
    return rows


@cache
def _prompts(held_out: bool) -> tuple[dict[str, str], ...]:
    return tuple(_draw(held_out, TEST_PROMPTS_PER_FAMILY if held_out else TRAIN_PROMPTS_PER_FAMILY))


def train_prompts() -> list[dict[str, str]]:
    """The training prompts, all different: dicts with `prompt` and `category` (the family's name)."""
    return [dict(row) for row in _prompts(False)]


def test_prompts() -> list[dict[str, str]]:
    """The held-out prompts, all different: dicts with `prompt` and `category` (the family's name)."""
    return [dict(row) for row in _prompts(True)]


def demonstrations(n: int, seed: int) -> list[dict[str, str]]:
    """Sample demonstrations for supervised training, on any prompt of the grammar but the held-out pairs.

    Args:
        n: How many.
        seed: Of the sampling; the same seed gives the same list on every platform.

    Returns:
        Dicts with `prompt` and `response`.
    """
    rng = random.Random(seed)
    rows = []
    while len(rows) < n:
        family = rng.choice(FAMILIES)
        verb, object_ = rng.choice(list(family.tools)), rng.choice(family.objects)
        if _held_out(family, verb, object_):
            continue
        request = Request(family, verb, object_, rng.choice(list(SITUATIONS)))
        prompt = write_prompt(request, rng.choice(PHRASINGS))
        rows.append({"prompt": prompt, "response": sample_response(request, rng)})
    return rows
