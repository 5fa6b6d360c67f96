"""Runs whose models share their base: the same numbers to the last bit, in less memory."""

import re
from pathlib import Path

import pytest

from repo_fast.config import parse
from repo_fast.engine import start_distributed, stop_distributed
from repo_fast.jobs.inputs import read_inputs
from repo_fast.jobs.trainer import Trainer
from tests.job_runs import Job, metrics, same_bits, weights

ADAPTED = ("--policy.lora.rank 3", "--critics.lora.rank 2", "--total_steps 3")


def said(caplog: pytest.LogCaptureFixture, pattern: str) -> list[str]:
    return [line for record in caplog.records if re.search(pattern, line := record.getMessage())]


@pytest.mark.parametrize("stage", [1, 2])
def test_no_bit_changes(job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture, stage: int) -> None:
    """Also of a run that stopped while models were apart, and goes on with one base."""
    caplog.set_level("INFO", "repo_fast")
    options, one_copy = (*ADAPTED, f"--engine.zero_stage {stage}"), "one copy of the weights"
    apart, together, moved = (tmp_path / name for name in ("apart", "together", "moved"))
    assert job.here(apart, *options, "--engine.share_base false") == 0
    assert not said(caplog, one_copy)
    assert job.here(together, *options) == 0
    (line,) = said(caplog, one_copy)
    assert "the critic of reward, the critic of cost have frozen" in line
    assert metrics(together) == metrics(apart)
    assert len(metrics(apart)) == 3
    assert same_bits(weights(together), weights(apart))
    assert job.here(moved, *options, "--engine.share_base false", "--stop_after 2") == 0
    assert job.here(moved, *options, "--engine.share_base true", "--resume auto") == 0
    assert metrics(moved) == metrics(apart)
    assert same_bits(weights(moved), weights(apart))


@pytest.mark.slow
def test_two_ranks_share_as_one_does(job: Job, tmp_path: Path) -> None:
    options = (*ADAPTED, "--engine.zero_stage 2")
    folders = {share: tmp_path / share for share in ("false", "true")}
    for share, folder in folders.items():
        finished = job.torchrun(2, folder, *options, f"--engine.share_base {share}")
        assert finished.returncode == 0, finished.stderr[-2000:]
    assert metrics(folders["true"]) == metrics(folders["false"])
    assert same_bits(weights(folders["true"]), weights(folders["false"]))


def built(job: Job, folder: Path, *options: str) -> Trainer:
    config = parse(job.words(folder, *ADAPTED, *options))
    return Trainer(config, read_inputs(config), start_distributed())


def test_three_models_hold_one_base(job: Job, tmp_path: Path) -> None:
    trainer = built(job, tmp_path / "run", "--engine.zero_stage 2", "--engine.share_base true")
    try:
        models = [engine.module for engine in (trainer.learner.models.policy, *trainer.learner.models.critics.values())]
        assert len(models) == 3
        frozen = [[p for p in model.parameters() if not p.requires_grad] for model in models]
        distinct = {id(p): p.numel() for own in frozen for p in own}
        assert sum(distinct.values()) == sum(p.numel() for p in frozen[0])
        assert sum(p.numel() for own in frozen for p in own) > 2.5 * sum(distinct.values())
    finally:
        stop_distributed()


def test_stage_3_says_what_it_keeps_twice(job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As much as stage 2 shares."""
    caplog.set_level("INFO", "repo_fast")
    found = {}
    for stage, pattern in ((2, "one copy of the weights"), (3, "keeps copies of frozen weights")):
        built(job, tmp_path / str(stage), f"--engine.zero_stage {stage}")
        stop_distributed()
        (line,) = said(caplog, pattern)
        found[stage] = re.search(r": ([\d.e-]+) GB", line)[1]
    assert found[2] == found[3]
    assert not said(caplog, "of its own")


def test_the_reference_shares_the_layers_that_are_not_trained(job: Job, tmp_path: Path) -> None:
    options = ("--total_steps 2", "--policy.trainable_layers 1", "--engine.zero_stage 2")
    folders = {share: tmp_path / share for share in ("false", "auto")}
    for share, folder in folders.items():
        assert job.here(folder, *options, f"--engine.share_base {share}") == 0
    assert metrics(folders["auto"]) == metrics(folders["false"])
    assert metrics(folders["auto"])[1]["kl"] != 0
    assert same_bits(weights(folders["auto"]), weights(folders["false"]))
