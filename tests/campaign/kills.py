"""kill -9 at random moments: every run goes on, to the bits of one that nothing happened to."""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.campaign.book import Trial
from tests.campaign.runs import (
    BACKGROUND,
    STEPS,
    VLLM,
    Kind,
    Started,
    assert_equal,
    go_on,
    logged_steps,
    newest_step,
    undisturbed,
)


def trials() -> Iterator[Trial]:
    """30 on one rank, 20 on two, 6 with weights handed over to vLLM."""
    for number in range(30):
        options = (BACKGROUND,) if number % 2 else ()
        yield Trial(f"one rank, {number + 1}", partial(_killed, number, Kind(1, options), all_at_once=True))
    for number in range(20):
        options = (BACKGROUND,) if number % 2 else ()
        # Of the machine, or of one rank, whose launcher then ends the other.
        trial = partial(_killed, 100 + number, Kind(2, options), all_at_once=number % 4 < 2)
        yield Trial(f"two ranks, {number + 1}", trial)
    for number in range(6):
        trial = partial(_killed, 200 + number, Kind(1, (VLLM,)), all_at_once=True)
        yield Trial(f"one rank, vLLM, {number + 1}", trial)


def _killed(seed: int, kind: Kind, folder: Path, *, all_at_once: bool) -> str:
    """At a moment between the run's first file and its end."""
    generator, output_dir = random.Random(seed), folder / "run"
    # Before the other, which would go on meanwhile.
    undisturbed(kind)
    run = Started(kind.words(output_dir), output_dir)
    run.until_a_moment_of(STEPS + 1, kind, generator)
    if all_at_once:
        run.kill()
        who = "everything"
    else:
        # It may be over.
        ranks = run.ranks()
        rank = generator.choice(ranks) if ranks else None
        who = "nothing, it had ended" if rank is None else f"rank {rank.environ().get('RANK')}"
        if rank is not None:
            rank.kill()
        run.end()
    seen = f"killed: {who}, {_moment(output_dir, kind)}"
    go_on(kind, output_dir)
    assert_equal(output_dir, kind)
    return f"{seen}; went on to the same bits"


def _moment(output_dir: Path, kind: Kind) -> str:
    """What the folder says of when it was."""
    step, saved = logged_steps(output_dir), newest_step(output_dir)
    writing = sorted(path.name for path in output_dir.rglob("*.partial"))
    where = f"after step {step} of {STEPS}, checkpoint {saved}"
    return where + (f", writing {', '.join(writing)}" if writing else "")
