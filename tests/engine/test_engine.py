"""The engine on two ranks: generation under ZeRO-3, every stage, and steps that must be skipped."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers.integrations.deepspeed import deepspeed_config

from repo_fast.config import EngineConfig, OptimizerConfig, RolloutConfig
from repo_fast.data import Prompt
from repo_fast.engine import Engine, learning_rate_factor, sharded_loading, start_distributed, stop_distributed
from repo_fast.models.loss_head import Projection
from repo_fast.models.policy import Policy
from repo_fast.ops import linear_log_probs
from repo_fast.packing.rows import PackedBatch, pack
from repo_fast.rollout import Rollout
from repo_fast.rollout.hf import Request, generate
from tests import scorers
from tests.job_runs import Job, metrics, on_ranks, run
from tests.tiny import save_policy, word_tokenizer

CPU = torch.device("cpu")
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=0.0, gradient_clip=0.5)
SETTINGS = {
    "stage 1": {"zero_stage": 1},
    "stage 2": {"zero_stage": 2},
    "stage 3": {},
    "stage 3, small parameters whole": {"parameter_persistence_threshold": 10_000},
    "stage 3, activation checkpointing": {"activation_checkpointing": True},
    "stage 1, activation checkpointing": {"zero_stage": 1, "activation_checkpointing": True},
    "stage 3, offload of the optimizer": {"offload_optimizer": True},
    "stage 2, offload of the optimizer": {"zero_stage": 2, "offload_optimizer": True},
    "stage 3, offload of optimizer and parameters": {"offload_optimizer": True, "offload_parameters": True},
    # What is trained stays.
    "stage 3, offload of frozen models": {"offload_frozen": True},
}
# What each rank learns from: of different lengths.
LEARNED = [
    [([3, 9, 14], [15, 16, 17, 2]), ([5, 8], [20, 9])],
    [([12, 13, 14, 15, 16, 17, 18], [19, 20, 21, 22, 23, 24, 9, 10, 11, 2])],
]
TOKENS = 4 + 2 + 10


def batch(rank: int) -> PackedBatch:
    prompts, responses = zip(*LEARNED[rank], strict=True)
    return pack([torch.tensor(p) for p in prompts], [torch.tensor(r) for r in responses], CPU)


def negative_log_likelihood(hidden: torch.Tensor, projection: Projection, packed: PackedBatch) -> torch.Tensor:
    return -linear_log_probs(hidden, projection.weight, packed.targets).sum() / TOKENS


class OnTwoRanks:
    """What each rank of the torchrun does and notes down."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder / "policy")
        self.ranks = start_distributed()
        self.tokenizer = word_tokenizer()

    def engine(self, **settings) -> Engine:
        config = EngineConfig(**{"dtype": "float32", "parameter_persistence_threshold": 0, **settings})
        with sharded_loading(config, CPU):
            policy = Policy.from_pretrained(self.folder, dtype=torch.float32, attention="sdpa")
        if config.activation_checkpointing:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            policy.model.enable_input_require_grads()
        return Engine(policy, config, self.ranks, OPTIMIZER, steps=10)

    def frozen(self, **settings) -> tuple[torch.Tensor, bool]:
        """A frozen model's log-probabilities, and whether DeepSpeed keeps its parameters on the host."""
        config = EngineConfig(dtype="float32", parameter_persistence_threshold=0, **settings)
        with sharded_loading(config, CPU, frozen=True):
            engine = Engine(
                Policy.from_pretrained(self.folder, dtype=torch.float32, attention="sdpa"), config, self.ranks
            )
        with torch.no_grad():
            loss = engine(batch(self.ranks.rank), negative_log_likelihood)
        offload = engine.frozen_module.zero_offload_param()
        return loss, offload is not None and offload.device == "cpu"

    def step(self, engine: Engine, factor: float = 1.0) -> tuple[bool, float, float]:
        """One optimizer step: whether it was applied, the gradient's norm, the learning rate."""
        loss = engine(batch(self.ranks.rank), negative_log_likelihood)
        engine.backward(loss * factor, last=True)
        taken = engine.step()
        return taken.applied, taken.gradient_norm, taken.learning_rate

    def generate(self, engine: Engine, new_tokens: int, texts: tuple[str, ...] = ("how do i", "tea")) -> Rollout:
        asked = [Request(Prompt(i, t), torch.tensor(self.tokenizer(t).input_ids)) for i, t in enumerate(texts)]
        with engine.gathered() as policy:
            config = RolloutConfig(max_new_tokens=new_tokens)
            return generate(policy.model, self.tokenizer, asked, range(len(asked)), config, CPU)


def measure(folder: Path) -> dict[str, Any]:
    """On each rank of a torchrun."""
    on = OnTwoRanks(folder)
    found: dict[str, Any] = {"weights": {}, "norms": {}}
    for name, settings in SETTINGS.items():
        engine = on.engine(**settings)
        _, found["norms"][name], _ = on.step(engine)
        found["weights"][name] = engine.whole_state()

    engine = on.engine()
    torch.manual_seed(0)
    found["collectives"] = {n: count_collectives(lambda n=n: on.generate(engine, n)) for n in (4, 32)}
    found["collectives of a forward"] = count_collectives(lambda: on.step(on.engine()))
    # Ranks that have nothing in common while they generate.
    texts = ("tea", "how do i make tea", "no") if on.ranks.is_first else ()
    rollout = on.generate(engine, 40, texts)
    found["responses"] = len(rollout.responses)
    rollout = on.generate(engine, 2 if on.ranks.is_first else 60)
    found["lengths"] = [tokens.numel() for tokens in rollout.response_tokens]
    on.step(engine)
    found["weights after generation"] = engine.whole_state()
    on.generate(engine, 4)
    on.step(engine)
    found["weights after generation and two steps"] = engine.whole_state()
    plain = on.engine()
    on.step(plain)
    on.step(plain)
    found["weights after two steps"] = plain.whole_state()

    found["frozen"] = {name: on.frozen(offload_frozen=offload) for name, offload in (("kept", False), ("away", True))}

    found["trained on host"] = on.engine(offload_frozen=True).frozen_module.zero_offload_param() is not None

    found["skipped"] = {}
    for stage in (1, 2, 3):
        engine = on.engine(zero_stage=stage)
        on.step(engine)
        before = engine.whole_state()
        # Only on one rank, of which the others hear in the norm of the gradient.
        skipped = [on.step(engine, factor if on.ranks.rank == 1 else 1.0) for factor in (float("nan"), float("inf"))]
        after = engine.whole_state()
        resumed = on.step(engine)
        found["skipped"][stage] = {
            "applied": [taken[0] for taken in skipped],
            "norms": [taken[1] for taken in skipped],
            "before": before,
            "after": after,
            "resumed": resumed,
            "two steps": engine.whole_state(),
        }
    stop_distributed()
    return found


def count_collectives(work: Callable[[], object]) -> int:
    """Calls of torch.distributed while something is done, whoever makes them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("c10d::"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    save_policy(folder / "policy")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return on_ranks(2, "tests.engine.test_engine:measure", folder)


@pytest.fixture(scope="module")
def plain_torch(folder: Path) -> tuple[dict[str, torch.Tensor], float]:
    """One step of torch's AdamW on both ranks' batches, and the norm of its gradient before clipping."""
    policy = Policy.from_pretrained(str(folder / "policy"), dtype=torch.float32, attention="eager")
    decayed = [p for p in policy.parameters() if p.dim() > 1]
    exempt = [p for p in policy.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": exempt, "weight_decay": 0.0}],
        lr=OPTIMIZER.learning_rate,
        betas=OPTIMIZER.betas,
    )
    for rank in range(2):
        for prompt, response in LEARNED[rank]:
            logits = policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum") / TOKENS
            loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), OPTIMIZER.gradient_clip))
    adam.step()
    return {name: parameter.detach() for name, parameter in policy.named_parameters()}, norm


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Of all weights together, relative to their norm."""
    assert theirs.keys() <= ours.keys()
    difference = sum((ours[name] - theirs[name]).square().sum() for name in theirs)
    return float((difference / sum(value.square().sum() for value in theirs.values())).sqrt())


def test_models_are_loaded_to_where_they_are_kept() -> None:
    for frozen in (False, True):
        with sharded_loading(EngineConfig(offload_frozen=True), CPU, frozen=frozen):
            assert ("offload_param" in deepspeed_config()["zero_optimization"]) == frozen


def test_a_frozen_model_kept_on_the_host_computes_the_same(found) -> None:
    assert not any(rank["trained on host"] for rank in found)
    for rank in found:
        (kept, kept_on_host), (away, away_on_host) = rank["frozen"]["kept"], rank["frozen"]["away"]
        assert not kept_on_host and away_on_host
        assert kept != 0 and torch.equal(kept, away)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_one_step_is_that_of_plain_torch(found, plain_torch, folder: Path, name: str) -> None:
    weights, norm = plain_torch
    start = Policy.from_pretrained(str(folder / "policy"), dtype=torch.float32, attention="sdpa").state_dict()
    assert distance(found[0]["weights"][name], start) > 1e-3
    assert distance(found[0]["weights"][name], weights) < 1e-5
    assert norm > OPTIMIZER.gradient_clip
    assert [rank["norms"][name] for rank in found] == pytest.approx([norm, norm], rel=1e-4)


def test_only_the_first_rank_holds_the_whole_state(found) -> None:
    assert found[1]["weights after two steps"] == {}


def test_collectives_do_not_grow_with_the_tokens_generated(found) -> None:
    for rank in found:
        assert rank["collectives"][4] == rank["collectives"][32] > 0
        # The counter does see the gathers of a forward and a backward, one for each module at least.
        assert rank["collectives of a forward"] > 20


def test_ranks_generate_independently(found) -> None:
    """That they come here shows that they did not wait for each other."""
    assert [rank["responses"] for rank in found] == [3, 0]
    assert max(found[0]["lengths"]) <= 2 < max(found[1]["lengths"])


def test_generation_leaves_training_alone(found) -> None:
    first = found[0]
    for name, value in first["weights after generation"].items():
        assert torch.equal(value, first["weights"]["stage 3"][name]), name
    for name, value in first["weights after generation and two steps"].items():
        assert torch.equal(value, first["weights after two steps"][name]), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(found, stage: int) -> None:
    for rank in found:
        skipped = rank["skipped"][stage]
        assert skipped["applied"] == [False, False]
        assert not any(torch.isfinite(torch.tensor(skipped["norms"])))
        assert skipped["resumed"][0] is True
    first = found[0]["skipped"][stage]
    assert all(torch.equal(first["before"][name], first["after"][name]) for name in first["before"])
    # Nothing of it stays in the optimizer either.
    assert distance(first["two steps"], found[0]["weights after two steps"]) < 1e-5


def test_a_skipped_step_of_a_run(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is counted, the next ones go on, and the schedule waits."""
    forward = Policy.forward
    poisonings = []

    def poisoned(self, packed, loss):
        result = forward(self, packed, loss)
        # Of the policy alone, in the second step's first optimizer step.
        if scorers.calls == 2 and torch.is_grad_enabled() and not poisonings:
            poisonings.append(scorers.calls)
            return result._replace(loss=result.loss * float("nan"))
        return result

    monkeypatch.setattr(Policy, "forward", poisoned)
    assert job.here(tmp_path / "run", "--total_steps 3") == 0
    rows = metrics(tmp_path / "run")
    assert [row["steps_skipped"] for row in rows] == [0, 1, 0]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1]
    # The last of 6 optimizer steps, taken with the rate of the fifth: 0.5 (1 + cos(pi 3 / 5)) after one of warm-up.
    assert rows[-1]["learning_rate"] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 3 / 5)))
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000003" / "run.json").read_text())
    assert state["state"]["learner"]["skipped"] == [1, 0]


def test_a_group_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun said stays, what was made up goes. What libraries set when they are imported is theirs."""
    start_distributed()
    stop_distributed()
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    before = dict(os.environ)
    start_distributed()
    assert os.environ["WORLD_SIZE"] == "1"
    # As a library may have changed it.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    start_distributed()
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    stop_distributed()
    assert os.environ == before


@pytest.mark.parametrize("port", [None, "29519"])
def test_nobody_but_this_machine_reaches_a_run_of_one_process(port, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that a cluster's environment names is for those who have others to meet."""
    stop_distributed()
    if port:
        monkeypatch.setenv("MASTER_PORT", port)
    start_distributed()
    listening = [c for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    stop_distributed()
    assert {c.laddr.ip for c in listening} <= {"127.0.0.1", "::1"}


def test_ranks_of_one_machine_meet_on_the_loopback_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL, which there is none of here, by its variable."""
    stop_distributed()
    start_distributed()
    (loopback,) = (name for name, own in psutil.net_if_addrs().items() if "127.0.0.1" in {a.address for a in own})
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == (loopback, f"={loopback}")
    stop_distributed()
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    start_distributed()
    assert os.environ["NCCL_SOCKET_IFNAME"] == "eth1"
    stop_distributed()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 8 steps, of which ceil(0.2 * 8) = 2 rise: 1/3 and 2/3; then 6 from 1 on the way to 0, where the run ends.
        ("linear", [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
        ("cosine", [1 / 3, 2 / 3, 1, (1 + 3**0.5 / 2) / 2, 3 / 4, 1 / 2, 1 / 4, (1 - 3**0.5 / 2) / 2, 0]),
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    factor = learning_rate_factor(schedule, 0.2, 8)
    assert [factor(step) for step in range(9)] == pytest.approx(expected)


def test_a_schedule_without_warm_up_starts_at_the_peak() -> None:
    assert [learning_rate_factor("linear", 0.0, 2)(step) for step in range(4)] == [1.0, 0.5, 0.0, 0.0]
    assert learning_rate_factor("cosine", 0.99, 1)(0) == 0.5


WAITS = """
import sys
from torch.distributed import distributed_c10d
from repo_fast.engine import start_distributed, stop_distributed

start_distributed(float(sys.argv[1]))
print(distributed_c10d.default_pg_timeout.total_seconds())
stop_distributed()
"""


@pytest.mark.parametrize(
    ("timeout", "environment", "expected"),
    [("20", {}, 20.0), ("7200", {}, 600.0), ("7200", {"DEEPSPEED_TIMEOUT": "45"}, 2700.0)],
)
def test_how_long_ranks_wait_in_an_update(timeout: str, environment: dict[str, str], expected: float) -> None:
    done = run([sys.executable, "-c", WAITS, timeout], environment)
    assert float(done.stdout.splitlines()[-1]) == expected, done.stderr
