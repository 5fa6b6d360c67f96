"""The Slurm script, with stand-ins for Slurm's commands: two launchers on this machine, a rank each."""

import os
import random
import sys
from pathlib import Path

import pytest

from tests.jobs import REPOSITORY, Job, metrics, run, same_bits, weights

SCRIPT = REPOSITORY / "examples" / "slurm" / "alpaca-7b.sbatch"
# Runs its command once for each node, as srun does on each of them, and fails if one of them does.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
for node in $(seq "$SLURM_NNODES"); do "$@" & children+=($!); done
status=0
for child in "${children[@]}"; do wait "$child" || status=1; done
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
        "RANKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "two[1-2]",
        "SLURM_JOB_ID": str(random.randrange(10**6)),
    }


def test_two_machines_train_as_two_ranks_of_one(slurm: dict[str, str], tmp_path: Path) -> None:
    job = Job.make(tmp_path)
    options = ("--total_steps 2", "--checkpoint.every 1")
    assert job.torchrun(2, tmp_path / "one", *options).returncode == 0
    # The last of two options of a name counts.
    stopped = run(["bash", str(SCRIPT), *job.words(tmp_path / "two", *options, "--stop_after 1")], slurm)
    assert stopped.returncode == 0, stopped.stderr[-4000:]
    assert not (tmp_path / "two" / "policy").exists()
    gone_on = run(["bash", str(SCRIPT), *job.words(tmp_path / "two", *options)], slurm)
    assert gone_on.returncode == 0, gone_on.stderr[-4000:]
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    assert same_bits(weights(tmp_path / "two"), weights(tmp_path / "one"))


def test_what_a_rank_says_of_bad_input_comes_through(slurm: dict[str, str], tmp_path: Path) -> None:
    job = Job.make(tmp_path)
    finished = run(["bash", str(SCRIPT), *job.words(tmp_path / "out", "--rollout.top_p 2")], slurm)
    assert finished.returncode != 0
    assert "error: rollout.top_p is 2.0, expected a number in (0, 1]" in finished.stderr
