"""Runs whose models share their base: the same numbers to the last bit, in less memory."""

import re
from pathlib import Path

import pytest

from repo_fast.config import parse
from repo_fast.engine import start_distributed, stop_distributed
from repo_fast.jobs.inputs import read_inputs
from repo_fast.jobs.trainer import Trainer
from tests.job_runs import Job, metrics, same_bits, weights
from tests.models.test_adapters import write

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


# ----------------------------------------------------------------------------------------- six models on one base

SCORES = ("reward", "cost")


@pytest.fixture(scope="module")
def trained(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`reward/` and `cost/`, merged, each with its `adapter/` on the policy of the jobs."""
    folder = tmp_path_factory.mktemp("trained")
    for seed, name in enumerate(SCORES):
        write(folder / name, job.folder / "policy", name, seed=seed)
    return folder


def scored(folder: Path, adapter: bool, *options: str) -> tuple[str, ...]:
    paths = {name: folder / name / "adapter" if adapter else folder / name for name in SCORES}
    return (*ADAPTED, *(f"--{name}.path {path}" for name, path in paths.items()), *options)


def in_4_bits(quantize: bool) -> list[str]:
    return [f"--{section}.quantize nf4" for section in ("policy", "critics", *SCORES)] if quantize else []


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_six_models_are_what_separate_ones_are(
    job: Job, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, stage: int
) -> None:
    """But for rounding, which merging does in another place."""
    caplog.set_level("INFO", "repo_fast")
    folders = {adapter: tmp_path / str(adapter) for adapter in (True, False)}
    for adapter, folder in folders.items():
        assert job.here(folder, *scored(trained, adapter, f"--engine.zero_stage {stage}")) == 0
    ours, theirs = metrics(folders[True]), metrics(folders[False])
    assert len(ours) == 3
    for row, other in zip(ours, theirs, strict=True):
        for name in ("reward", "cost", "kl", "loss", "reward_value_loss", "cost_value_loss", "gradient_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    lines = said(caplog, "one copy of the weights" if stage == 2 else "keeps copies of frozen weights")
    on_one, merged = (float(re.search(r": ([\d.e-]+) GB", line)[1]) for line in lines)
    # Merged, a critic has the weights of its score model, and all have the embeddings.
    assert on_one > 1.5 * merged


@pytest.mark.parametrize("quantize", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "nf4"])
def test_their_bits_do_not_depend_on_what_is_shared(
    job: Job, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, quantize: bool
) -> None:
    caplog.set_level("INFO", "repo_fast")
    options = scored(trained, True, "--engine.zero_stage 2", *in_4_bits(quantize))
    apart, together, stopped = (tmp_path / name for name in ("apart", "together", "stopped"))
    assert job.here(apart, *options, "--engine.share_base false") == 0
    assert job.here(together, *options, "--engine.share_base true") == 0
    assert len(said(caplog, "one copy of the weights")) == 1
    assert job.here(stopped, *options, "--stop_after 2") == 0
    assert job.here(stopped, *options, "--resume auto") == 0
    for folder in (together, stopped):
        assert metrics(folder) == metrics(apart)
        assert same_bits(weights(folder), weights(apart))


@pytest.mark.parametrize("quantize", [False, True], ids=["", "nf4"])
def test_six_models_hold_one_base(job: Job, trained: Path, tmp_path: Path, quantize: bool) -> None:
    """Of the policy, which is its own reference, two score models and two critics; and each score model's adapters with
    the critic that starts from them."""
    options = scored(trained, True, "--engine.zero_stage 2", "--engine.share_base true", *in_4_bits(quantize))
    trainer = built(job, tmp_path / "run", *options[len(ADAPTED) :])
    try:
        models = trainer.learner.models
        modules = [engine.module for engine in (models.policy, *models.critics.values())]
        modules += [scorer._module for scorer in trainer.scorers.values()]
        assert len(modules) == 5
        named = [dict(module.named_parameters()) for module in modules]
        bases = [
            {id(p) for name, p in own.items() if not re.search(r"lora_|score_head|^heads\.", name)} for own in named
        ]
        frozen = [{id(p) for name, p in own.items() if ".frozen." in name} for own in named]
    finally:
        stop_distributed()
    assert all(base and base <= bases[0] for base in bases)
    assert [len(own) for own in frozen] == [0, 28, 28, 28, 28] and len(set.union(*frozen)) == 56
