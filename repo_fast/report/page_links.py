"""Links among the pages and cards of runs, policies and evaluations: relative ones, and only to what is there."""

import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

# Of a run, and of an evaluation, in its folder.
PAGE = "report.html"
# Text, and where it leads.
Link = tuple[str, str]


def link(path: str) -> Link:
    """To a relative path, which is also its text."""
    return path, quote(path, errors="surrogateescape")


def relative_links(paths: Iterable[Path], folder: Path) -> list[Link]:
    """To files, from one in a folder; each once."""
    from_here = (Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix() for path in paths)
    return [link(path) for path in dict.fromkeys(from_here)]


def is_page_of_a_run(path: Path) -> bool:
    """Whether the page of a run is there, not that of an evaluation."""
    return path.is_file() and path.with_name("metrics.jsonl").is_file()
