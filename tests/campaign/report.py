"""The campaign's results as a page of Markdown."""

import html
import re
import textwrap
from collections import Counter

from bench.measuring.tables import render as table
from tests.campaign.book import PARTS, Book, Found
from tests.job_runs import REPOSITORY

_MARKUP = re.compile(r"([\\`*_{}\[\]|$])")
HEADER = ["", "held", "failed", "not to be tried here", "minutes"]


def render(book: Book) -> str:
    """A summary of the parts, what failed or could not be tried, and every trial."""
    parts = [part for part in PARTS if any(found.part == part for found in book.found)]
    sections = [
        "# The campaign",
        "    make campaign",
        "What a run of a week meets, each tried many times (`tests/campaign/`).",
        table(HEADER, [_summary(book.found, part) for part in parts]),
        *(
            f"- **{odd.part}, {odd.trial}**: {odd.outcome}: {_cell(odd.seen)}"
            for odd in book.found
            if odd.outcome != "held"
        ),
        table(["environment", ""], [[name, str(value)] for name, value in book.about.items()]),
    ]
    for part in parts:
        own = [found for found in book.found if found.part == part]
        # Texts, which stand to the left, and are too long to be padded.
        rows = [["trial", "", "seen"], ["---"] * 3]
        rows += [[_cell(cell) for cell in (found.trial, found.outcome, found.seen)] for found in own]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        sections += [f"## {part.replace('_', ' ').capitalize()}", "\n".join(lines)]
    return "\n\n".join(sections) + "\n"


def _summary(every: list[Found], part: str) -> list[str]:
    own = [found for found in every if found.part == part]
    count = Counter(found.outcome for found in own)
    minutes = sum(found.seconds for found in own) / 60
    return [part, *(str(count[outcome]) for outcome in ("held", "failed", "unavailable")), f"{minutes:.1f}"]


def _cell(text: str) -> str:
    """In one line of a table, with nothing that Markdown would act on."""
    short = textwrap.shorten(text.replace(f"{REPOSITORY}/", ""), 240)
    return _MARKUP.sub(r"\\\1", html.escape(short, quote=False))
