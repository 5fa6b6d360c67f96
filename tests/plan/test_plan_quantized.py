"""4-bit bases in the plan: bytes on paper are those of the loaded model and of an engine, at every stage."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from repo_fast.config import EngineConfig, LoraConfig, OptimizerConfig, TrainConfig, parse
from repo_fast.engine import Engine, sharded_loading, start_distributed, stop_distributed
from repo_fast.models.attention import PACKED
from repo_fast.models.lora import add_lora
from repo_fast.models.nf4 import Nf4Linear
from repo_fast.models.policy import Policy
from repo_fast.plan.__main__ import describe
from repo_fast.plan.memory import memory
from repo_fast.plan.networks import network, networks
from repo_fast.plan.speed import DEVICES
from tests.job_runs import Job
from tests.plan.test_plan_memory import CPU, LLAMA, SCORER, backward, live_bytes, shrink_the_bucket
from tests.tiny import save_beaver, word_tokenizer

LORA = LoraConfig(rank=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "policy"
    LlamaForCausalLM._from_config(LLAMA, dtype=torch.float32).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def load(folder: Path, dtype: torch.dtype) -> Policy:
    policy = Policy.from_pretrained(str(folder), dtype=dtype, attention=PACKED, quantize="nf4")
    add_lora(policy.model, rank=LORA.rank, alpha=LORA.alpha)
    return policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_those_of_the_loaded_model(folder: Path, dtype: torch.dtype) -> None:
    policy = load(folder, dtype)
    layers = [layer for layer in policy.modules() if isinstance(layer, Nf4Linear)]
    held = sum(p.numel() * p.element_size() for p in policy.parameters())
    scales = sum(layer.quant_state.absmax.nbytes for layer in layers)
    planned = network("policy", LLAMA, dtype, head=True, lora=LORA, quantize="nf4")
    assert planned.shared_bytes(dtype.itemsize) == held and planned.scale_bytes == scales > 0
    assert planned.weight_bytes(dtype.itemsize, 4) == held / 4 + scales
    plain = network("policy", LLAMA, dtype, head=True, lora=LORA)
    assert (planned.parameters, planned.trained, planned.shape) == (plain.parameters, plain.trained, plain.shape)
    assert plain.weight_bytes(dtype.itemsize) == dtype.itemsize * plain.parameters


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_stays_is_what_deepspeed_holds(
    folder: Path, stage: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_the_bucket(monkeypatch, 10_000)
    ranks = start_distributed()
    before = live_bytes()
    name = str(dtype).removeprefix("torch.")
    config = EngineConfig(zero_stage=stage, dtype=name, parameter_persistence_threshold=0)  # type: ignore[arg-type]
    with sharded_loading(config, CPU):
        policy = load(folder, dtype)
    engine = Engine(policy, config, ranks, OptimizerConfig())
    for _ in range(2):
        engine.backward(backward(engine), last=True)
        engine.step()
    measured = live_bytes() - before
    planned = network("policy", LLAMA, dtype, head=True, lora=LORA, quantize="nf4")
    settings = TrainConfig(engine=config, reward=SCORER, cost=SCORER)
    assert memory(settings, [planned], 1, dtype, CPU).resident_total == pytest.approx(measured, rel=0.03)
    stop_distributed()


def test_the_plan_of_a_run(job: Job, tmp_path: Path) -> None:
    """Each model by its own option; the whole needs less."""
    cost = save_beaver(tmp_path / "cost", config_overrides={"score_type": "cost"})
    words = job.words(tmp_path / "run", "--policy.lora.rank 2", "--critics.lora.rank 2", f"--cost.path {cost}")
    quantized = ["--policy.quantize", "nf4", "--cost.quantize", "nf4"]
    config = parse(words + quantized, TrainConfig)
    found = {model.role: model.quantized for model in networks(config, torch.bfloat16)}
    assert found["policy"] > 0 and found["cost"] > 0
    assert {role for role, count in found.items() if count} == {"policy", "cost"}
    text = describe(config, 1, DEVICES["h100"])
    assert "policy" in text and text != describe(parse(words, TrainConfig), 1, DEVICES["h100"])
