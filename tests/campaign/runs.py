"""Runs of the main job from outside: started, ended at any moment, gone on with, compared."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from tests.campaign.book import Unavailable
from tests.job_runs import (
    LAUNCH_VARIABLES,
    LIMIT_SECONDS,
    REPOSITORY,
    SETTINGS,
    Job,
    metrics,
    snapshot,
    states,
    torchrun,
)
from tests.rollout.vllm_architectures import SIZES

STEPS = 8
# It saves at every step, so that many a moment is one of a save.
OPTIONS = (f"--total_steps {STEPS}", "--checkpoint.every 1")
BACKGROUND = "--checkpoint.background true"
VLLM = "--rollout.engine vllm"


@dataclass(frozen=True)
class Kind:
    """Of a run: on how many ranks, and with what options beside `OPTIONS`."""

    ranks: int
    options: tuple[str, ...] = ()

    def words(self, output_dir: Path, *options: str, module: str = "repo_fast.train") -> list[str]:
        """The command."""
        python = vllm_python() if VLLM in self.options else sys.executable
        launcher = [python, "-m"] if self.ranks == 1 else [python, *torchrun(self.ranks)[1:-2], python, "-m"]
        job = _job(for_vllm=VLLM in self.options)
        return [*launcher, module, *job.words(output_dir, *OPTIONS, *self.options, *options)]


def vllm_python() -> str:
    """That of the environment that vLLM is installed in."""
    python = REPOSITORY / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        raise Unavailable("no .venv-vllm, which make test-vllm makes")
    return str(python)


@cache
def _job(*, for_vllm: bool) -> Job:
    # As long as the campaign's process. vLLM has no attention for heads as narrow as those of the other.
    folder = Path(_keep().name) / ("vllm" if for_vllm else "hf")
    folder.mkdir()
    return Job.make(folder, **(SIZES if for_vllm else {}))


@cache
def _keep() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="campaign-job-")


@cache
def undisturbed(kind: Kind) -> tuple[Path, float]:
    """The folder of a run that nothing happens to, and how many seconds it took from its first file on."""
    folder = Path(tempfile.mkdtemp(dir=_keep().name)) / "run"
    started = Started(kind.words(folder), folder)
    started.until_it_writes()
    began = time.monotonic()
    started.ends_with(0)
    return folder, time.monotonic() - began


class Started:
    """A command that was started, whose processes are known by its output folder among their words.

    Args:
        words: The command.
        output_dir: Its own.
        environment: Beside what tests have.
        said: The file for what it says. None: one beside its output folder.
    """

    def __init__(
        self,
        words: Sequence[str],
        output_dir: Path,
        environment: dict[str, str] | None = None,
        said: Path | None = None,
    ) -> None:
        self._output_dir = output_dir
        self._said = said or output_dir.parent / f"said-{time.monotonic_ns()}.txt"
        inherited = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                words,
                cwd=REPOSITORY,
                env={**inherited, **SETTINGS, **(environment or {})},
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """On either of its streams."""
        return self._said.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All that are alive: the launcher, and the ranks."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            mine = str(self._output_dir) in (process.info["cmdline"] or ())
            if mine and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Those that train."""
        return [process for process in self.processes() if "torch.distributed.run" not in process.cmdline()]

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def until_it_writes(self, name: str = "config.yaml") -> None:
        """Wait for a file of its output folder."""
        self.until(self._output_dir / name)

    def until_a_moment_of(self, steps: int, kind: "Kind", generator: random.Random) -> None:
        """Wait for a random moment within its first so many steps; one more than there are is what comes after them.

        It is told by its checkpoints: a machine is not as fast now as it was, or will be.
        """
        step = generator.randrange(steps)
        self.until_it_writes()
        self._wait(lambda: newest_step(self._output_dir) >= step, f"checkpoint {step}")
        time.sleep(generator.random() * undisturbed(kind)[1] / STEPS)

    def until(self, file: Path) -> None:
        """Wait for a file that it writes."""
        self._wait(file.exists, file.name)

    def _wait(self, there: Callable[[], bool], name: str) -> None:
        ends = time.monotonic() + LIMIT_SECONDS
        while not there():
            assert self.running, f"ended with {self._process.returncode}: {self.said[-2000:]}"
            assert time.monotonic() < ends, f"no {name} in {LIMIT_SECONDS} s: {self.said[-2000:]}"
            time.sleep(0.005)

    def kill(self) -> None:
        """All of its processes, as when the machine dies."""
        while alive := self.processes():
            for process in alive:
                try:
                    process.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
        self._process.wait()

    def end_alone(self, limit: float = LIMIT_SECONDS) -> int:
        """Wait for it; returns its exit status. Others that write to the same folder may still run."""
        try:
            return self._process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"hung for {limit} s: {self.said[-2000:]}") from None

    def end(self, limit: float = LIMIT_SECONDS) -> int:
        """Wait for it; returns its exit status. None of its processes is left."""
        status = self.end_alone(limit)
        left = self.processes()
        if left:
            self.kill()
            raise AssertionError(f"{len(left)} processes are left after it ended with {status}")
        return status

    def ends_with(self, status: int, limit: float = LIMIT_SECONDS) -> None:
        got = self.end(limit)
        assert got == status, f"exit status {got}, expected {status}: {self.said[-2000:]}"


def go_on(kind: Kind, output_dir: Path) -> str:
    """Resume a run to its end; returns what it says."""
    again = Started(kind.words(output_dir, "--resume auto"), output_dir)
    again.ends_with(0)
    return again.said


def assert_equal(output_dir: Path, kind: Kind) -> None:
    """That a run ended in the bits of one that nothing happened to, with nothing missing and nothing left over."""
    whole, _ = undisturbed(kind)
    ours, theirs = snapshot(output_dir), snapshot(whole)
    assert ours.keys() == theirs.keys(), f"other files: {sorted(ours.keys() ^ theirs.keys())}"
    assert metrics(output_dir) == metrics(whole), "other metrics"
    for name in ("samples.jsonl", "policy/model.safetensors"):
        assert ours[name] == theirs[name], f"another {name}"
    assert states(output_dir, STEPS) == states(whole, STEPS), "another last checkpoint"


def newest_step(output_dir: Path) -> int:
    """Of its complete checkpoints; 0 without one."""
    names = [path.name for path in (output_dir / "checkpoints").glob("step-*") if not path.suffix]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def logged_steps(output_dir: Path) -> int:
    """Complete lines of `metrics.jsonl`."""
    file = output_dir / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return len([json.loads(line) for line in lines])
