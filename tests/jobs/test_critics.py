"""Critics on one trunk, and critics with adapters."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaModel

from repo_fast.config import CriticConfig, LoraConfig, parse
from repo_fast.engine import Engine, start_distributed
from repo_fast.jobs.inputs import read_inputs
from repo_fast.jobs.trainer import Trainer
from repo_fast.rollout.seeds import Purpose
from tests.job_runs import Job, engines, metrics, same_bits, states, weights
from tests.learning import learner_worker as worker
from tests.supervised_runs import norm_wise
from tests.tiny import save_beaver, save_policy, tiny_llama_config, word_tokenizer

STREAMS = ("reward", "cost")
SHARED = "--critics.shared_trunk true"


def naive_value_loss(
    trunk: LlamaModel, head: torch.Tensor, experience, stream: str, clip: float = 5.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a stream, a sequence and a token at a time, and its values."""
    rollout, sequences, seen = experience.rollout, [], []
    lengths = [len(response) for response in rollout.response_tokens]
    old, returns = (getattr(experience, f"{stream}_{name}").double().split(lengths) for name in ("values", "returns"))
    for i, (prompt, response) in enumerate(zip(rollout.prompt_tokens, rollout.response_tokens, strict=True)):
        hidden = trunk(torch.cat([prompt, response])[None]).last_hidden_state[0, len(prompt) - 1 : -1]
        losses = []
        for value, before, target in zip(hidden @ head, old[i], returns[i], strict=True):
            clipped = before + (value - before).clamp(-clip, clip)
            losses.append(0.5 * torch.maximum((value - target) ** 2, (clipped - target) ** 2))
            seen.append(value.detach())
        sequences.append(torch.stack(losses).mean())
    return torch.stack(sequences).mean(), torch.stack(seen)


def make_learner(folder: Path, critics: CriticConfig, rate: float) -> worker.Learner:
    config = worker.make_config({"name": "repo", "advantage": "gae"}, 40)
    return worker.make_learner(replace(config, critics=critics), folder, start_distributed(), rate=rate)


def test_an_update_of_a_shared_trunk_is_that_of_the_sum_of_both_losses(tmp_path: Path) -> None:
    """The second one: the first gives the heads, which start at zero, something to pass on to the trunk."""
    folder, ranks = save_policy(tmp_path / "policy"), start_distributed()
    learner = make_learner(folder, CriticConfig(shared_trunk=True), rate=0.3)
    assert list(learner.models.critics) == ["reward_cost"]
    before = worker.one_update(learner, ranks)["weights"]
    result = worker.one_update(learner, ranks)

    trunk = LlamaModel(tiny_llama_config(len(word_tokenizer()))).double()
    prefix = "reward_cost/trunk."
    start = {name.removeprefix(prefix): value for name, value in before.items() if name.startswith(prefix)}
    trunk.load_state_dict(start)
    heads = {stream: before[f"reward_cost/heads.{stream}.weight"][0].double().requires_grad_() for stream in STREAMS}
    parts = {stream: naive_value_loss(trunk, heads[stream], result["experience"], stream) for stream in STREAMS}
    for stream, (loss, values) in parts.items():
        # What the experience was made with: row and stream belong together.
        torch.testing.assert_close(
            getattr(result["experience"], f"{stream}_values").double(), values, atol=1e-5, rtol=1e-5
        )
        assert values.std() > 1e-3
        assert result["metrics"][f"{stream}_value_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert not torch.allclose(parts["reward"][1], parts["cost"][1])
    (parts["reward"][0] + parts["cost"][0]).backward()
    expected = {prefix + name: parameter.grad for name, parameter in trunk.named_parameters()}
    expected |= {f"reward_cost/heads.{stream}.weight": head.grad[None] for stream, head in heads.items()}
    ours = {name: value for name, value in result["gradients"].items() if name.startswith("reward_cost/")}
    assert ours.keys() == expected.keys()
    assert norm_wise(ours, expected, {}) <= 1e-5
    of_trunk = {name: value for name, value in expected.items() if name.startswith(prefix)}
    assert norm_wise(ours, of_trunk, {}) <= 1e-5
    norm = torch.stack([gradient.square().sum() for gradient in expected.values()]).sum().sqrt().item()
    rate = 0.3 * min(1.0, 1.0 / norm)
    after = {name: value - rate * expected[name] for name, value in before.items() if name in expected}
    assert norm_wise(result["weights"], after, before) <= 1e-5


@pytest.mark.parametrize("shared", [False, True])
def test_adapters_and_heads_alone_are_trained(tmp_path: Path, shared: bool) -> None:
    """Three updates: of the head, then of an adapter's second matrix, then of its first."""
    folder, ranks = save_policy(tmp_path / "policy"), start_distributed()
    learner = make_learner(folder, CriticConfig(shared_trunk=shared, lora=LoraConfig(rank=2)), rate=0.3)
    names = ["reward_cost"] if shared else list(STREAMS)
    start = {
        f"{name}/{key}": value for name in names for key, value in learner.models.critics[name].whole_state().items()
    }
    for _ in range(3):
        result = worker.one_update(learner, ranks)
    trained = {name for name in result["gradients"] if not name.startswith("policy/")}
    assert trained == {name for name in start if ".lora_" in name or "/heads." in name}
    assert len(trained) == (2 * 14 + 2 if shared else 2 * (2 * 14 + 1))
    moved = {name for name, value in start.items() if not torch.equal(result["weights"][name], value)}
    assert moved == trained
    # The policy is trained as a whole: the critics' adapters are their own.
    assert not any("lora" in name for name in result["gradients"] if name.startswith("policy/"))


# --------------------------------------------------------------------------------------------------- through a run


def make_trainer(job: Job, folder: Path, *options: str) -> Trainer:
    """A run that has not started, on score models that have the policy's tokenizer."""
    for seed, stream in enumerate(STREAMS, start=3):
        if not (folder / stream).exists():
            save_beaver(folder / stream, tokenizer=word_tokenizer(), seed=seed, config_overrides={"score_type": stream})
    paths = [f"--{stream}.path {folder / stream}" for stream in STREAMS]
    config = parse(job.words(folder / "run", *paths, *options))
    return Trainer(config, read_inputs(config), start_distributed())


def test_a_shared_critic_starts_from_the_reward_streams(job: Job, tmp_path: Path) -> None:
    """And its second head at zero."""
    apart, shared = make_trainer(job, tmp_path), make_trainer(job, tmp_path, SHARED)
    rollout = shared.generate(*shared.share_requests(shared.inputs.requests, 1, Purpose.TRAINING))
    values = shared.learner.values(shared.learner.models.critics["reward_cost"], rollout)
    of_reward = apart.learner.values(apart.learner.models.critics["reward"], rollout)
    assert torch.equal(values[0], of_reward[0])
    assert of_reward.std() > 0.1
    assert not values[1].any()
    assert apart.learner.values(apart.learner.models.critics["cost"], rollout).any()


def memory(engine: Engine) -> int:
    """Bytes of weights, masters, gradients and Adam's moments, as DeepSpeed holds them on one rank after a step."""
    optimizer = engine._engine.optimizer
    masters = optimizer.fp32_partitioned_groups_flat
    moments = [optimizer.optimizer.state[master][name] for master in masters for name in ("exp_avg", "exp_avg_sq")]
    weights = [parameter.ds_tensor for parameter in engine.module.parameters()]
    tensors = [*weights, *masters, optimizer.grad_partitions_flat_buffer, *moments]
    assert len({tensor.untyped_storage().data_ptr() for tensor in (weights[0], *tensors[len(weights) :])}) > 4
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    "options", [(), ("--engine.dtype bfloat16", "--critics.lora.rank 2")], ids=["whole", "adapters"]
)
def test_the_memory_saved_is_said(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture, options: tuple[str, ...]
) -> None:
    caplog.set_level("INFO", "repo_fast")
    apart = make_trainer(job, tmp_path / "apart", *options, "--total_steps 1")
    assert "share one trunk" not in caplog.text
    shared = make_trainer(job, tmp_path / "shared", *options, SHARED, "--total_steps 1")
    (line,) = [record.getMessage() for record in caplog.records if "share one trunk" in record.getMessage()]
    count, said = re.search(r"one trunk of ([\d,]+) parameters: (\S+) GB saved", line).groups()
    trunk = shared.learner.models.critics["reward_cost"].module.trunk
    assert int(count.replace(",", "")) == sum(parameter.ds_numel for parameter in trunk.parameters())
    assert apart.run() == shared.run() == 0
    saved = sum(memory(engine) for engine in apart.learner.models.critics.values())
    saved -= memory(shared.learner.models.critics["reward_cost"])
    assert float(said) * 1e9 == pytest.approx(saved, rel=0.01)


def test_what_is_shared_anyway_is_not_said_to_be_saved(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two critics' frozen weights would be one copy, in 4 bits or not."""
    caplog.set_level("INFO", "repo_fast")
    adapters = ("--critics.lora.rank 2", "--policy.lora.rank 2", "--engine.zero_stage 2")
    for name, options in (("plain", ()), ("nf4", ("--critics.quantize nf4", "--policy.quantize nf4"))):
        caplog.clear()
        trainer = make_trainer(job, tmp_path / name, *adapters, *options, SHARED)
        trunk = trainer.learner.models.critics["reward_cost"].module.trunk
        trained = sum(parameter.numel() for parameter in trunk.parameters() if parameter.requires_grad)
        said = re.search(r"parameters: (\S+) GB saved", caplog.text)
        assert said is not None and float(said[1]) * 1e9 == pytest.approx((4 + 16) * trained, rel=0.01)


def test_a_shared_critic_resumes_exactly(job: Job, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = (SHARED, "--total_steps 3")
    assert job.here(whole, *options) == 0
    assert job.here(stopped, *options, "--stop_after 2") == 0
    assert job.here(stopped, *options, "--resume auto") == 0
    assert metrics(stopped) == metrics(whole)
    assert same_bits(weights(stopped), weights(whole))
    assert engines(whole, 3) == {"policy", "reward_cost_critic"}
    assert states(stopped, 3) == states(whole, 3)
    for stream in STREAMS:
        assert len({row[f"{stream}_value_loss"] for row in metrics(whole)}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--algorithm.advantage rloo", r"algorithm\.name 'repo' and algorithm\.advantage 'rloo'"),
        ("--algorithm.advantage grpo", r"algorithm\.name 'repo' and algorithm\.advantage 'grpo'"),
        ("--algorithm.name ppo", r"algorithm\.name 'ppo' and algorithm\.advantage 'gae'"),
        ("--algorithm.name reward_shaping", r"algorithm\.name 'reward_shaping' and algorithm\.advantage 'gae'"),
    ],
)
def test_refused_where_there_are_not_two_critics(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture, options: str, message: str
) -> None:
    assert job.here(tmp_path / "run", SHARED, options) == 2
    expected = rf"error: critics\.shared_trunk is true with {message}, which have not two critics; .*\n"
    assert re.fullmatch(expected, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
