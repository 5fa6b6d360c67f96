"""4-bit bases in the plan: bytes on paper are those of the loaded model and of an engine, at every stage."""

import itertools
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
from repo_fast.plan.memory import memory
from repo_fast.plan.networks import network, networks
from tests.job_runs import Job, on_ranks
from tests.plan.test_plan_memory import CPU, LLAMA, SCORER, backward, live_bytes, shrink_the_bucket
from tests.tiny import save_beaver, word_tokenizer

LORA = LoraConfig(rank=4)
BASE = ("policy", "nf4")


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
    planned = network("policy", LLAMA, dtype, head=True, lora=LORA, base=BASE)
    assert planned.shared_bytes(dtype.itemsize) == held and planned.scale_bytes == scales > 0
    assert planned.weight_bytes(dtype.itemsize, 4) == held / 4 + scales
    plain = network("policy", LLAMA, dtype, head=True, lora=LORA)
    assert (planned.parameters, planned.trained, planned.shape) == (plain.parameters, plain.trained, plain.shape)
    assert plain.weight_bytes(dtype.itemsize) == dtype.itemsize * plain.parameters


def held_after_a_step(folder: Path) -> dict:
    """On each rank of a torchrun: what an engine holds, by stage and dtype."""
    held, engines = {}, []
    with pytest.MonkeyPatch.context() as patch:
        shrink_the_bucket(patch, 10_000)
        ranks = start_distributed()
        for stage, dtype in itertools.product((1, 2, 3), (torch.float32, torch.bfloat16)):
            before = live_bytes()
            settings = {"zero_stage": stage, "dtype": str(dtype).removeprefix("torch.")}
            config = EngineConfig(**settings, parameter_persistence_threshold=0)
            with sharded_loading(config, CPU):
                policy = load(folder / "policy", dtype)
            engine = Engine(policy, config, ranks, OptimizerConfig())
            for _ in range(2):
                engine.backward(backward(engine), last=True)
                engine.step()
            held[stage, dtype] = live_bytes() - before
            # Not let go of, or the next would be measured against what it frees.
            engines.append(engine)
        stop_distributed()
    return held


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_stays_is_what_deepspeed_holds(ranks: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_the_bucket(monkeypatch, 10_000)
    for held in on_ranks(ranks, f"{__name__}:held_after_a_step", folder.parent):
        for (stage, dtype), measured in held.items():
            settings = TrainConfig(engine=EngineConfig(zero_stage=stage), reward=SCORER, cost=SCORER)
            planned = network("policy", LLAMA, dtype, head=True, lora=LORA, base=BASE)
            total = memory(settings, [planned], ranks, dtype, CPU).resident_total
            assert total == pytest.approx(measured, rel=0.03), (stage, dtype)


def test_the_plan_of_a_run(job: Job, tmp_path: Path) -> None:
    """Each model by its own option; the whole needs less."""
    cost = save_beaver(tmp_path / "cost", config_overrides={"score_type": "cost"})
    words = job.words(tmp_path / "run", "--policy.lora.rank 2", "--critics.lora.rank 2", f"--cost.path {cost}")
    quantized = ["--policy.quantize", "nf4", "--cost.quantize", "nf4"]
    held = {}
    for name, more in (("plain", []), ("nf4", quantized)):
        config = parse(words + more, TrainConfig)
        models = networks(config, torch.bfloat16)
        held[name] = memory(config, models, 1, torch.bfloat16, CPU).resident
    assert {model.role for model in models if model.quantized} == {"policy", "cost"}
    for role, parts in held["nf4"].items():
        before = held["plain"][role]["weights"]
        assert parts["weights"] < 0.8 * before if role in ("policy", "cost") else parts["weights"] == before
