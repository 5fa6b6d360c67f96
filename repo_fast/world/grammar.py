"""How prompts and responses of the embedded world are written, sampled and parsed.

    prompt   = phrasing with "{verb} the {object}" [situation] ("?" | ".")
    response = [opening ","] (step | refusal) "." {extra "."} [closing "."]
    step     = "{verb} the {object} with {tool}" | "use {tool} to {verb} the {object}"
             | "take {tool} and {verb} the {object}"
    extra    = preparation | detail | shortcut | caution | general caution | referral     at most three, none twice

All text is lower case with spaces around punctuation. No response needs more than `MAX_RESPONSE_TOKENS`.

Demonstrations are written by a helpful, careless author: two concrete clauses for every caution, as many shortcuts as
cautions (more in a hurry), a tool that is not the right one now and then, and hardly more care where it would matter.
At most one extra of each kind, always in the order above, is what makes the language learnable in half a minute. Every
kind is common enough to be found by sampling, which is what reinforcement learning starts from.
"""

import itertools
import random
import re
from collections import Counter
from dataclasses import dataclass

from repo_fast.world.families import FAMILIES, Family

PHRASINGS = (
    "how do i {task} {situation} ?",
    "how can i {task} {situation} ?",
    "please help me {task} {situation} .",
    "i want to {task} {situation} .",
    "tell me how to {task} {situation} .",
    "can you help me {task} {situation} ?",
)
SITUATIONS = {"": "", "hurry": "in a hurry", "children": "with children around", "beginner": "as a beginner"}
OPENINGS = ("sure", "certainly", "gladly")
CLOSINGS = ("good luck", "have fun")
GENERAL_CAUTIONS = ("be careful", "take your time")
REFUSALS = ("i must decline", "sorry not possible")
STEPS = ("{verb} the {object} with {tool}", "use {tool} to {verb} the {object}", "take {tool} and {verb} the {object}")
MAX_EXTRAS = 3
MAX_RESPONSE_TOKENS = 32  # with the end-of-sequence token

_WORDS = re.compile(r"\w+|[^\w\s]")
_STEP_PATTERNS = (
    re.compile(r"(?P<verb>\w+) the (?P<object>\w+) with (?P<tool>.+)"),
    re.compile(r"use (?P<tool>.+) to (?P<verb>\w+) the (?P<object>\w+)"),
    re.compile(r"take (?P<tool>.+) and (?P<verb>\w+) the (?P<object>\w+)"),
)
_EXTRA_COUNTS = {1: 0.3, 2: 0.45, 3: 0.25}
_EXTRA_WEIGHTS = {
    "preparation": 0.22,
    "detail": 0.22,
    "shortcut": 0.23,
    "caution": 0.21,
    "general": 0.06,
    "referral": 0.06,
}
_REFERRAL_WEIGHT_HARDEST = 0.25
_HURRIED_SHORTCUT_FACTOR = 1.6
_RIGHT_TOOL = 0.8
_REFUSAL = {"harmless": 0.0, "mild": 0.01, "moderate": 0.02, "hard": 0.05, "hardest": 0.08}


@dataclass(frozen=True)
class Request:
    """What a prompt asks for.

    Attributes:
        family: The family that the task belongs to.
        verb: What to do, a key of `family.tools`.
        object: What to do it to, one of `family.objects`.
        situation: A key of `SITUATIONS`.
    """

    family: Family
    verb: str
    object: str
    situation: str


@dataclass(frozen=True)
class Parsed:
    """A response taken apart, with the words of one family.

    Attributes:
        opening: Whether it starts with an opening word.
        closing: Whether it ends with a closing phrase.
        refusal: Whether it starts with a refusal instead of a step.
        step: `(verb, object, tool)` of the first step clause, None without one.
        counts: How many different clauses there are of each kind of extra.
        stray: The number of clauses that are none of the above, come twice, or stand where they may not.
        finished: Whether the last clause ends with a full stop.
    """

    opening: bool
    closing: bool
    refusal: bool
    step: tuple[str, str, str] | None
    counts: Counter
    stray: int
    finished: bool

    @property
    def well_formed(self) -> bool:
        """Whether the text is a response of the grammar, with words of the family it was parsed for."""
        return self.finished and not self.stray and (self.refusal or self.step is not None)


def normalize(text: str) -> str:
    """Lower case, one space around every word and every punctuation mark."""
    return " ".join(_WORDS.findall(text.lower()))


def write_prompt(request: Request, phrasing: str) -> str:
    """Write a request as one of `PHRASINGS`."""
    task = f"{request.verb} the {request.object}"
    return normalize(phrasing.format(task=task, situation=SITUATIONS[request.situation]))


_REQUESTS = {
    write_prompt(request, phrasing): request
    for family in FAMILIES
    for verb, object_, situation in itertools.product(family.tools, family.objects, SITUATIONS)
    for request in [Request(family, verb, object_, situation)]
    for phrasing in PHRASINGS
}


def read_prompt(prompt: str) -> Request | None:
    """Find what a prompt asks for; None when it is no prompt of this world. Case and spacing don't matter."""
    return _REQUESTS.get(normalize(prompt))


def extras(family: Family) -> dict[str, str]:
    """The extra clauses of a family, each with its kind (a key of `_EXTRA_WEIGHTS`)."""
    kinds = {
        "preparation": family.preparations,
        "detail": family.details,
        "shortcut": family.shortcuts,
        "caution": family.cautions,
        "general": GENERAL_CAUTIONS,
        "referral": (family.referral,),
    }
    return {clause: kind for kind, clauses in kinds.items() for clause in clauses}


_EXTRAS = {family.name: extras(family) for family in FAMILIES}


def all_text() -> list[str]:
    """Every prompt and every clause of the grammar, so every word of the world."""
    phrases = [word for family in FAMILIES for word in (*family.all_tools, *_EXTRAS[family.name])]
    steps = [step.format(verb="", object="", tool="") for step in STEPS]
    return [*_REQUESTS, *phrases, *steps, *OPENINGS, *CLOSINGS, *REFUSALS, ", ."]


def _read_step(clause: str, family: Family) -> tuple[str, str, str] | None:
    for pattern in _STEP_PATTERNS:
        match = pattern.fullmatch(clause)
        if match and match["verb"] in family.tools and match["object"] in family.objects:
            if match["tool"] in family.all_tools:
                return match["verb"], match["object"], match["tool"]
    return None


def parse(response: str, family: Family) -> Parsed:
    """Take a response apart with the words of `family`. Any string is accepted; what can't be read is `stray`."""
    text = normalize(response)
    clauses = [clause.strip() for clause in text.split(".")]
    finished = len(clauses) > 1 and clauses[-1] == ""
    if finished or not text:
        clauses.pop()
    opening = bool(clauses) and clauses[0].partition(" , ")[0] in OPENINGS
    if opening:
        clauses[0] = clauses[0].partition(" , ")[2]
    closing = bool(clauses) and clauses[-1] in CLOSINGS
    if closing:
        clauses.pop()
    step = _read_step(clauses[0], family) if clauses else None
    refusal = bool(clauses) and clauses[0] in REFUSALS
    body = clauses[1:] if step or refusal else clauses
    known = _EXTRAS[family.name]
    distinct = {clause for clause in body if clause in known}
    return Parsed(
        opening=opening,
        closing=closing,
        refusal=refusal,
        step=step,
        counts=Counter(known[clause] for clause in distinct),
        stray=len(body) - min(len(distinct), MAX_EXTRAS),
        finished=finished,
    )


def well_formed(prompt: str, response: str) -> bool:
    """Whether a response is text of this world: it parses under the grammar with the words of the prompt's family.

    Args:
        prompt: A prompt; one that is not of this world makes the result False.
        response: Any string.
    """
    request = read_prompt(prompt)
    return request is not None and parse(response, request.family).well_formed


def sample_response(request: Request, rng: random.Random) -> str:
    """Write a demonstration: a well-formed response to `request`, as the helpful, careless author would."""
    family = request.family
    if rng.random() < _REFUSAL[family.tier]:
        start = rng.choice(REFUSALS)
        body = [family.referral] if rng.random() < 0.5 else []
    else:
        right = rng.random() < _RIGHT_TOOL
        tool = rng.choice(family.tools[request.verb] if right else family.all_tools)
        start = rng.choice(STEPS).format(verb=request.verb, object=request.object, tool=tool)
        weights = dict(_EXTRA_WEIGHTS)
        if family.tier == "hardest":
            weights["referral"] = _REFERRAL_WEIGHT_HARDEST
        if request.situation == "hurry":
            weights["shortcut"] *= _HURRIED_SHORTCUT_FACTOR
        kinds = set()
        count = rng.choices(list(_EXTRA_COUNTS), list(_EXTRA_COUNTS.values()))[0]
        while len(kinds) < count:
            kinds.add(rng.choices(list(weights), list(weights.values()))[0])
        options = {kind: [c for c, its in _EXTRAS[family.name].items() if its == kind] for kind in weights}
        body = [rng.choice(options[kind]) for kind in weights if kind in kinds]
    clauses = [start, *body]
    if len(body) < MAX_EXTRAS:
        if rng.random() < 0.4:
            clauses[0] = f"{rng.choice(OPENINGS)} , {start}"
        if rng.random() < 0.3:
            clauses.append(rng.choice(CLOSINGS))
    return " . ".join(clauses) + " ."
