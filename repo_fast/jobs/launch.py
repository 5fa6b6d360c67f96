"""How the entry points start: logging, distributed start and end, and errors as one line."""

import argparse
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

# Read when torch is imported. Threads that spin while they wait make a run 30 times slower where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from repo_fast.config import JobConfig, parse  # noqa: E402
from repo_fast.errors import InputError, RankError, as_input_error, first_line, one_line, where  # noqa: E402
from repo_fast.jobs.parent import end_with_launcher  # noqa: E402
from repo_fast.report.progress import printable  # noqa: E402

if TYPE_CHECKING:
    from repo_fast.collectives import Ranks

Config = TypeVar("Config", bound=JobConfig)

_log = logging.getLogger(__name__)
_SECONDS_FOR_THE_FIRST = 5
# Python's, torch's on a CPU, CUDA's, and the operating system's.
_OUT_OF_MEMORY = re.compile(
    r"^MemoryError|^OutOfMemoryError|out of memory|can't allocate memory|Cannot allocate memory"
)


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
        end_with_launcher()
        config = parse(None if arguments is None else list(arguments), kind)
        # After the configuration is known to be good: these take seconds to import.
        from repo_fast.engine import start_distributed, stop_distributed
        from repo_fast.jobs.agreement import check_same_options
        from repo_fast.jobs.run_date import as_it_ran, with_date

        quiet_libraries()
        words = sys.argv[1:] if arguments is None else arguments
        if kind.DEFAULT is not None and not any(word.partition("=")[0] == "--config" for word in words):
            _log.info("no --config is given: all that the command line does not say is as in %r", kind.DEFAULT)
        config = as_it_ran(with_date(config))
        job = prepare(config)
        ranks = start_distributed(config.timeout)
        with ranks.accounted_for():
            check_same_options(config, ranks)
            status = job(ranks)
        stop_distributed()
        return status

    return guarded(run)


def quiet_libraries() -> None:
    """Keep out of what runs and tools say what others say of themselves, or a second time."""
    import torch
    from transformers.utils import logging as transformers_logging

    # A run has its own display.
    transformers_logging.disable_progress_bar()
    # It has said it by a handler of its own.
    logging.getLogger("huggingface_hub").propagate = False
    # That 4-bit products are slow on a CPU, wherever there are adapters: nothing here calls them.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # DeepSpeed, which transformers imports where it is installed, would say that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def guarded(run: Callable[[], int]) -> int:
    """Call `run` with the package's messages shown, on the first rank; bad input, or a disk that fails, is one line and
    the exit status 2.

    One line, and the status 1, is also what there is to say where a rank has no memory left, or others lost it.
    """
    first_on_host = os.environ.get("LOCAL_RANK", "0") == "0"
    rank = os.environ.get("RANK", "0")
    if first_on_host:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(_Printable("%(message)s"))
        logging.basicConfig(handlers=[handler])
        logging.getLogger("repo_fast").setLevel(logging.INFO)
    try:
        return run()
    except RankError as error:
        if rank == str(error.by):
            _say(error)
        return 1
    except Exception as error:
        found = as_input_error(error)
        if found is None:
            if not _OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"):
                raise
            _say(f"rank {rank} ran out of memory{where(error)}: {first_line(error)}")
            return 1
        if first_on_host:
            _say(found)
        else:
            # torchrun ends all ranks with the first that goes: the one that says it must not be cut off.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_SECONDS_FOR_THE_FIRST)
        return 2


class _Printable(logging.Formatter):
    """Messages alone, without what a terminal would act on."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _say(said: object) -> None:
    print(f"error: {one_line(said)}", file=sys.stderr, flush=True)
