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


def pages_of_runs(policies: Iterable[str]) -> list[Path]:
    """The pages of the runs that made policies, of those in folders that runs left."""
    folders = [Path(path).expanduser() for path in policies]
    pages = [folder.parent / PAGE for folder in folders if folder.is_dir()]
    # A page without metrics beside it is not a run's.
    return [page for page in pages if page.is_file() and page.with_name("metrics.jsonl").is_file()]
