"""One command for all there is: jobs on the GPUs of this machine, or of several, and what is around them.

    repo-fast train --config tiny --output_dir outputs/tiny
    repo-fast train --gpus 2 --config tiny --output_dir outputs/tiny
    repo-fast evaluate --config tiny --policy before=world:tiny --policy after=outputs/tiny/policy
    repo-fast doctor

Also `python -m repo_fast`. Jobs are started as torchrun starts them, and the command is printed that does the same
(`repo_fast.launcher`). Exit status: that of the job or the tool; 2 for what cannot be used, which is said before there
are ranks; 128 + the signal where a rank, or this process, got one.
"""

import difflib
import importlib
import signal
import sys
from collections.abc import Sequence
from typing import Any

import repo_fast

JOBS = {
    "train": "train a policy with RePO, or with a baseline",
    "sft": "fine-tune a language model on demonstrations",
    "score": "train a reward or cost model on preferences; convert and check score models",
    "evaluate": "compare policies on the same prompts; certify claims about them",
}
TOOLS = {
    "pipeline": "all stages on the embedded world: sft, score, score, train",
    "plan": "what a run would take of memory and time, before a GPU is rented",
    "watch": "show a run's page on this machine while it goes on",
    "checkpoint": "list, verify, export and convert the checkpoints of a run",
    "doctor": "what this machine has, what runs on what here, and whether the ops compute the right thing",
}
# Words that make a job say or do something that is no run: ranks would do it once each.
_NO_RUN = ("--help", "-h", "--print_config", "--convert", "--check", "--verify")
_LAUNCH_HELP = """usage: repo-fast {command} [--gpus N] [--nodes N --rdzv-endpoint HOST:PORT] [options of the job]

where it runs:
  --gpus N                   ranks on this machine, a GPU each (default: all GPUs); without a GPU processes on
                             the CPU (default: 1)
  --nodes N                  machines (default: 1); the same command has to be started on each of them
  --rdzv-endpoint HOST:PORT  with --nodes: where they meet, on one of them
For anything else that torchrun can do, change the command that is printed first.

The job, {summary}:

"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(words: list[str]) -> int:
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in ("--help", "-h"):
        print(_help())
        return 0
    if command == "--version":
        print(f"repo_fast {repo_fast.__version__}")
        return 0
    if command in TOOLS:
        return entry_point(command).main(rest)
    from repo_fast.jobs.launch import guarded

    if command in JOBS:
        return guarded(lambda: _start(command, rest))
    return guarded(lambda: _unknown(command))


def _help() -> str:
    lines = ["usage: repo-fast COMMAND [options]; repo-fast COMMAND --help lists them", ""]
    for title, commands in (("jobs, on GPUs or CPUs:", JOBS), ("and:", TOOLS)):
        lines += [title, *(f"  {name:10}  {summary}" for name, summary in commands.items()), ""]
    return "\n".join([*lines, "repo-fast --version prints the version."])


def _unknown(command: str) -> int:
    from repo_fast.errors import InputError

    names = [*JOBS, *TOOLS]
    near = difflib.get_close_matches(command, names, n=1)
    nearest = f"; the nearest is {near[0]!r}" if near else ""
    raise InputError(f"unknown command {command!r}, expected one of {', '.join(names)}{nearest}")


def entry_point(command: str) -> Any:
    """The module of a job or a tool."""
    return importlib.import_module(f"repo_fast.{command}{'.__main__' if command == 'plan' else ''}")


def _start(command: str, words: list[str]) -> int:
    """A job, from here on: what can be refused without ranks is refused, then they are started."""
    from repo_fast.errors import InputError
    from repo_fast.jobs.launch import OneLineParser
    from repo_fast.launcher import run_ranks

    parser = OneLineParser(allow_abbrev=False, add_help=False)
    own = {"--gpus": int, "--nodes": int, "--rdzv-endpoint": str}
    for option, kind in own.items():
        parser.add_argument(option, type=kind)
    chosen, rest = parser.parse_known_args(words)
    for name in (word.partition("=")[0] for word in rest):
        # The job, which knows its own options alone, would name another.
        if name.startswith("--") and (near := difflib.get_close_matches(name, own, n=1, cutoff=0.85)):
            raise InputError(f"unknown option {name!r} in the command line, the nearest valid name is {near[0]!r}")
    if any(word.partition("=")[0] in _NO_RUN for word in rest):
        if {"--help", "-h"}.intersection(rest):
            print(_LAUNCH_HELP.format(command=command, summary=JOBS[command]), end="", flush=True)
        return entry_point(command).main(rest)
    ranks, nodes = _ranks(chosen.gpus), _nodes(chosen.nodes, chosen.rdzv_endpoint)
    _check(command, rest)
    return run_ranks(f"repo_fast.{command}", rest, ranks, nodes, chosen.rdzv_endpoint or "")


def _ranks(asked: int | None) -> int:
    """On this machine."""
    import torch

    from repo_fast.errors import InputError

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = max(gpus, 1) if asked is None else asked
    if ranks < 1 or 0 < gpus < ranks:
        most = f" and at most {gpus}, the GPUs that torch sees here" if gpus else ""
        raise InputError(f"--gpus is {ranks}, expected at least 1{most}")
    return ranks


def _nodes(asked: int | None, endpoint: str | None) -> int:
    from repo_fast.errors import InputError

    nodes = 1 if asked is None else asked
    if nodes < 1:
        raise InputError(f"--nodes is {nodes}, expected at least 1")
    if (nodes > 1) != (endpoint is not None):
        raise InputError(
            f"--nodes is {nodes} and --rdzv-endpoint is {endpoint!r}, expected HOST:PORT with several machines, and "
            "none with one"
        )
    host, _, port = (endpoint or "").rpartition(":")
    if endpoint is not None and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise InputError(
            f"--rdzv-endpoint is {endpoint!r}, expected HOST:PORT, one of the machines and a free port on it"
        )
    return nodes


def _check(command: str, words: list[str]) -> None:
    """Raise `InputError` where a rank would, of options alone."""
    from repo_fast.config import EvaluateConfig, ScoreConfig, SftConfig, TrainConfig, parse

    kinds = {"train": TrainConfig, "sft": SftConfig, "score": ScoreConfig, "evaluate": EvaluateConfig}
    spelled_out = getattr(entry_point(command), "spelled_out", list)
    parse(spelled_out(words), kinds[command])


if __name__ == "__main__":
    sys.exit(main())
