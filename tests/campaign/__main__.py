"""Run the campaign, or go on with it."""

import argparse
import importlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.campaign.book import Book, Found, Trial, Unavailable
from tests.campaign.report import render

PARTS = ("kills", "storage", "damage", "bad_inputs", "fuzzing", "ranks", "attacks")


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


def main(words: list[str] | None = None) -> int:
    """Returns 1 where a trial failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder of trials.jsonl and campaign.md")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts alone")
    chosen = parser.parse_args(words)
    book = Book(chosen.out)
    for part in chosen.only:
        for trial in importlib.import_module(f"tests.campaign.{part}").trials():
            if not book.has(part, trial.name):
                found = try_out(part, trial)
                book.add(found)
                print(f"{part}: {trial.name}: {found.outcome}: {found.seen}", flush=True)
    (chosen.out / "campaign.md").write_text(render(book))
    failed = [found for found in book.found if found.outcome == "failed"]
    print(f"{len(book.found)} trials, {len(failed)} failed: {chosen.out / 'campaign.md'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
