"""Run the campaign, or go on with it."""

import argparse
import importlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.campaign.book import PARTS, Book, Found, Trial, Unavailable
from tests.campaign.report import render


def try_out(part: str, trial: Trial) -> Found:
    """In a folder of its own, which is gone after it."""
    folder, started = Path(tempfile.mkdtemp(prefix=f"campaign-{part}-")), time.monotonic()
    try:
        outcome, seen = "held", trial.run(folder)
    except Unavailable as reason:
        outcome, seen = "unavailable", str(reason)
    except Exception as error:
        # Whatever it is, the other trials go on.
        outcome, seen = "failed", f"{type(error).__name__}: {error}"[:2000]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Found(part, trial.name, outcome, seen, round(time.monotonic() - started, 1))


def try_part(part: str, book: Book) -> None:
    for trial in left(part, book):
        found = try_out(part, trial)
        book.add(found)
        print(f"{part}: {trial.name}: {found.outcome}: {found.seen}", flush=True)


def left(part: str, book: Book) -> list[Trial]:
    """The trials that are not in the book."""
    trials = importlib.import_module(f"tests.campaign.{part}").trials()
    return [trial for trial in trials if not book.has(part, trial.name)]


def try_parts(parts: Sequence[str], folder: Path, jobs: int) -> None:
    """Each in a process of its own: what one mounts or forks is not another's."""
    command = [sys.executable, "-m", "tests.campaign", "--out", str(folder), "--only"]
    with ThreadPoolExecutor(jobs) as pool:
        # What became of each is in the book.
        list(pool.map(lambda part: subprocess.run([*command, part], check=False), parts))


def main(words: list[str] | None = None) -> int:
    """Returns 1 where a trial failed, or is left."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder of trials.jsonl and campaign.md")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts alone")
    parser.add_argument("--jobs", type=int, default=2, help="parts at once; most trials use one core")
    chosen = parser.parse_args(words)
    book = Book(chosen.out)
    if len(chosen.only) == 1:
        try_part(chosen.only[0], book)
    else:
        try_parts(chosen.only, chosen.out, chosen.jobs)
        book = Book(chosen.out)
    (chosen.out / "campaign.md").write_text(render(book))
    failed = [found for found in book.found if found.outcome == "failed"]
    untried = [trial for part in chosen.only for trial in left(part, book)]
    print(f"{len(book.found)} trials, {len(failed)} failed, {len(untried)} left: {chosen.out / 'campaign.md'}")
    return int(bool(failed or untried))


if __name__ == "__main__":
    sys.exit(main())
