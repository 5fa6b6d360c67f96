"""An update of the learner with everything on CUDA, from the responses to the optimizer's step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")

from repo_fast.collectives import Ranks
from repo_fast.config import DataConfig, EngineConfig, OptimizerConfig, TrainConfig
from repo_fast.engine import Engine, StepResult, resolve_dtype, start_distributed, stop_distributed
from repo_fast.learning.learner import Learner, Models
from repo_fast.models.attention import PACKED
from repo_fast.models.critic import Critic
from repo_fast.models.policy import Policy
from repo_fast.models.score_model import ScoreModel
from tests.cuda.fake import CUDA, FakeCuda, needs_graph
from tests.cuda.runtime import runtime
from tests.learning import learner_worker as worker
from tests.tiny import save_policy

pytestmark = needs_graph
RANKS = Ranks(0, 1, CUDA)


class PlainEngine:
    """Stands for DeepSpeed's, which reads the norm of the gradients back itself: backward and torch's own step."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self) -> StepResult:
        self.optimizer.step()
        return StepResult(True, 1.0, 1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"))


def config_of(advantage: str, share: bool = False) -> TrainConfig:
    data = {"data": DataConfig(ptx="given")} if advantage == "gae" else {}
    config = worker.make_config(worker.SETTINGS[advantage], micro_batch_tokens=60, **data)
    return replace(config, update=replace(config.update, share_prompts=share))


def modules_on(fake: FakeCuda, folder: Path, advantage: str) -> tuple[Policy, Policy, dict[str, Critic]]:
    """The policy, its reference and, with `gae`, a critic."""
    options = {"dtype": torch.bfloat16, "attention": PACKED}
    policy, reference = (fake.on_cuda(Policy.from_pretrained(str(folder), **options)) for _ in range(2))
    critics = {}
    if advantage == "gae":
        model = ScoreModel.from_policy(str(folder), **options)
        critics["reward_cost"] = fake.on_cuda(Critic(model, ("reward", "cost"), torch.bfloat16))
    return policy, reference.requires_grad_(False), critics


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_an_update_waits_for_what_the_contract_allows(advantage: str, share: bool, folder: Path) -> None:
    fake, config = FakeCuda(), config_of(advantage, share)
    policy, reference, critics = modules_on(fake, folder, advantage)
    with fake:
        models = Models(PlainEngine(policy), reference, {name: PlainEngine(critic) for name, critic in critics.items()})
        learner = Learner(config, models, RANKS, worker.demonstrations() if advantage == "gae" else ())
        rollout, scores, _ = worker.make_rollout(Ranks(0, 1, torch.device("cpu")))
        experience, _ = learner.experience(rollout, scores)
        fake.waits.clear()
        fake.launches.clear()
        metrics = learner.update(experience)
    rows = len(learner._rows(rollout, range(9)))
    assert rows == 2 and fake.launches.count("_policy_kernel") == rows + (advantage == "gae")
    assert all(p.grad.device == CUDA for module in (policy, *critics.values()) for p in module.parameters())
    # The policy's: the count of valid rows, a micro-batch; the totals, once.
    expected = ["nonzero"] * rows + ["copy to cpu"]
    if advantage == "gae":
        # The demonstrations', in one row, and the totals of the critic.
        expected += ["nonzero", "copy to cpu"] + ["copy to cpu"]
    assert fake.waits == expected
    assert metrics["gradient_norm"] == 1.0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_is_set_up_for_cuda(stage: int, folder: Path) -> None:
    """Engines, update and steps of every stage, in bfloat16. What goes on between ranks is not shown."""
    fake, config = FakeCuda(), config_of("gae")
    settings, optimizer = EngineConfig(zero_stage=stage), OptimizerConfig()
    assert resolve_dtype(settings.dtype, CUDA) == torch.bfloat16
    policy, reference, critics = modules_on(fake, folder, "gae")
    rollout, scores, _ = worker.make_rollout(Ranks(0, 1, torch.device("cpu")))
    start_distributed()
    with fake, runtime():
        trained = {name: Engine(critic, settings, RANKS, optimizer, steps=4) for name, critic in critics.items()}
        models = Models(
            Engine(policy, settings, RANKS, optimizer, steps=4), Engine(reference, settings, RANKS), trained
        )
        learner = Learner(config, models, RANKS, worker.demonstrations())
        experience, _ = learner.experience(rollout, scores)
        metrics = learner.update(experience)
    assert metrics["steps_skipped"] == 0 and metrics["gradient_norm"] == 1.0
    assert fake.launches.count("_policy_kernel") == 3
    stop_distributed()
