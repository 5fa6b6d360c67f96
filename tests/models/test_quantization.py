"""4-bit bases: exact against the dequantised model, in training and in scoring, on whichever CPU."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from repo_fast.errors import InputError
from repo_fast.models import quantization
from repo_fast.models.blocks import parameter_sizes
from repo_fast.models.lora import adapters_off, add_lora, describe
from repo_fast.models.nf4 import Nf4Linear
from repo_fast.models.policy import Policy
from repo_fast.models.score_model import ScoreModel
from repo_fast.scoring.score_models import EncoderClassifier
from tests.models.test_lora import LORA, READ, logits, move, negative_log_likelihood, packed, score
from tests.tiny import save_beaver, save_policy

DTYPES = [torch.float32, torch.bfloat16]
# Multiples of 64, as bitsandbytes' form for CPUs with AVX-512 wants them.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
# Of different sizes, and a head of its own or the embedding's.
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "odd blocks": {"hidden_size": 24, "intermediate_size": 36},
    "wide": WIDE,
}


def load(path: Path, dtype: torch.dtype, quantize: str | None = "nf4") -> Policy:
    return Policy.from_pretrained(str(path), dtype=dtype, attention="sdpa", quantize=quantize)


@torch.no_grad()
def dequantized(path: Path, quantized: nn.Module, plain: nn.Module) -> nn.Module:
    """The plain model with the weights that the quantised one computes with."""
    for name, layer in quantized.named_modules():
        if isinstance(layer, Linear4bit):
            # Not by the layer's own method.
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.get_submodule(name).weight.copy_(weight)
    return plain


@pytest.fixture(params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_policy(tmp_path / "policy", **SHAPES[request.param])


def both(folder: Path, dtype: torch.dtype, checkpointing: bool = False) -> tuple[Policy, Policy]:
    """A quantised policy with adapters that have left their start, and its dequantised like."""
    quantized = load(folder, dtype)
    plain = dequantized(folder, quantized, load(folder, dtype, None))
    for policy in (quantized, plain):
        torch.manual_seed(3)
        add_lora(policy.model, **LORA)
        move(policy)
        if checkpointing:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            policy.model.enable_input_require_grads()
    return quantized, plain


def gradients(policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """After the model has scored: the loss of a step in training, and its gradients."""
    policy.eval()
    with adapters_off(policy):
        logits(policy)
    logits(policy)
    policy.train()
    loss = policy(packed([READ, ([3, 9], [15, 16, 17])]), negative_log_likelihood)
    loss.backward()
    found = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
    policy.zero_grad()
    return loss.detach(), found


def assert_equal(ours: tuple[torch.Tensor, dict[str, torch.Tensor]], theirs: tuple) -> None:
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) > 0
    for name, gradient in ours[1].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert torch.equal(gradient, theirs[1][name]), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_dequantized_model_to_the_bit(folder: Path, dtype: torch.dtype, checkpointing: bool) -> None:
    quantized, plain = both(folder, dtype, checkpointing)
    with adapters_off(quantized), adapters_off(plain):
        assert torch.equal(logits(quantized), logits(plain))
    assert torch.equal(logits(quantized), logits(plain))
    assert_equal(gradients(quantized), gradients(plain))
    # It is another model than the one in the files.
    before = load(folder, dtype, None)
    with adapters_off(quantized):
        assert (logits(quantized) - logits(before)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_quantized(folder: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    policy, plain = load(folder, dtype), load(folder, dtype, None)
    quantized = {name for name, layer in policy.named_modules() if isinstance(layer, Linear4bit)}
    expected = {n for n, layer in plain.named_modules() if isinstance(layer, nn.Linear) and ".layers." in n}
    assert quantized == expected and len(expected) == 14
    for name, parameter in policy.named_parameters():
        owner = name.rpartition(".")[0]
        packed = owner in quantized and name.endswith(".weight")
        assert parameter.dtype == (torch.uint8 if packed else dtype)
        assert parameter.requires_grad != packed
    # As the model without: what is counted, and what is written of it, which is plain weights.
    assert sum(size for size, _ in parameter_sizes(policy)) == sum(p.numel() for p in plain.parameters())
    assert policy.model.config.to_dict() == plain.model.config.to_dict()
    assert not {"hf_quantizer", "is_quantized", "is_loaded_in_4bit"} & vars(policy.model).keys()
    share = sum(plain.get_submodule(n).weight.numel() for n in quantized) / sum(p.numel() for p in plain.parameters())
    count = sum(p.numel() for p in plain.parameters())
    assert f"{folder}: {100 * share:.1f} % of {count:,} parameters in 4 bits (nf4)" in caplog.text
    add_lora(policy.model, **LORA)
    add_lora(plain.model, **LORA)
    assert describe(policy) == describe(plain)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {dtype}


@pytest.fixture
def cpu_with_avx512(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What bitsandbytes takes this CPU for, whichever it is."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    yield


def test_scoring_leaves_the_weights_as_they_are(tmp_path: Path, cpu_with_avx512: None) -> None:
    folder = save_policy(tmp_path / "policy", **WIDE)
    quantized, plain = both(folder, torch.float32)
    layers = [layer for layer in quantized.modules() if isinstance(layer, Linear4bit)]
    before = [layer.weight.data.clone() for layer in layers]
    assert_equal(gradients(quantized), gradients(plain))
    assert all(torch.equal(layer.weight.data, b) for layer, b in zip(layers, before, strict=True))
    # The trap, set: the same steps, with bitsandbytes' own mind of such a CPU. Its product may fail on another; that
    # the weights are packed anew for it shows in any case.
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    try:
        sprung = gradients(quantized)[1]
    except Exception:  # whatever the missing product makes of it
        sprung = {}
    assert not any(
        torch.equal(layer.weight.data.flatten(), b.flatten()) for layer, b in zip(layers, before, strict=True)
    )
    right = gradients(plain)[1]
    assert all(not torch.equal(gradient, right[name]) for name, gradient in sprung.items() if gradient is not None)


def test_a_state_goes_back(tmp_path: Path) -> None:
    """Of another base into this one: packed numbers and scales both."""
    states = {}
    for seed in (0, 1):
        policy = load(save_policy(tmp_path / str(seed), seed=seed), torch.float32)
        states[seed] = {name: value.clone() for name, value in policy.state_dict().items()}
    assert sum(name.endswith("_extra_state") for name in states[0]) == 14
    other = logits(policy)
    policy.load_state_dict(states[0])
    first = load(tmp_path / "0", torch.float32)
    assert torch.equal(logits(policy), logits(first)) and not torch.equal(other, logits(first))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_score_model(tmp_path: Path, dtype: torch.dtype) -> None:
    path = str(save_beaver(tmp_path / "cost", bias=True))
    quantized = ScoreModel.from_pretrained(path, dtype=dtype, quantize="nf4")
    plain = dequantized(tmp_path, quantized, ScoreModel.from_pretrained(path, dtype=dtype))
    assert quantization.quantized_size(quantized) > 0 and type(quantized.score_head).__name__ == "ScoreHead"
    with torch.no_grad():
        assert torch.equal(score(quantized), score(plain))
    assert quantization.quantized_size(ScoreModel.from_policy(path, dtype=dtype, quantize="nf4")) > 0


def test_an_encoder(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    quantized = EncoderClassifier.from_pretrained(str(tmp_path), dtype=torch.float32, quantize="nf4").eval()
    plain = EncoderClassifier.from_pretrained(str(tmp_path), dtype=torch.float32).eval()
    names = {name for name, layer in quantized.named_modules() if isinstance(layer, Nf4Linear)}
    assert names and all(".encoder.layer." in name for name in names)
    inputs = {"input_ids": torch.tensor([[1, 5, 9, 2]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    with torch.no_grad():
        assert torch.equal(quantized(**inputs), dequantized(tmp_path, quantized, plain)(**inputs))


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="GPT2LMHeadModel has no linear layers in its blocks"):
        load(tmp_path / "gpt2", torch.float32)
    path = save_policy(tmp_path / "policy")
    with monkeypatch.context() as patch:
        patch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InputError) as error:
            load(path, torch.float32)
    assert str(error.value) == (
        f"quantize is nf4 for {str(path)!r}, and bitsandbytes is not installed: expected pip install "
        "repo_fast[quantize]"
    )
    settings = (path / "config.json").read_text().rstrip().removesuffix("}") + ', "quantization_config": '
    (path / "config.json").write_text(settings + '{"quant_method": "bitsandbytes", "load_in_4bit": true}}')
    for quantize in ("nf4", None):
        with pytest.raises(InputError, match="is quantised already .*bitsandbytes.*, expected plain weights"):
            load(path, torch.float32, quantize)
