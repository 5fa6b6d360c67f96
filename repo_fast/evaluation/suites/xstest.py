"""XSTest (Röttger et al. 2024, arXiv 2308.01263): safe prompts that look unsafe, and unsafe ones that contrast them.

Data: `xstest_prompts.csv` of github.com/paul-rottger/xstest, or its older form `xstest_v2_prompts.csv`, CC BY 4.0;
without a file its authors' Paul/XSTest on the hub. Columns `id` or `id_v2`, `type` and `prompt`.

Harmless: 250 of ten types. Harmful: 200 of eight types, called `contrast_...`. Category: the type.

Alike: the two prompts of a contrast pair. Each type is a block of 25 in the order of the ids, and the n-th of a type
and of its contrast are a pair: `focus` says so, where both have it. Of the contrasts of discrimination the pair is the
one about the same group (`real_group_nons_discr`), of those of privacy the one about the same datum
(`privacy_fictional`); `nons_group_real_discr` and `privacy_public` have no pair that the file would tell, and their
prompts stand alone.

Left out: nothing, and another type than these is an error. The completions that some copies have, and their
annotations, are not read.
"""

import re
from collections.abc import Iterator

from repo_fast.errors import InputError
from repo_fast.evaluation.suites.source import Entry, Source, Suite, rows, words

_NAME = "xstest"
_ORIGIN = "xstest_prompts.csv from github.com/paul-rottger/xstest (CC BY 4.0) as xstest=PATH, or the hub's Paul/XSTest"
_CONTRAST, _BLOCK = "contrast_", 25
_HARMLESS = (
    *("homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions", "real_group_nons_discr"),
    *("nons_group_real_discr", "historical_events", "privacy_public", "privacy_fictional"),
)
_HARMFUL = tuple(
    f"{_CONTRAST}{kind}"
    for kind in (
        *("homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions", "discr"),
        *("historical_events", "privacy"),
    )
)
_NUMBER = re.compile(r"\d+$")
# What a contrast is of, where its name is not that of the safe type.
_SAFE_TYPES = {"discr": "real_group_nons_discr", "privacy": "privacy_fictional"}
_LABELS = {"safe": False, "unsafe": True}


def _read(source: Source) -> Iterator[Entry]:
    for place, row in rows(_ORIGIN, source.files[0], "train", "type", "prompt"):
        kind = words(row, "type", place)
        harmful = kind in _HARMFUL
        if not harmful and kind not in _HARMLESS:
            raise InputError(f"{place}: type is {kind!r}, expected one of {', '.join((*_HARMLESS, *_HARMFUL))}")
        if row.get("label") is not None and _LABELS.get(row["label"]) != harmful:
            raise InputError(f"{place}: label is {row['label']!r} with the type {kind!r}, expected what the type says")
        number = _NUMBER.search(str(row.get("id_v2") or row.get("id") or ""))
        if number is None:
            raise InputError(f"{place}: no number in 'id_v2' or 'id', expected one: it tells the contrast pairs")
        safe = kind.removeprefix(_CONTRAST)
        pair = f"{_NAME} {_SAFE_TYPES.get(safe, safe) if harmful else kind} {(int(number[0]) - 1) % _BLOCK}"
        yield Entry(words(row, "prompt", place), harmful, kind, place, (pair,))


SUITE = Suite(_NAME, _ORIGIN, _read, hub="Paul/XSTest")
