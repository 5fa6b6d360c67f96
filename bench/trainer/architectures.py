"""Which architectures the trainer takes, and how it runs several sequences of them at once.

A small model with random weights of each architecture is loaded as a policy is, its attention settled (`auto`), and the
log-probabilities of three packed sequences compared with those that transformers alone gives for each.

    python -m bench.trainer.architectures                # all, in half a minute, as a table
    python -m bench.trainer.architectures gpt2 bloom     # some
"""

import re
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from bench.measuring.tables import render
from repo_fast.collectives import Ranks
from repo_fast.config import EngineConfig, OptimizerConfig
from repo_fast.engine import Engine, start_distributed, stop_distributed
from repo_fast.errors import InputError, first_line
from repo_fast.jobs.assembly import settle_policy
from repo_fast.models.attention import PADDED, attention_candidates
from repo_fast.models.policy import Policy
from repo_fast.packing.rows import pack
from repo_fast.rollout.hf import check_generation

_COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_HEADS = {"head_dim": 8}
_LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# By transformers' model type: what differs from a Llama's settings.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": _HEADS,
    "gemma": _HEADS,
    "gemma2": _HEADS | {"sliding_window": 5},
    "vaultgemma": _HEADS | {"sliding_window": 5},
    "gemma3_text": _HEADS | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "smollm3": {},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 1.0},
    "hyperclovax": {"logits_scaling": 0.25},
    "nanochat": _HEADS | {"final_logit_softcapping": 15.0},
    "stablelm": {},
    "starcoder2": {},
    "gpt_neox": {},
    "nemotron": {},
    "persimmon": {},
    "glm": _HEADS,
    "glm4": _HEADS,
    "helium": _HEADS,
    "ernie4_5": _HEADS,
    "seed_oss": _HEADS,
    "exaone4": {},
    "arcee": {},
    "apertus": {},
    "diffllama": {},
    "gpt2": _GPT2,
    "gptj": _GPT2 | {"rotary_dim": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    "gpt_bigcode": _GPT2,
    "codegen": _GPT2 | {"rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"new_decoder_architecture": False},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "biogpt": {},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "openai-gpt": _GPT2,
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": _EXPERTS | _HEADS,
    "gpt_oss": _EXPERTS | _HEADS | {"sliding_window": 5},
    "olmoe": _EXPERTS,
    "granitemoe": _EXPERTS | {"logits_scaling": 8.0},
    "phimoe": _EXPERTS,
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "rwkv": {"attention_hidden_size": 32},
    "recurrent_gemma": {"attention_window_size": 16, "lru_width": 32},
    "jamba": _EXPERTS
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 8},
    "falcon_h1": _HEADS | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8, "lm_head_multiplier": 0.5},
    "qwen3_next": _EXPERTS
    | _HEADS
    | _LINEAR_ATTENTION
    | {"shared_expert_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
_LENGTHS = (5, 9, 7)


@dataclass(frozen=True)
class Outcome:
    """What the trainer does with an architecture.

    Attributes:
        way: `packed`, `padded`, the attention under a mask, or `refused`.
        reason: Why it is not the fastest.
        gap: Largest difference of a log-probability to transformers alone (nats); None where it is refused.
        drawing: Why transformers' `generate` cannot draw from it as it is trained; empty where it can.
    """

    way: str
    reason: str
    gap: float | None
    drawing: str = ""


def config_of(architecture: str) -> PretrainedConfig:
    """The configuration of a small model."""
    return CONFIG_MAPPING[architecture](**{**_COMMON, **ARCHITECTURES[architecture]})


def save_model(config: PretrainedConfig, folder: Path, seed: int = 0) -> None:
    """Write a causal language model whose weights are large enough that nothing wrong is lost in rounding."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)


def measure(folder: Path, ranks: Ranks, attention: str = "auto") -> Outcome:
    """Load a folder as a policy is, settle its attention, and compare it with transformers alone, in float32."""
    device = ranks.device
    candidates = attention_candidates(attention, device, torch.float32)
    try:
        policy = Policy.from_pretrained(str(folder), dtype=torch.float32, attention=candidates)
        engine = Engine(policy, EngineConfig(zero_stage=1), ranks, OptimizerConfig())
        said = settle_policy("the policy", engine, attention, ranks)
    except InputError as error:
        return Outcome("refused", str(error).removeprefix(repr(str(folder))).strip(), None)
    torch.manual_seed(1)
    sequences = [torch.randint(3, _COMMON["vocab_size"], (length,)) for length in _LENGTHS]
    row = pack([tokens[:1] for tokens in sequences], [tokens[1:] for tokens in sequences], device)
    # Eager attention leaves nothing out that layers ask of it.
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().to(device)
    with torch.no_grad():
        expected = [plain(tokens[None].to(device), use_cache=False).logits[0, :-1] for tokens in sequences]
        ours = engine(row, lambda hidden, projection, _: projection.logits(hidden).log_softmax(-1))
    gap = (ours - torch.cat(expected).log_softmax(-1)).abs().max()
    way, _, reason = said.partition("; ")
    return Outcome(PADDED if way.startswith(PADDED) else way, reason, float(gap), _fault_in_drawing(plain, device))


def _fault_in_drawing(model: PreTrainedModel, device: torch.device) -> str:
    try:
        check_generation(model, 0, device, batch_size=2)
    except Exception as error:  # whatever `generate` raises
        return re.sub(r"; choose .*", "", first_line(error))
    return ""


def main(names: list[str]) -> None:
    """Print the table."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        raise SystemExit(f"unknown architecture {unknown[0]!r}, expected some of {', '.join(ARCHITECTURES)}")
    ranks = start_distributed()
    rows = []
    for name in names or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            save_model(config_of(name), Path(folder))
            outcome = measure(Path(folder), ranks)
        gap = "" if outcome.gap is None else f"{outcome.gap:.0e}"
        rows.append([name, outcome.way, gap, outcome.reason, outcome.drawing])
    stop_distributed()
    print(render(["architecture", "run", "largest difference nats", "why not packed", "why not drawn from"], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
