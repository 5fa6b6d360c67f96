"""Rollouts by vLLM on two ranks under ZeRO-3: `make test-vllm`, since its packages are not among the others'."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from repo_fast.config import TrainConfig, parse
from repo_fast.errors import InputError
from tests import scorers
from tests.jobs import OPTIONS, PROMPTS, assert_scored_by, metrics, run, torchrun, weights, write_lines
from tests.tiny import save_policy

# The smallest heads that vLLM's attention takes on a CPU are of 32. With the weights of the other tests, four times as
# large, float32 itself is off by 1e-5: each of the two from the truth in float64, and in opposite directions.
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 0.05,
}
# Between log-probabilities of the sampler and the trainer.
NEAR = 1e-5
VLLM = {"rollout": {**OPTIONS["rollout"], "engine": "vllm", "temperature": 0.8, "vllm": {"compile": False}}}


def test_without_vllm_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repo_fast.rollout import vllm as engine

    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed: expected pip install repo_fast\[vllm\]"):
        engine.VllmSampler("x", None, None, None, dtype=None, longest=1, seed=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rollout.vllm.tensor_parallel", "2"], "its defaults with rollout.engine 'hf'"),
        (["--rollout.engine", "vllm", "--policy.lora.rank", "4"], "policy.lora.rank is 4, expected 0 with"),
        (["--rollout.engine", "vllm", "--rollout.vllm.memory_share", "1"], r"memory_share is 1.0, expected a number"),
    ],
)
def test_what_vllm_cannot_do_is_an_error(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(words, TrainConfig)


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


def train(job: Path, output_dir: Path, *options: str, environment: dict | None = None) -> subprocess.CompletedProcess:
    words = ["--config", str(job), "--output_dir", str(output_dir), *options]
    return run([*torchrun(2), "tests.vllm_jobs", *words], {"VLLM_CPU_KVCACHE_SPACE": "1", **(environment or {})})


@pytest.fixture(scope="module")
def ten_steps(job: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("ten_steps")
    finished = train(job, folder / "run", environment={"TEST_VLLM_OUT": str(folder)})
    assert finished.returncode == 0, finished.stderr[-4000:]
    return folder / "run", [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_the_sampler_draws_from_what_the_trainer_trains(job: Path, ten_steps: tuple[Path, list[dict]]) -> None:
    output_dir, ranks = ten_steps
    for found in ranks:
        assert len(found["gaps"]) == 10 and max(found["gaps"]) < NEAR
        assert found["unequal"] == [[]] * 10
        assert all(1 <= length <= 8 for lengths in found["lengths"] for length in lengths)
    # The weights moved, or equality would say nothing.
    losses = [row["gradient_norm"] for row in metrics(output_dir)]
    assert min(losses) > 0 and len({row["kl"] for row in metrics(output_dir)}) > 5


def test_a_stopped_run_goes_on_to_the_same_bits(job: Path, ten_steps: tuple[Path, list[dict]], tmp_path: Path) -> None:
    assert train(job, tmp_path / "run", "--stop_after", "4").returncode == 0
    finished = train(job, tmp_path / "run", "--resume", "auto")
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert metrics(tmp_path / "run") == metrics(ten_steps[0])
    theirs = weights(ten_steps[0])
    assert all((value == theirs[name]).all() for name, value in weights(tmp_path / "run").items())


def test_two_ranks_share_an_engine(job: Path, tmp_path: Path) -> None:
    """Each asks for all responses and keeps its own, which the trainer finds as probable as the engine said."""
    words = ["--config", str(job), "--output_dir", str(tmp_path), "--total_steps", "2"]
    shared = [*torchrun(2), "repo_fast.train", *words, "--rollout.vllm.tensor_parallel", "2"]
    finished = run(shared, {"VLLM_CPU_KVCACHE_SPACE": "1"})
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert [0 < row["sampler_gap_absolute"] < NEAR for row in metrics(tmp_path)] == [True, True]


def test_responses_are_scored_while_others_are_drawn(job: Path, tmp_path: Path) -> None:
    options = ("--total_steps", "2", "--rollout.score_early", "true", "--cost.path", "tests.scorers:early_cost")
    finished = train(job, tmp_path / "run", *options, "--log.samples_every", "1")
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert_scored_by(scorers.cost, tmp_path / "run", steps=2)


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_failure_on_one_rank_ends_all_and_the_run_resumes(job: Path, tmp_path: Path, how: str) -> None:
    every = ("--checkpoint.every", "1", "--total_steps", "3")
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
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]
