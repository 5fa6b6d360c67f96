"""How the entry points start: logging, distributed start and end, and errors as one line."""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

# Read when torch is imported. Threads that spin while they wait make a run 30 times slower where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from repo_fast.config import JobConfig, parse  # noqa: E402
from repo_fast.errors import InputError, as_input_error, one_line  # noqa: E402

if TYPE_CHECKING:
    from repo_fast.collectives import Ranks

Config = TypeVar("Config", bound=JobConfig)

_SECONDS_FOR_THE_FIRST = 5


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are `InputError`s, said like all others."""

    def error(self, message: str):
        raise InputError(message)


def launch(
    arguments: Sequence[str] | None, kind: type[Config], prepare: Callable[[Config], Callable[["Ranks"], int]]
) -> int:
    """Run a job from the command line.

    Args:
        arguments: Command-line words; `sys.argv[1:]` by default.
        kind: The configuration of the job.
        prepare: Reads and checks all inputs, without a process group; returns what then runs on every rank and gives
            the exit status.

    Returns:
        The exit status: what the job gives; 2 for input that cannot be used, which is said in one line.
    """

    def run() -> int:
        config = parse(None if arguments is None else list(arguments), kind)
        # After the configuration is known to be good: these take seconds to import.
        from repo_fast.engine import start_distributed, stop_distributed
        from repo_fast.jobs.run_date import as_it_ran, check_date, with_date

        without_bars()
        config = as_it_ran(with_date(config))
        job = prepare(config)
        ranks = start_distributed()
        check_date(config, ranks)
        status = job(ranks)
        stop_distributed()
        return status

    return guarded(run)


def without_bars() -> None:
    """Keep transformers' progress bars out of a run's own display, and out of what is said of bad input."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def guarded(run: Callable[[], int]) -> int:
    """Call `run` with the package's messages shown, on the first rank; bad input, or a disk that fails, is one line and
    the exit status 2."""
    first_on_host = os.environ.get("LOCAL_RANK", "0") == "0"
    if first_on_host:
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        logging.getLogger("repo_fast").setLevel(logging.INFO)
    try:
        return run()
    except Exception as error:
        found = as_input_error(error)
        if found is None:
            raise
        if first_on_host:
            print(f"error: {one_line(found)}", file=sys.stderr, flush=True)
        else:
            # torchrun ends all ranks with the first that goes: the one that says it must not be cut off.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_SECONDS_FOR_THE_FIRST)
        return 2
