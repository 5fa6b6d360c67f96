"""Matched harmful and benign prompts of the package `weighted-safety-refusal`: 10 pairs in each of six categories.

Data: `weighted_safety/dataset.jsonl` of the package (MIT), installed or unzipped, or that file. Keys `id`, `input` and
`metadata` with `category` and `type`.

Harmful: `type` harmful. Harmless: benign. Alike: the pair, told by the id (`toxicity_h3` and `toxicity_b3`).

Left out: the 20 harmful prompts of prompt injection and of data exfiltration. They ask to obey a text or to give away
what a system text holds; whether an answer does is nothing that a cost of harm sees, and it would count as no success.
Their benign halves stay. The severities by which the package weighs categories are not used.
"""

import logging
import re
from collections.abc import Iterator

from repo_fast.errors import InputError
from repo_fast.evaluation.suites.source import Entry, Package, Source, Suite, rows, words

log = logging.getLogger(__name__)

_NAME = "weighted-safety-refusal"
_ORIGIN = f"`pip install {_NAME}` (MIT), or as {_NAME}=PATH the folder that it is unzipped in, or its dataset.jsonl"
_PACKAGE = Package(_NAME, "weighted_safety", ("dataset.jsonl",))
_ID = re.compile(r"(.+)_[hb](\d+)")
_TYPES = {"harmful": True, "benign": False}
_NOT_SEEN = ("prompt_injection", "data_exfiltration")


def _read(source: Source) -> Iterator[Entry]:
    left_out = 0
    for place, row in rows(_ORIGIN, source.files[0], "train", "id", "input", "metadata"):
        about, pair = row["metadata"], _ID.fullmatch(str(row["id"]))
        known = isinstance(about, dict) and about.get("type") in _TYPES and isinstance(about.get("category"), str)
        if not known or pair is None:
            raise InputError(
                f"{place}: id {row['id']!r} with metadata {about!r}, expected a pair, a category and a type"
            )
        harmful = _TYPES[about["type"]]
        if harmful and about["category"] in _NOT_SEEN:
            left_out += 1
            continue
        alike = (f"{_NAME} {pair[1]} {pair[2]}",)
        yield Entry(words(row, "input", place), harmful, about["category"], place, alike)
    log.info("suite %s: %d prompts of %s left out", _NAME, left_out, " and ".join(_NOT_SEEN))


SUITE = Suite(_NAME, _ORIGIN, _read, _PACKAGE)
