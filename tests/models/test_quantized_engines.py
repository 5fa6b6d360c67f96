"""4-bit bases under every ZeRO stage, on one and two ranks: trained, saved and resumed as the dequantised ones are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from transformers import AutoModelForCausalLM

from repo_fast.config import EngineConfig
from repo_fast.engine import Engine, resolve_dtype, sharded_loading, start_distributed, stop_distributed
from repo_fast.errors import InputError
from repo_fast.models import policy as policies
from repo_fast.models.lora import adapters_off, add_lora, describe, merged_state
from repo_fast.models.nf4 import Nf4Linear
from repo_fast.models.policy import Policy
from tests.job_runs import on_ranks, same_bits
from tests.models.test_lora import CPU, LEARNED, LORA, OPTIMIZER, READ, logits, negative_log_likelihood, of_base, packed
from tests.tiny import save_policy, word_tokenizer

SETTINGS = {
    "stage 1": {"zero_stage": 1},
    "stage 2": {"zero_stage": 2},
    "stage 3": {},
    "stage 2, bfloat16": {"zero_stage": 2, "dtype": "bfloat16"},
    "stage 3, bfloat16": {"dtype": "bfloat16"},
    "stage 3, small parameters whole": {"parameter_persistence_threshold": 10_000},
    "stage 3, activation checkpointing": {"activation_checkpointing": True},
    "stage 1, activation checkpointing": {"zero_stage": 1, "activation_checkpointing": True},
    "stage 3, offload of parameters": {"offload_optimizer": True, "offload_parameters": True},
}


class OnARank:
    """What each rank does and notes down."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ranks = folder, start_distributed()

    def load(self, path: Path, config: EngineConfig, quantize: str | None, frozen: bool = False) -> Policy:
        dtype = resolve_dtype(config.dtype, CPU)
        with sharded_loading(config, CPU, frozen=frozen):
            return Policy.from_pretrained(str(path), dtype=dtype, attention="sdpa", quantize=quantize)

    def engine(self, path: Path, quantize: str | None, **settings: Any) -> Engine:
        config = EngineConfig(**{"dtype": "float32", "parameter_persistence_threshold": 0, **settings})
        policy = self.load(path, config, quantize)
        torch.manual_seed(5)
        add_lora(policy.model, **LORA)
        if config.activation_checkpointing:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            policy.model.enable_input_require_grads()
        return Engine(policy, config, self.ranks, OPTIMIZER, steps=10)

    def step(self, engine: Engine) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One optimizer step, with base and policy read before; the loss and the gradients."""
        engine.module.eval()
        with adapters_off(engine.module):
            logits(engine)
        logits(engine)
        engine.module.train()
        shares, losses = LEARNED[self.ranks.rank :: self.ranks.size], []
        for count, pairs in enumerate(shares, start=1):
            loss = engine(packed(pairs), negative_log_likelihood)
            losses.append(loss.detach().clone())
            engine.backward(loss, last=count == len(shares))
        parameters = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        gradients = {name: safe_get_full_grad(parameter).clone() for name, parameter in parameters}
        assert engine.step().applied
        return torch.stack(losses), gradients

    def trained(self, name: str, **settings: Any) -> dict[str, Any]:
        first = self.engine(self.folder / "policy", "nf4", **settings)
        start = first.whole_state()
        # The same model, without 4-bit numbers.
        plain_path = self.folder / name / "plain"
        if self.ranks.is_first:
            policies.save_policy(plain_path, first.module, start, word_tokenizer(), str(self.folder / "policy"))
        self.ranks.max(0)
        plain = self.engine(plain_path, None, **settings)
        found: dict[str, Any] = {"said": describe(first.module), "plain said": describe(plain.module)}
        layers = [layer for layer in first.module.modules() if isinstance(layer, Nf4Linear)]
        found["packed"] = sum(layer.in_features * layer.out_features // 2 for layer in layers)
        found["held"] = sum(getattr(layer.weight, "ds_tensor", layer.weight).numel() for layer in layers)
        found["start"], found["plain start"] = start, plain.whole_state()
        found["steps"] = [self.step(first) for _ in range(3)]
        found["plain steps"] = [self.step(plain) for _ in range(3)]
        found["logits"], found["plain logits"] = logits(first), logits(plain)
        with first.gathered() as module:
            found["gathered"] = logits(module)
        state = first.whole_state()
        found["state"], found["plain state"] = state, plain.whole_state()
        found["one by one"] = {name: weight.cpu().clone() for name, weight in first.weights_one_by_one()}
        found["sample"] = {name: value.dtype for name, value in first.sample_state().items()}
        if self.ranks.is_first:
            merged = self.folder / name / "merged"
            policies.save_policy(merged, first.module, state, word_tokenizer(), str(self.folder / "policy"))
            found["merged"] = merged_state(first.module, state)
        first.save(self.folder / name / "checkpoint")
        try:
            self.engine(self.folder / "other", "nf4", **settings).load(self.folder / name / "checkpoint")
        except InputError as error:
            found["another base"] = str(error)
        resumed = self.engine(self.folder / "policy", "nf4", **settings)
        resumed.load(self.folder / name / "checkpoint")
        found["resumed"] = resumed.whole_state()
        found["goes on"] = self.step(first), self.step(resumed)
        found["went on"] = first.whole_state(), resumed.whole_state()
        return found

    @torch.no_grad()
    def frozen(self, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        config = EngineConfig(**{"dtype": "float32", "parameter_persistence_threshold": 0, **settings})
        model = self.load(self.folder / "policy", config, "nf4", frozen=True)
        whole = logits(model.eval())
        return whole, logits(Engine(model, config, self.ranks))


def measure(folder: Path) -> dict[str, Any]:
    """On each rank of a torchrun."""
    on = OnARank(folder)
    found: dict[str, Any] = {name: on.trained(name, **settings) for name, settings in SETTINGS.items()}
    found["frozen"] = {stage: on.frozen(zero_stage=stage) for stage in (1, 3)}
    found["frozen"]["offload"] = on.frozen(offload_frozen=True)
    stop_distributed()
    return found


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one rank", "two ranks"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and what each rank of a run found."""
    folder = tmp_path_factory.mktemp("quantized")
    save_policy(folder / "policy")
    save_policy(folder / "other", seed=1)
    return folder, on_ranks(request.param, f"{__name__}:measure", folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_is_that_of_the_dequantized_model(runs: tuple[Path, list], name: str) -> None:
    for rank in runs[1]:
        found = rank[name]
        assert found["said"] == found["plain said"] and found["said"].startswith("LoRA rank 4 on 14 layers")
        assert same_bits(found["start"], found["plain start"])
        for ours, theirs in zip(found["steps"], found["plain steps"], strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert same_bits(ours[1], theirs[1])
            assert any(gradient.abs().max() > 0 for gradient in ours[1].values())
        assert torch.equal(found["logits"], found["plain logits"]) and torch.equal(found["logits"], found["gathered"])
        assert same_bits(found["state"], found["plain state"])
        # The base does not move, the adapters do.
        assert same_bits(of_base(found["start"]), of_base(found["state"]))
        assert not found["start"] or not same_bits(found["start"], found["state"])
        assert all(dtype.is_floating_point for dtype in found["sample"].values())
        if found["state"]:
            assert same_bits(found["one by one"], found["state"])


@pytest.mark.parametrize("name", SETTINGS)
def test_stage_3_splits_the_packed_weights(runs: tuple[Path, list], name: str) -> None:
    split = len(runs[1]) if "stage 3" in name else 1
    for rank in runs[1]:
        assert rank[name]["held"] == rank[name]["packed"] // split > 0


@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_holds_all_of_it(runs: tuple[Path, list], name: str) -> None:
    """Beside the base alone that the adapters were trained on: its packed weights and scales."""
    for rank in runs[1]:
        found = rank[name]
        assert "was trained beside frozen weights that are not this model's" in found["another base"]
        assert same_bits(found["resumed"], found["state"])
        (ours, theirs), states = found["goes on"], found["went on"]
        assert torch.equal(ours[0], theirs[0]) and same_bits(ours[1], theirs[1])
        assert same_bits(*states)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_merged_model_is_the_dequantized_one_with_its_adapters(runs: tuple[Path, list], name: str) -> None:
    folder, found = runs[0] / name / "merged", runs[1][0][name]
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    assert {value.dtype for value in found["merged"].values()} == {dtype}
    assert "quantization_config" not in (folder / "config.json").read_text()
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == dtype
    prompt, response = READ
    with torch.no_grad():
        ours = merged(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    gap = {torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(ours, found["logits"], atol=gap, rtol=gap)


def test_frozen_models(runs: tuple[Path, list]) -> None:
    for rank in runs[1]:
        for whole, split in rank["frozen"].values():
            assert torch.equal(whole, split)
