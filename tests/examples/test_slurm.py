"""Several machines on this one: the Slurm script with stand-ins for Slurm's commands, and two launchers that meet."""

import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.job_runs import REPOSITORY, Job, metrics, run, same_bits, weights

FOLDER = REPOSITORY / "examples" / "slurm"
# Runs its command once for each task, as srun does on the nodes; fails if one of them does. Slurm's own signal to the
# tasks is SIGUSR1; here it comes when SIGTERM does.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
trap 'kill -USR1 "${children[@]}"' TERM
for task in $(seq 0 $((SLURM_NTASKS - 1))); do SLURM_PROCID=$task SLURM_LOCALID=0 "$@" & children+=($!); done
status=0
for child in "${children[@]}"; do
  wait "$child"; code=$?
  # A wait that the signal ended.
  while kill -0 "$child" 2> /dev/null; do wait "$child"; code=$?; done
  [ $code = 0 ] || status=$code
done
exit $status
"""
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames two[1-2]" ] && printf 'localhost\\nlocalhost\\n'
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of an allocation of two nodes."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(text)
        command.chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "two[1-2]",
        "SLURM_JOB_ID": str(random.randrange(10**6)),
    }


def submit(slurm: dict[str, str], words: list[str], **environment: str) -> subprocess.CompletedProcess:
    return run(["bash", str(FOLDER / "alpaca-7b.sbatch"), *words], slurm | environment)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job.make(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def one_machine(job: Job) -> Path:
    assert job.torchrun(2, job.folder / "one", "--total_steps 3").returncode == 0
    return job.folder / "one"


@pytest.mark.slow
def test_two_nodes_train_as_two_ranks_of_one_and_a_signal_stops_them_with_a_checkpoint(
    slurm: dict[str, str], one_machine: Path, tmp_path: Path
) -> None:
    # What a run resolved has a value for every option of the script's own configuration, which it changes.
    words = ["--config", str(one_machine / "config.yaml"), "--output_dir", str(tmp_path / "two")]
    stopped = submit(slurm, words, TEST_TERMINATE_AT="2")
    assert stopped.returncode != 0 and "stopped after step 2 of 3" in stopped.stdout, stopped.stderr[-4000:]
    assert not (tmp_path / "two" / "policy").exists()
    gone_on = submit(slurm, words)
    assert gone_on.returncode == 0, gone_on.stderr[-4000:]
    assert metrics(tmp_path / "two") == metrics(one_machine)
    assert same_bits(weights(tmp_path / "two"), weights(one_machine))


@pytest.mark.slow
def test_so_do_two_launchers(job: Job, one_machine: Path, tmp_path: Path) -> None:
    """By the recipe's words for them."""
    recipe = (FOLDER / "README.md").read_text()
    (meeting,) = re.findall(r"^repo-fast train --gpus 8 (.*?) --config", recipe, re.MULTILINE)
    meeting = meeting.replace("first-machine:29500", f"localhost:{random.randrange(20000, 40000)}")
    launcher = [sys.executable, "-m", "repo_fast", "train", "--gpus", "1", *meeting.split()]
    words = shlex.join([*launcher, *job.words(tmp_path / "two", "--total_steps 3")])
    finished = run(["bash", "-c", f"{words} & {words}; status=$?; wait $! && exit $status"])
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert finished.stderr.count("--nnodes 2 ") == 2
    assert metrics(tmp_path / "two") == metrics(one_machine)
    assert same_bits(weights(tmp_path / "two"), weights(one_machine))


def test_what_a_rank_says_of_bad_input_comes_through(slurm: dict[str, str], job: Job, tmp_path: Path) -> None:
    finished = submit(slurm, job.words(tmp_path / "out", "--rollout.top_p 2"))
    assert finished.returncode != 0
    assert "error: rollout.top_p is 2.0, expected a number in (0, 1]" in finished.stderr
