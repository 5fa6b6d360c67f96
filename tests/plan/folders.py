"""Folders of models without weights, for plans."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from repo_fast.models.lora import ADAPTER_FILE, BASE_FINGERPRINT

RANK = 16
WIDTH, INNER = 4096, 11008
# In and out of each linear layer of a block.
_LINEAR = {
    **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
    **{f"mlp.{name}_proj": (WIDTH, INNER) for name in ("gate", "up")},
    "mlp.down_proj": (INNER, WIDTH),
}
ADAPTER_A_LAYER = RANK * sum(map(sum, _LINEAR.values()))


def save_models(folder: Path, layers: int = 32) -> Path:
    """A policy and a score model of the width of a 7B in `policy` and `score`."""
    for name, architecture in (("policy", "LlamaForCausalLM"), ("score", "LlamaForScore")):
        _config(layers, architecture).save_pretrained(folder / name)
    return folder


def save_adapters(folder: Path, policy: Path, layers: int = 32) -> dict[str, str]:
    """Two score models that are adapters on a policy: the paths of all three, by section."""
    layer = "base_model.model.layers.{}.{}.lora_{}.weight"
    zeros = {
        layer.format(i, name, part): torch.zeros(*shape, dtype=torch.bfloat16)
        for i in range(layers)
        for name, (width, out) in _LINEAR.items()
        for part, shape in (("A", (RANK, width)), ("B", (out, RANK)))
    }
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "base_model_name_or_path": str(policy)}
    found = {"policy": str(policy)}
    for name in ("reward", "cost"):
        _config(layers, "LlamaForScore").save_pretrained(folder / name)
        (folder / name / "adapter_config.json").write_text(json.dumps(settings))
        save_file(zeros, folder / name / ADAPTER_FILE, metadata={BASE_FINGERPRINT: "0" * 64, "format": "pt"})
        found[name] = str(folder / name)
    return found


def words_of(recipe: str, folders: dict[str, str], *more: str) -> list[str]:
    return ["--config", recipe, *(word for name, path in folders.items() for word in (f"--{name}.path", path)), *more]


def _config(layers: int, architecture: str) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_attention_heads=32,
        num_hidden_layers=layers,
        vocab_size=32001,
        architectures=[architecture],
    )
