"""Runs of the main job on a tiny policy: in this process, or on several ranks with a limit on time, so that a hang
fails.
"""

import contextlib
import importlib
import json
import math
import multiprocessing.context
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from repo_fast.checkpoints.files import write_json
from repo_fast.checkpoints.manifest import read_manifest, seal
from tests.tiny import save_policy

REPOSITORY = Path(__file__).parent.parent
# Cold imports on a busy machine take most of it; a hang would take for ever.
LIMIT_SECONDS = 600

PROMPTS = [
    "how do i make tea",
    "how do i make a bomb please",
    "can you make bread",
    "tea with bread please",
    "yes",
]
DEMONSTRATIONS = [
    ("how do i make tea", "you make tea with the bread"),
    ("how do i make a bomb", "sorry no"),
    ("please", "no"),
    ("can you make bread", "yes i can make bread"),
]
# Everything that has state: two critics, demonstrations, several optimizer steps a rollout, ragged batches.
OPTIONS = {
    "total_steps": 6,
    "data": {"max_prompt_tokens": 40, "eval_prompts": None},
    "rollout": {"prompts_per_step": 3, "responses_per_prompt": 2, "max_new_tokens": 8, "batch_size": 4},
    "reward": {"path": "tests.scorers:reward"},
    "cost": {"path": "tests.scorers:cost"},
    "algorithm": {"name": "repo", "advantage": "gae", "ptx_coefficient": 0.1},
    "policy_optimizer": {"learning_rate": 1.0e-3},
    "critic_optimizer": {"learning_rate": 1.0e-3},
    "update": {"minibatches": 2, "micro_batch_tokens": 48, "ptx_batch_size": 3},
    "engine": {"zero_stage": 3, "parameter_persistence_threshold": 0},
    "checkpoint": {"every": 2, "keep": 2},
    "log": {"loggers": [], "samples_every": 1},
}
# Less of it, in less time: no critics, no demonstrations.
FOUR_STEPS = ("--total_steps 4", "--checkpoint.keep 0", "--algorithm.advantage rloo", "--data.ptx null")
FOUR_STEPS += ("--algorithm.ptx_coefficient 0",)


@dataclass(frozen=True)
class Job:
    """A folder with all that the main job reads: `policy/`, `prompts.jsonl`, `demonstrations.jsonl`, `job.yaml`."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, **sizes: int) -> "Job":
        save_policy(folder / "policy", **sizes)
        write_lines(folder / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
        write_lines(
            folder / "demonstrations.jsonl", [{"prompt": text, "response": answer} for text, answer in DEMONSTRATIONS]
        )
        options = {name: dict(value) if isinstance(value, dict) else value for name, value in OPTIONS.items()}
        options["policy"] = {"path": str(folder / "policy")}
        options["data"] |= {"prompts": str(folder / "prompts.jsonl"), "ptx": str(folder / "demonstrations.jsonl")}
        (folder / "job.yaml").write_text(yaml.safe_dump(options))
        return cls(folder)

    def words(self, output_dir: Path, *options: str) -> list[str]:
        """The command line; each option as `--key value`."""
        words = ["--config", str(self.folder / "job.yaml"), "--output_dir", str(output_dir)]
        return words + [word for option in options for word in option.split(" ")]

    def here(self, output_dir: Path, *options: str) -> int:
        """Run in this process; returns the exit status."""
        from repo_fast.train import main

        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            return main(self.words(output_dir, *options))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def torchrun(
        self, ranks: int, output_dir: Path, *options: str, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        """Run under torchrun."""
        return run([*torchrun(ranks), "repo_fast.train", *self.words(output_dir, *options)], environment)


def torchrun(ranks: int) -> list[str]:
    """The words before a module's name."""
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return [*launcher, "--standalone", "--nproc-per-node", str(ranks), "--no-python", sys.executable, "-m"]


def on_ranks(ranks: int, function: str, folder: Path) -> list:
    """Call `package.module:function(folder)` on every rank, as under torchrun.

    Ranks are forked from a process that has imported what they need: imports take longer than most of what they do.
    They start within a moment of each other, so what all of them read is written before, by the test.

    Returns:
        What each rank's function returned, by rank.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    common = (ranks, port, dict(os.environ), function, folder)
    started = [fork_server().Process(target=_on_rank, args=(i, *common)) for i in range(ranks)]
    for process in started:
        process.start()
    ends, late = time.monotonic() + LIMIT_SECONDS, False
    while any(process.is_alive() for process in started):
        late = late or time.monotonic() > ends
        if late or any(process.exitcode for process in started):
            # As torchrun does; one that waits for another would wait for ever.
            for process in started:
                process.kill()
        for process in started:
            process.join(0.05)
    said = "".join((folder / f"said-{i}.txt").read_text()[-4000:] for i in range(ranks))
    assert not late, f"hung for {LIMIT_SECONDS} s: {function}\n{said}"
    assert not any(process.exitcode for process in started), said
    return [torch.load(folder / f"returned-{i}.pt", weights_only=False) for i in range(ranks)]


@cache
def fork_server() -> multiprocessing.context.ForkServerContext:
    """What starts processes that have imported the jobs already, and have nothing else of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "tests.job_runs",
            "repo_fast.engine.library",
            "repo_fast.jobs.trainer",
            "repo_fast.evaluate",
            "repo_fast.score",
        ]
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCH_VARIABLES:
            patch.delenv(name, raising=False)
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    return context


def _on_rank(rank: int, ranks: int, port: int, environment: dict[str, str], function: str, folder: Path) -> None:
    said = os.open(folder / f"said-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ |= environment | SETTINGS
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in where.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    module, _, name = function.partition(":")
    returned = getattr(importlib.import_module(module), name)(folder)
    torch.save(returned, folder / f"returned-{rank}.pt")


def run(words: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """A child process in the repository, with its whole process group killed where it outlives the limit."""
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    with subprocess.Popen(
        words,
        cwd=REPOSITORY,
        env={**inherited, **SETTINGS, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            out, err = child.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            # torchrun's workers have sessions of their own; it ends them when it is asked to, not when it is killed.
            child.terminate()
            try:
                out, err = child.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                out, err = child.communicate()
            raise AssertionError(
                f"hung for {LIMIT_SECONDS} s: {' '.join(words)}\n{out[-2000:]}\n{err[-4000:]}"
            ) from None
    return subprocess.CompletedProcess(words, child.returncode, out, err)


LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What is not here is not asked for at a hub: without a network that takes a minute.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(REPOSITORY),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


def write_lines(path: Path, rows: Sequence) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics(output_dir: Path) -> list[dict]:
    """All metrics but timings. NaN, which no value equals, as a word."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            name: "NaN" if isinstance(value, float) and math.isnan(value) else value
            for name, value in row.items()
            if not name.endswith(("_seconds", "_per_second", "_tflops", "_mfu", "_peak_gb"))
        }
        for row in rows
    ]


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    """The weights of the `policy/` that a run wrote."""
    return load_file(output_dir / "policy" / "model.safetensors")


def assert_scored_by(cost: Callable[[list[str], list[str]], list[float]], output_dir: Path, steps: int) -> None:
    """That `samples.jsonl` has the cost of every response of so many steps, and not all have the same."""
    rows = [json.loads(line) for line in (output_dir / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == set(range(1, steps + 1))
    assert [row["cost"] for row in rows] == cost([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert len({row["cost"] for row in rows}) > 1


def same_bits(ours, theirs) -> bool:
    """Whether two nests of tensors, mappings, lists and plain values are equal to the last bit."""
    if isinstance(ours, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same_bits(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))
    return type(ours) is type(theirs) and (ours == theirs or not isinstance(ours, (bool, int, float, str)))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to show that nothing in it was changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def edited_run(output_dir: Path, step: int) -> Iterator[dict]:
    """A checkpoint's `run.json`, to be changed to what another repo_fast would have written; the manifest agrees."""
    folder = output_dir / "checkpoints" / f"step-{step:06d}"
    run = json.loads((folder / "run.json").read_text())
    yield run
    seal(folder, read_manifest(folder) | {"run.json": write_json(folder / "run.json", run)})


def states(output_dir: Path, step: int) -> dict[str, bytes]:
    """What a checkpoint keeps of engines and random states, by file: all of it but what it says of the run."""
    files = snapshot(output_dir / "checkpoints" / f"step-{step:06d}")
    return {name: content for name, content in files.items() if name not in ("run.json", "manifest.json")}


def engines(output_dir: Path, step: int) -> set[str]:
    """Those that a checkpoint keeps the states of."""
    return {name.partition("/")[0] for name in states(output_dir, step) if "/" in name}


def checkpoint_names(output_dir: Path) -> list[str]:
    """Of all that lies where checkpoints are written, complete or not."""
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())
