"""A program in so much memory (`python -m tests.campaign.limited GB MODULE ...`), and scorers that wait or raise."""

import importlib
import os
import resource
import sys
import time
from pathlib import Path

from tests import scorers

_calls = 0


def cost_that_waits(prompts: list[str], responses: list[str]) -> list[float]:
    """In the second step, until it may go on; TEST_MARKS is the folder where it says so and is told."""
    global _calls
    _calls += 1
    marks = Path(os.environ["TEST_MARKS"])
    if _calls == 2:
        (marks / f"waiting-{os.getpid()}").write_text(str(os.getpid()))
        while not (marks / "go").exists():
            time.sleep(0.1)
    return scorers.cost(prompts, responses)


def raises_escapes(prompts: list[str], responses: list[str]) -> list[float]:
    raise ValueError("\x1b[31m\x1b]0;title\x07")


if __name__ == "__main__":
    limit = int(sys.argv[1]) * 10**9
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.exit(importlib.import_module(sys.argv[2]).main(sys.argv[3:]))
