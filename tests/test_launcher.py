"""The launcher: statuses and signals of ranks, which are small programs here; and, slowly, of the main job's."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

from repo_fast import launcher
from repo_fast.jobs.parent import LAUNCHER, end_with_launcher
from repo_fast.launcher import Exit, exit_status, run_ranks
from tests.job_runs import Job, checkpoint_names, metrics, run

# Each rank does what the command line says of it, a word a rank.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path

folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
what, _, number = sys.argv[2:][int(rank)].partition(":")

def end(number, frame):
    Path(folder, f"saved-{rank}").touch()
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, signal.SIG_IGN if what == "ignore" else end)
if what == "follow":
    from repo_fast.jobs.parent import end_with_launcher

    end_with_launcher()
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "MASTER_ADDR")
told = {"words": sys.argv[1:], "pid": os.getpid()} | {name: os.environ.get(name) for name in names}
Path(folder, f"told-{rank}.tmp").write_text(json.dumps(told))
os.replace(Path(folder, f"told-{rank}.tmp"), Path(folder, f"told-{rank}"))
if what == "exit":
    sys.exit(int(number))
if what == "kill":
    # Once the other rank is there.
    while len(list(folder.glob("told-?"))) < len(sys.argv) - 2:
        time.sleep(0.05)
    os.kill(os.getpid(), int(number))
time.sleep(float(number or 120))
"""

# Ranks, machines, and where these meet; then the worker's words.
CALL = """
import sys
from repo_fast.launcher import run_ranks
ranks, nodes, endpoint, *words = sys.argv[1:]
sys.exit(run_ranks("worker", words, int(ranks), int(nodes), endpoint))
"""


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """What starts the tests may have ignored signals, as nohup does, or a shell in its background."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new one, where `-m worker` is found."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def told(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("told-?"))]


def gone(folder: Path) -> bool:
    """Whether no rank is left; one that was not waited for is a zombie."""
    pids = [int(re.findall(r'"pid": (\d+)', text)[0]) for text in told(folder)]
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return bool(pids) and all(process.status() == psutil.STATUS_ZOMBIE for process in left)


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def once_started(folder: Path, ranks: int, do: Callable[[], object]) -> None:
    """Do something when so many ranks have started."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while len(list(folder.glob("told-?"))) < ranks and time.monotonic() < deadline:
            time.sleep(0.05)
        do()

    threading.Thread(target=wait, daemon=True).start()


# ------------------------------------------------------------------------------------------------------------ statuses


@pytest.mark.parametrize(
    ("ranks", "status", "error"),
    [
        (["exit:0"], 0, ""),
        (["exit:4"], 4, ""),
        (["kill:11"], 139, "error: rank 0 was killed by SIGSEGV\n"),
        (["exit:0", "exit:0"], 0, ""),
        (["exit:5", "exit:5"], 5, ""),
        (["wait", "exit:3"], 3, ""),
        (["wait", "kill:9"], 137, "error: rank 1 was killed by SIGKILL, as by the system where memory is short\n"),
    ],
)
def test_a_job_s_status_is_the_command_s(ranks, status, error, folder, capfd):
    before = signal.getsignal(signal.SIGTERM)
    assert run_ranks("worker", [str(folder), *ranks], len(ranks)) == status
    shown, _, said = capfd.readouterr().err.partition("\n")
    assert "worker" in shown and said == error
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(told(folder)) == len(ranks) and gone(folder)


@pytest.mark.parametrize(
    ("exits", "status", "named"),
    [
        # The first to fail, whichever rank it is; the others were ended.
        ([Exit(1, 3, 10), Exit(0, -15, 10)], 3, ""),
        ([Exit(1, 1, 10), Exit(0, 143, 40)], 1, ""),
        # Found at once: a rank that lost another one says 1.
        ([Exit(0, 1, 10), Exit(1, -9, 10)], 137, "rank 1 was killed by SIGKILL"),
        # One that aborts because the first has gone.
        ([Exit(0, 2, 10), Exit(1, -6, 10)], 2, "rank 1 was killed by SIGABRT"),
        # The agent's own, after its 30 s, is not what happened.
        ([Exit(0, 1, 10), Exit(1, -9, 40)], 1, ""),
        # Nobody had failed before these.
        ([Exit(0, 143, 10), Exit(1, 143, 10)], 143, ""),
        ([Exit(1, -15, 10), Exit(0, 1, 10)], 143, "rank 1 was killed by SIGTERM"),
        ([Exit(2, -9, 10), Exit(3, -9, 10)], 137, "rank 2 was killed by SIGKILL"),
    ],
)
def test_of_several_ranks_the_most_telling_status_counts(exits, status, named, capsys):
    assert exit_status(exits) == status
    said = capsys.readouterr().err
    assert said.startswith(f"error: {named}") and said.count("\n") == 1 if named else said == ""


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_ranks_as_sigterm_does_and_is_waited_for(number, ranks, folder, capfd):
    once_started(folder, ranks, lambda: os.kill(os.getpid(), number))
    assert run_ranks("worker", [str(folder), *["wait"] * ranks], ranks) == 128 + number
    assert len(list(folder.glob("saved-?"))) == ranks and gone(folder)
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_does_not_end_is_killed_and_that_is_said(ranks, folder, monkeypatch, capfd, caplog):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    once_started(folder, ranks, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_ranks("worker", [str(folder), *["ignore"] * ranks], ranks) == 143
    assert gone(folder)
    said = capfd.readouterr().err + caplog.text
    assert ("1 of the ranks had not ended 1 s after SIGTERM" if ranks == 1 else "forcefully exiting") in said


def test_what_nohup_has_ignored_stays_ignored(folder):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        once_started(folder, 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert run_ranks("worker", [str(folder), "wait:1"], 1) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_no_rank_is_left_whatever_happens():
    with subprocess.Popen(["sleep", "60"]) as other:
        with pytest.raises(RuntimeError), launcher._no_orphans():
            rank = subprocess.Popen(["sleep", "60"], start_new_session=True)
            raise RuntimeError("in the middle of a start")
        assert not psutil.pid_exists(rank.pid) and other.poll() is None
        other.kill()


@pytest.mark.parametrize("ranks", [1, 2])
def test_signals_again_and_again_end_them_at_once(ranks, folder, tmp_path):
    """In a process of its own: one signal too many would end this one."""
    words = [str(ranks), "1", "", str(folder), *["ignore"] * ranks]
    with subprocess.Popen([sys.executable, "-c", CALL, *words], stderr=subprocess.PIPE, text=True) as started:
        wait_for(lambda: len(told(folder)) == ranks)
        began = time.monotonic()
        while started.poll() is None:
            started.send_signal(signal.SIGHUP)
            time.sleep(0.5)
        assert "Traceback" not in started.stderr.read()
    assert time.monotonic() - began < 20 and gone(folder)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_end_with_a_launcher_that_is_killed(ranks, folder):
    words = [str(ranks), "1", "", str(folder), *["follow"] * ranks]
    with subprocess.Popen([sys.executable, "-c", CALL, *words], stderr=subprocess.DEVNULL) as started:
        wait_for(lambda: len(told(folder)) == ranks)
        started.kill()
    wait_for(lambda: len(list(folder.glob("saved-?"))) == ranks and gone(folder))


def test_what_no_launcher_has_started_ends_by_itself(monkeypatch):
    """And neither what a rank starts, which finds no launcher."""
    monkeypatch.delenv(LAUNCHER, raising=False)
    end_with_launcher()
    called = "from repo_fast.jobs.parent import end_with_launcher; end_with_launcher(); "
    command = [sys.executable, "-c", f"{called} import os; print(os.environ.get('{LAUNCHER}'))"]
    with subprocess.Popen(["true"]) as gone:
        pass
    # Its parent; one that is further away; one that is gone.
    for parent, status in ((os.getpid(), 0), (os.getppid(), 0), (gone.pid, -signal.SIGTERM)):
        own = {**os.environ, LAUNCHER: str(parent)}
        ended = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout) == (status, "" if status else "None\n")


# ------------------------------------------------------------------------------------------------- what is printed


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_line_that_is_printed_does_the_same(ranks, folder, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    odd = 'it\'s "quoted" $HOME * \\'
    assert run_ranks("worker", [str(folder), *["exit:0"] * ranks, odd], ranks) == 0
    line = capfd.readouterr().err.strip()
    ours = [re.sub(r'"pid": \d+', "", text) for text in told(folder)]
    assert len(ours) == ranks and "OMP_NUM_THREADS" not in os.environ
    assert ("--rdzv-backend loopback" in line) == (ranks > 1)
    for path in folder.glob("told-?"):
        path.unlink()
    subprocess.run(["bash", "-c", line], check=True, cwd=folder.parent, timeout=300)
    assert [re.sub(r'"pid": \d+', "", text) for text in told(folder)] == ours
    assert (f'"WORLD_SIZE": "{ranks}", ' in ours[0]) == (ranks > 1) == ('"OMP_NUM_THREADS": "1"' in ours[0])


@pytest.mark.parametrize(
    ("name", "value"), [("PET_NNODES", "1:2"), ("PET_RDZV_ENDPOINT", "elsewhere:29400"), ("PET_STANDALONE", "1")]
)
def test_a_cluster_s_words_to_torchrun_are_not_this_run_s(name, value, folder, monkeypatch, capfd):
    """And those that are started with the line that is printed do not hear them either."""
    monkeypatch.setenv(name, value)
    assert run_ranks("worker", [str(folder), "exit:0", "exit:0"], 2) == 0
    line = capfd.readouterr().err.strip()
    assert f"{name}= " in line or f"{name}=1 " in line or f"{name}=0 " in line
    assert os.environ[name] == value and '"MASTER_ADDR": "127.0.0.1"' in told(folder)[0]
    for path in folder.glob("told-?"):
        path.unlink()
    subprocess.run(["bash", "-c", line], check=True, cwd=folder.parent, timeout=300)
    assert ['"MASTER_ADDR": "127.0.0.1"' in text for text in told(folder)] == [True, True]


def test_ranks_meet_on_the_loopback_where_torch_was_not_told_how(folder, monkeypatch):
    """As where the package is imported from its folder, and not installed."""
    monkeypatch.delitem(rendezvous_handler_registry._registry, "loopback")
    assert run_ranks("worker", [str(folder), "exit:0", "exit:0"], 2) == 0
    assert ['"MASTER_ADDR": "127.0.0.1"' in text for text in told(folder)] == [True, True]


def test_machines_that_do_not_meet_are_one_line(folder, capfd, monkeypatch):
    """A port that nobody listens at, on a host that is not this one."""
    monkeypatch.setenv("PET_RDZV_CONF", "is_host=false,read_timeout=1,join_timeout=1,timeout=1")
    assert run_ranks("worker", [str(folder), "exit:0"], 1, nodes=2, endpoint="localhost:9") == 1
    shown, *said = capfd.readouterr().err.splitlines()
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint localhost:9 --nproc-per-node 1" in shown
    assert [line for line in said if line.startswith("error: the machines did not meet at localhost:9")]
    assert told(folder) == []


@pytest.mark.slow
def test_two_launchers_are_two_machines(folder):
    """They meet at a port of this one, and each knows its own rank's status."""
    words = ["1", "2", f"localhost:{free_port()}", str(folder), "exit:0", "exit:0"]
    started = [subprocess.Popen([sys.executable, "-c", CALL, *words]) for _ in range(2)]
    assert [one.wait(300) for one in started] == [0, 0]
    assert ['"WORLD_SIZE": "2", "LOCAL_RANK": "0"' in text for text in told(folder)] == [True, True]


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


# -------------------------------------------------------------------------------------------------------- the main job


def command(job: Job, output_dir: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "repo_fast", "train", "--gpus", "2", *job.words(output_dir, *options)]


def test_bad_input_that_only_ranks_find_is_one_line_and_status_2(job: Job, tmp_path: Path) -> None:
    ended = run(command(job, tmp_path / "run", "--cost.path tests.scorers:nobody"))
    shown, *said = ended.stderr.splitlines()
    assert ended.returncode == 2 and "tests.scorers:nobody" in shown
    assert len(said) == 1 and said[0].startswith("error: "), ended.stderr


@pytest.mark.slow
def test_a_run_that_sigterm_ends_leaves_a_checkpoint_and_goes_on(job: Job, tmp_path: Path) -> None:
    stopped = run(command(job, tmp_path / "run"), {"TEST_TERMINATE_AT": "3"})
    assert stopped.returncode == 143 and "Traceback" not in stopped.stderr, stopped.stderr
    assert checkpoint_names(tmp_path / "run")[-1] == "step-000003"
    assert run(command(job, tmp_path / "run", "--resume auto")).returncode == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_run_whose_launcher_is_killed_leaves_a_checkpoint_and_no_rank(job: Job, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(command(job, folder, "--total_steps 1000"), stdout=subprocess.DEVNULL) as started:
        wait_for(lambda: (folder / "metrics.jsonl").is_file() and metrics(folder))
        ranks = psutil.Process(started.pid).children()
        started.kill()
    assert len(ranks) == 2
    wait_for(lambda: all(not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE for rank in ranks))
    assert checkpoint_names(folder)[-1] == f"step-{metrics(folder)[-1]['step']:06d}"


@pytest.mark.slow
def test_a_warning_that_ends_a_run_is_status_5(job: Job, tmp_path: Path) -> None:
    options = ["--evaluation.kl_bound 1e-9", "--evaluation.stop_on [kl]"]
    ended = run(command(job, tmp_path / "run", *options))
    assert ended.returncode == 5 and "Traceback" not in ended.stderr, ended.stderr
