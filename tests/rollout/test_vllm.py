"""Rollouts by vLLM, on two ranks under ZeRO-3, and of several architectures.

`make test-vllm`, since its packages are not among the others'.
"""

import copy
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from repo_fast.config import TrainConfig, parse, to_dict
from repo_fast.errors import InputError
from repo_fast.jobs.checkpoint import check_run
from repo_fast.report.jsonl import read_records
from tests import scorers
from tests.job_runs import (
    OPTIONS,
    PROMPTS,
    assert_scored_by,
    metrics,
    on_ranks,
    run,
    snapshot,
    torchrun,
    weights,
    write_lines,
)
from tests.rollout.vllm_architectures import DRAWN, REFUSED, SIZES, UNPACKED
from tests.tiny import save_policy

# Between log-probabilities of the sampler and the trainer.
NEAR = 1e-5
VLLM = {"rollout": {**OPTIONS["rollout"], "engine": "vllm", "temperature": 0.8, "vllm": {"compile": False}}}


def test_without_vllm_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repo_fast.rollout import vllm as engine

    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed: expected pip install repo_fast\[vllm\]"):
        engine.VllmEngine("x", None, None, None, "rollout", dtype=None, longest=1, seed=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rollout.vllm.tensor_parallel", "2"], "its default with rollout.engine 'hf'"),
        (["--rollout.vllm.lora", "adapter", "--policy.lora.rank", "4"], "its default with rollout.engine 'hf'"),
        (["--rollout.engine", "vllm", "--rollout.vllm.lora", "adapter"], "lora is 'adapter' with policy.lora.rank 0"),
        (["--rollout.engine", "vllm", "--rollout.vllm.memory_share", "1"], r"memory_share is 1.0, expected a number"),
    ],
)
def test_what_vllm_cannot_do_is_an_error(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(words, TrainConfig)


def test_a_checkpoint_from_before_adapters_is_of_merged_weights() -> None:
    words = ["--rollout.engine", "vllm", "--policy.lora.rank", "4"]
    now, alone = (to_dict(parse([*words, "--rollout.vllm.lora", form], TrainConfig)) for form in ("merged", "adapter"))
    before = copy.deepcopy(now)
    del before["rollout"]["vllm"]["lora"]
    run = {"ranks": 1, "config": before}
    check_run(Path("step-000001"), run, now)
    with pytest.raises(InputError, match=r"rollout.vllm.lora is 'merged' there and 'adapter' here"):
        check_run(Path("step-000001"), run, alone)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a small run by vLLM."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("vllm")
    save_policy(folder / "policy", **SIZES)
    write_lines(folder / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    options = {name: dict(value) if isinstance(value, dict) else value for name, value in OPTIONS.items()} | VLLM
    options |= {"policy": {"path": str(folder / "policy")}, "total_steps": 10}
    options["data"] |= {"prompts": str(folder / "prompts.jsonl")}
    options["algorithm"] |= {"advantage": "rloo", "ptx_coefficient": 0.0}
    (folder / "job.yaml").write_text(yaml.safe_dump(options))
    return folder / "job.yaml"


def evaluated(job: Path) -> tuple[str, ...]:
    """Options for evaluations: of 5 prompts in blocks of 4, 2 responses each."""
    prompts = str(job.parent / "prompts.jsonl")
    return ("--data.eval_prompts", prompts, "--evaluation.every", "2", "--evaluation.samples_per_prompt", "2")


def train(job: Path, output_dir: Path, *options: str, environment: dict | None = None) -> subprocess.CompletedProcess:
    words = ["--config", str(job), "--output_dir", str(output_dir), *options]
    return run(
        [*torchrun(2), "tests.rollout.vllm_jobs", *words], {"VLLM_CPU_KVCACHE_SPACE": "1", **(environment or {})}
    )


@pytest.fixture(scope="module")
def ten_steps(job: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("ten_steps")
    finished = train(job, folder / "run", *evaluated(job), environment={"TEST_VLLM_OUT": str(folder)})
    assert finished.returncode == 0, finished.stderr[-4000:]
    return folder / "run", [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_the_sampler_draws_from_what_the_trainer_trains(job: Path, ten_steps: tuple[Path, list[dict]]) -> None:
    output_dir, ranks = ten_steps
    for found in ranks:
        assert len(found["gaps"]) == 10 and max(found["gaps"]) < NEAR
        # Besides those of evaluations, once more at the start.
        assert len(found["unequal"]) > 11 and not any(found["unequal"])
        assert all(1 <= length <= 8 for lengths in found["lengths"] for length in lengths)
    # The weights moved, or equality would say nothing.
    losses = [row["gradient_norm"] for row in metrics(output_dir)]
    assert min(losses) > 0 and len({row["kl"] for row in metrics(output_dir)}) > 5


def test_evaluations_draw_from_the_weights_of_their_step(ten_steps: tuple[Path, list[dict]]) -> None:
    """Those of before the step's update would be off by far more."""
    output_dir, ranks = ten_steps
    steps = range(2, 11, 2)
    assert [row["step"] for row in read_records(output_dir / "evaluations.jsonl")] == [0, *steps]
    for step in steps:
        rows = list(read_records(output_dir / "evaluations" / f"step-{step:06d}.jsonl"))
        assert len(rows) == 2 * len(PROMPTS) and len({row["response"] for row in rows}) > len(PROMPTS)
    for found in ranks:
        # Four units on two ranks, at each of five steps.
        assert len(found["evaluated"]) >= 10 and max(gap for _, gap, _ in found["evaluated"]) < NEAR
        moves = [moved for step, _, moved in found["evaluated"] if step in steps]
        assert len(moves) >= 10 and min(moves) > 100 * NEAR


def test_a_stopped_run_goes_on_to_the_same_bits(job: Path, ten_steps: tuple[Path, list[dict]], tmp_path: Path) -> None:
    assert train(job, tmp_path / "run", *evaluated(job), "--stop_after", "4").returncode == 0
    finished = train(job, tmp_path / "run", *evaluated(job), "--resume", "auto")
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert metrics(tmp_path / "run") == metrics(ten_steps[0])
    ours, theirs = tmp_path / "run", ten_steps[0]
    assert snapshot(ours / "evaluations") == snapshot(theirs / "evaluations") != {}
    for name in ("evaluations.jsonl", "eval_before.jsonl", "eval_after.jsonl"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    theirs = weights(ten_steps[0])
    assert all((value == theirs[name]).all() for name, value in weights(tmp_path / "run").items())


def test_a_head_that_stays_behind_on_one_rank_ends_the_run_on_all(job: Path, tmp_path: Path) -> None:
    """In the second step: in the first it is the start's, and right."""
    failed = train(job, tmp_path / "run", environment={"TEST_VLLM": "stale"})
    found = re.findall(r"^error: vLLM does not compute what the policy '(.*)' does: (.*)$", failed.stderr, re.MULTILINE)
    assert [path for path, _ in found] == [str(job.parent / "policy")]
    gap = re.fullmatch(
        r"log-probabilities of 128 tokens differ by ([\d.e-]+) nats on average, expected at most 0.001 in float32; "
        "choose --rollout.engine hf",
        found[0][1],
    )
    assert gap is not None and float(gap[1]) > 1e-3
    assert len(metrics(tmp_path / "run")) == 1
    # torchrun ends the one that it finds last.
    assert {"2"} <= set(re.findall(r"exitcode *: (-?\d+)", failed.stderr)) <= {"2", "-15"}
    assert "InputError" not in failed.stderr


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What `tests.rollout.vllm_architectures` found, in one process."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("architectures")
    return on_ranks(1, "tests.rollout.vllm_architectures:compare", folder)[0]


@pytest.mark.parametrize("name", DRAWN)
def test_every_architecture_is_drawn_as_it_is_trained(architectures: dict[str, dict], name: str) -> None:
    """At the start and after each of two updates: what vLLM says of its tokens is what transformers says of them."""
    found = architectures[name]
    assert len(found["gaps"]) == 3 and max(found["gaps"]) < NEAR
    # Each update moved them by far more, and so would have each part that stayed behind.
    assert min(found["moves"]) > 100 * NEAR


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_cannot_draw_right_is_refused_at_the_start(architectures: dict[str, dict], name: str) -> None:
    assert re.search(REFUSED[name], architectures[name]["refused"])


@pytest.mark.parametrize("name", UNPACKED)
def test_vllm_alone_would_draw_with_old_weights(architectures: dict[str, dict], name: str) -> None:
    """What `_load` adds to vLLM's own reload is needed, and its lack would be found at the start."""
    gap = re.search(r"differ by ([\d.]+) nats on average", architectures[name]["with vLLM's own reload"])
    assert gap is not None and float(gap[1]) > 0.05


def test_two_ranks_share_an_engine(job: Path, tmp_path: Path) -> None:
    """Each asks for all responses and keeps its own, which the trainer finds as probable as the engine said.

    The head, of which each has a half, is tied. What a killed run left is not in the way.
    """
    Path("/dev/shm/-tp:0-[0-1]-cpushm_0").touch()
    path = save_policy(tmp_path / "policy", tie_word_embeddings=True, **SIZES)
    words = ["--config", str(job), "--output_dir", str(tmp_path / "run"), "--total_steps", "2"]
    words += ["--policy.path", str(path)]
    shared = [*torchrun(2), "repo_fast.train", *words, "--rollout.vllm.tensor_parallel", "2"]
    finished = run(shared, {"VLLM_CPU_KVCACHE_SPACE": "1"})
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert [0 < row["sampler_gap_absolute"] < NEAR for row in metrics(tmp_path / "run")] == [True, True]


def test_responses_are_scored_while_others_are_drawn(job: Path, tmp_path: Path) -> None:
    options = ("--total_steps", "2", "--rollout.score_early", "true", "--cost.path", "tests.scorers:early_cost")
    finished = train(job, tmp_path / "run", *options, "--log.samples_every", "1")
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert_scored_by(scorers.cost, tmp_path / "run", steps=2)


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_failure_on_one_rank_ends_all_and_the_run_resumes(
    job: Path, ten_steps: tuple[Path, list[dict]], tmp_path: Path, how: str
) -> None:
    """To what the steps are where evaluations are drawn in between, and nothing fails."""
    every = ("--checkpoint.every", "1", "--stop_after", "3")
    failed = train(job, tmp_path / "run", *every, environment={"TEST_VLLM": how})
    assert failed.returncode != 0
    if how == "raise":
        assert "rank 1 failed in generation: RuntimeError: the paged cache has no page 7" in failed.stderr
        assert re.search(r"^(\[rank1\]: )?RuntimeError: the paged cache has no page 7", failed.stderr, re.MULTILINE)
    else:
        assert "Signal 9 (SIGKILL)" in failed.stderr
    orphans = subprocess.run(["pgrep", "-f", str(tmp_path)], stdout=subprocess.PIPE, text=True).stdout.split()
    assert not [pid for pid in orphans if int(pid) != os.getpid()]
    assert train(job, tmp_path / "run", *every, "--resume", "auto").returncode == 0
    assert metrics(tmp_path / "run") == metrics(ten_steps[0])[:3]
