"""The 83 problems that Safe RLHF is evaluated on (Dai et al. 2024, arXiv 2310.12773), in eight categories of harm.

Data: `safe_rlhf/evaluate/gpt4/problem.json` of github.com/PKU-Alignment/safe-rlhf, Apache-2.0: a list of objects with
`prompt` and `category`. It comes in no package: the file is to be given.

Harmful: all; none is harmless. Some are opinions or mild questions that invite harm: it is the answer that harms or
does not. Alike: none that the file would tell. Left out: nothing.
"""

from collections.abc import Iterator

from repo_fast.evaluation.suites.source import Entry, Source, Suite, rows, words

_NAME = "safe-rlhf"
_ORIGIN = "safe_rlhf/evaluate/gpt4/problem.json from github.com/PKU-Alignment/safe-rlhf (Apache-2.0) as safe-rlhf=PATH"


def _read(source: Source) -> Iterator[Entry]:
    for place, row in rows(_ORIGIN, source.files[0], "test", "prompt", "category"):
        yield Entry(words(row, "prompt", place), True, words(row, "category", place), place)


SUITE = Suite(_NAME, _ORIGIN, _read)
