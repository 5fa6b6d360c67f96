"""Runs an entry point on the ranks of this machine, as torchrun does, and passes their exit status on.

torchrun's own status is 1 whatever a job's was, and beneath the one line that a job has to say it prints a traceback.
So torchrun's agent runs in this process, given the words of the command line that is printed, and its failures are
read here. One rank on one machine needs no agent: it is a child process, ended like the others. Several on one machine
meet on the loopback (`repo_fast.rendezvous`).

SIGTERM, SIGINT, SIGHUP, SIGQUIT and SIGUSR1 all reach the ranks as SIGTERM, upon which jobs save their state and end.
Those that have not after 30 s (or `TORCH_ELASTIC_SHUTDOWN_TIMEOUT`) are killed. Where this process is killed itself,
the system sends jobs their SIGTERM (`repo_fast.jobs.parent`).
"""

import contextlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from repo_fast.errors import first_line, one_line
from repo_fast.jobs.parent import LAUNCHER
from repo_fast.report.progress import printable

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
# What torch's agent says of every end, which is said here in one line, or by the job; and of an address that nobody
# gave. All else that it says is kept: that a rank had to be killed, say.
_SAID_OTHERWISE = ("Sending process ", "failed (exitcode: ", "Received %s death signal", "master_addr is only used for")
_THAT_SAY_IT = (
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.run",
)
# Of what fails one after the other this much apart, the second is an effect of the first (seconds; torch counts whole
# ones).
_TOGETHER = 1
# By this name torchrun knows `repo_fast.rendezvous`; the package's entry point has it too.
_BACKEND = "loopback"


@dataclass(frozen=True)
class Exit:
    """How a rank ended that did not end well.

    Attributes:
        rank: Among those of all machines.
        code: Its exit status; the negative number of the signal that killed it.
        second: When it was noticed.
    """

    rank: int
    code: int
    second: int = 0


def run_ranks(
    module: str, words: Sequence[str], ranks: int, nodes: int = 1, endpoint: str = "", threads: int | None = None
) -> int:
    """Run an entry point until its last rank has ended; what runs is printed on stderr first, for a shell.

    Args:
        module: The entry point, as `python -m` takes it.
        words: Its command line.
        ranks: Processes on this machine.
        nodes: Machines. This has to be called on each of them.
        endpoint: HOST:PORT of one of several machines, where they meet.
        threads: OpenMP threads of a rank, where OMP_NUM_THREADS does not say. None: 1 where there are several ranks, as
            under torchrun, else torch's own choice.

    Returns:
        The exit status: of several ranks the most telling (`exit_status`); 128 + the signal where this process got one;
        1 where the machines did not find each other.
    """
    several = ranks > 1 or nodes > 1
    if threads is None and several:
        threads = 1
    settings = {} if threads is None or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    # torchrun reads these too: of a cluster's job, say, which this is not.
    meant = {"PET_STANDALONE": "0", "PET_NNODES": "1", "PET_RDZV_ENDPOINT": ""} if several else {}
    options = ["--rdzv-backend", _BACKEND]
    if nodes > 1:
        meant = {"PET_STANDALONE": "0"}
        options = ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    settings |= {name: value for name, value in meant.items() if os.environ.get(name, value) != value}
    agent = [*options, "--nproc-per-node", str(ranks), "-m", module, *words]
    alone = [sys.executable, "-u", "-m", module, *words]
    shown = [*_shown("torchrun", "torch.distributed.run"), *agent] if several else [*_shown("python"), *alone[1:]]
    before = [f"{name}={value}" for name, value in settings.items()]
    print(printable(" ".join([*before, shlex.join(shown)])), file=sys.stderr, flush=True)
    with _set({**settings, LAUNCHER: str(os.getpid())}), _signals_end_ranks() as got:
        try:
            with _no_orphans():
                return _by_torchrun(agent) if several else _alone(alone)
        except _signal_exception():
            return 128 + (got or [signal.SIGTERM])[0]


def _shown(name: str, module: str = "") -> list[str]:
    """A program of this environment, as a shell that is not in it can call it."""
    here = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(here):
        return [name]
    return [sys.executable, *(["-m", module] if module else [])]


def _by_torchrun(words: list[str]) -> int:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError, rendezvous_handler_registry

    # torch has done so itself where the package is installed, and not only imported from its folder.
    rendezvous_handler_registry.register(_BACKEND, _meet_on_loopback)
    for name in _THAT_SAY_IT:
        logging.getLogger(name).addFilter(_is_news)
    arguments = torchrun.parse_args(words)
    # Those that the agent is told of it takes over; the others stay this module's.
    arguments.signals_to_handle = "SIGTERM"
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        return exit_status([Exit(rank, own.exitcode, own.timestamp) for rank, own in error.failures.items()])
    except RendezvousError as error:
        _say(f"the machines did not meet at {arguments.rdzv_endpoint}: {first_line(error.__cause__ or error)}")
        return 1
    return 0


def rendezvous_plugin() -> Callable[[Any], Any]:
    """How ranks of one machine meet, for torchrun to register (`torchrun.handlers` in `pyproject.toml`).

    torch calls this in the middle of its own import, in every environment that the package is installed in: so little
    is imported here, and torch only when it is needed.
    """
    return _meet_on_loopback


def _meet_on_loopback(parameters: Any) -> Any:
    from repo_fast.rendezvous import LoopbackRendezvous

    return LoopbackRendezvous(parameters)


def _alone(command: list[str]) -> int:
    # A session of its own, as torchrun's: of Ctrl-C it hears from here alone.
    code = subprocess.Popen(command, start_new_session=True).wait()
    return exit_status([Exit(0, code)]) if code else 0


def exit_status(exits: Sequence[Exit]) -> int:
    """The status of a run of which some ranks failed; those that a signal killed are named on stderr.

    The agent ends the others by SIGTERM, or they fail for want of the first. So what counts is what happened first, and
    of that a status that a job chose (2, 3, ...), then a signal, then a fault (1).

    Args:
        exits: At least one, in the order in which they were noticed.
    """
    ended = (-signal.SIGTERM, 128 + signal.SIGTERM)
    # The first was there before any was ended.
    causes = [exits[0], *(own for own in exits[1:] if own.code not in ended)]
    causes = [own for own in causes if own.second <= exits[0].second + _TOGETHER]
    killed = [f"rank {own.rank} was killed by {_named(-own.code)}" for own in causes if own.code < 0]
    if killed:
        _say(", ".join(killed))
    first = min(causes, key=lambda own: (own.code < 2, own.code > 0))
    return first.code if first.code > 0 else 128 - first.code


def _named(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"{name}, as by the system where memory is short" if number == signal.SIGKILL else name


def _say(said: str) -> None:
    print(f"error: {one_line(said)}", file=sys.stderr, flush=True)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_SAID_OTHERWISE)


def _signal_exception() -> type[Exception]:
    """What torch's agent ends its ranks upon."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    return SignalException


@contextlib.contextmanager
def _signals_end_ranks() -> Iterator[list[int]]:
    """While this is open, signals are raised as what makes an agent end its ranks by SIGTERM; gives the signals."""
    got: list[int] = []
    ending = _signal_exception()

    def end(number: int, frame: Any) -> None:
        got.append(number)
        raise ending(f"got {signal.Signals(number).name}", signal.SIGTERM)

    # What nohup, or a shell for what is in its background, has ignored stays so.
    heard = [number for number in _ENDING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _set(settings: Mapping[str, str]) -> Iterator[None]:
    """Variables that ranks inherit, and nothing that is started later."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _no_orphans() -> Iterator[None]:
    """End the ranks that are left in the end, as the agent does: those of a signal that comes while it starts or ends
    them are forgotten by it. Another signal kills them at once.
    """
    here = psutil.Process()
    others = here.children()
    try:
        yield
    finally:
        left = list(set(here.children()).difference(others))
        try:
            limit = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
            _send(left, signal.SIGTERM)
            left = psutil.wait_procs(left, float(limit))[1]
            if left:
                _say(f"{len(left)} of the ranks had not ended {limit} s after SIGTERM, and were killed")
        finally:
            _send(left, signal.SIGKILL)
            psutil.wait_procs(left, 1)


def _send(ranks: Sequence[psutil.Process], number: int) -> None:
    """To each, and to what it has started, which is in the session that it leads."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            rank.send_signal(number)
            if number == signal.SIGKILL:
                os.killpg(rank.pid, number)
