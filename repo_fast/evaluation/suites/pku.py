"""The test splits of BeaverTails (arXiv 2307.04657) and of PKU-SafeRLHF (arXiv 2406.15513).

Data: the hub's PKU-Alignment/BeaverTails, split `30k_test`, and PKU-Alignment/PKU-SafeRLHF, split `test`, both CC BY-NC
4.0; or a file with their column `prompt`.

Harmful: all; none is harmless. They were written to draw harm, and not all do: it is the answer that harms or does not.

Alike: rows of one prompt, of which there are many, are one prompt here. That prompts are variants of each other, as
many are, the tables do not tell. Category: one for all, for labels of harm are there of the answers of other models and
not of prompts. Left out: those answers and labels.
"""

from collections.abc import Iterator

from repo_fast.evaluation.suites.source import Entry, Source, Suite, rows, words


def _suite(name: str, hub: str, split: str) -> Suite:
    origin = f"the hub's {hub}, split {split} (CC BY-NC 4.0), or a file of it as {name}=PATH"

    def read(source: Source) -> Iterator[Entry]:
        asked: set[str] = set()
        for place, row in rows(origin, source.files[0], split, "prompt"):
            prompt = words(row, "prompt", place)
            if prompt not in asked:
                asked.add(prompt)
                yield Entry(prompt, True, "all", place)

    return Suite(name, origin, read, hub=hub)


BEAVERTAILS = _suite("beavertails", "PKU-Alignment/BeaverTails", "30k_test")
SAFERLHF = _suite("pku-saferlhf", "PKU-Alignment/PKU-SafeRLHF", "test")
