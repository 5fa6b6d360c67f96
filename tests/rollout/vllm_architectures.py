"""Policies of several architectures, drawn from by vLLM in one process, for `tests/rollout/test_vllm.py`."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from repo_fast.collectives import Ranks
from repo_fast.config import EngineConfig, OptimizerConfig, RolloutConfig, RolloutVllmConfig
from repo_fast.data import Prompt
from repo_fast.engine import Engine, start_distributed, stop_distributed
from repo_fast.errors import InputError
from repo_fast.models.loss_head import summed_cross_entropy
from repo_fast.models.policy import Policy
from repo_fast.packing.rows import pack
from repo_fast.rollout import Request, Rollout
from tests.tiny import word_tokenizer

# The smallest heads that vLLM's attention takes on a CPU are of 32. With the weights of the other tests, four times as
# large, float32 itself is off by 1e-5: each of the two from the truth in float64, and in opposite directions.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 0.05,
}
TOKENIZER = word_tokenizer()
COMMON: dict[str, Any] = SIZES | {
    "vocab_size": len(TOKENIZER),
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4}
ROUTED: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
# The mixtures first: vLLM opens the group of their experts only with its first model.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3Moe": ("Qwen3MoeForCausalLM", ROUTED | {"num_experts": 4}),
    "Mixtral": ("MixtralForCausalLM", EXPERTS),
    # A bias that is a buffer chooses the experts.
    "Glm4Moe": ("Glm4MoeForCausalLM", ROUTED | {"n_routed_experts": 4, "first_k_dense_replace": 1}),
    "GptOss": ("GptOssForCausalLM", EXPERTS),
    "Llama": ("LlamaForCausalLM", {}),
    "Qwen2": ("Qwen2ForCausalLM", {}),
    "Qwen3": ("Qwen3ForCausalLM", {}),
    "Gemma3": ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 32, "sliding_window": 16}),
    "Olmo2": ("Olmo2ForCausalLM", {}),
    # What they make of logits vLLM does by itself: caps, a factor, its inverse, a bias.
    "Gemma2": (
        "Gemma2ForCausalLM",
        {"query_pre_attn_scalar": 32, "sliding_window": 16, "final_logit_softcapping": 2.0},
    ),
    "Cohere": ("CohereForCausalLM", {"logit_scale": 0.25}),
    "Granite": ("GraniteForCausalLM", {"logits_scaling": 4.0}),
    "Phi": ("PhiForCausalLM", {}),
}
_BOTH = [
    f"{name}, {head}"
    for name in ("Llama", "Qwen2", "Qwen3", "Gemma3", "Qwen3Moe", "Mixtral")
    for head in ("tied", "untied")
]
_CHANGED = ["Gemma2, tied", "Cohere, tied", "Granite, tied", "Granite, untied"]
# Of the last two, the configuration says tied; their files have a head too, the same or another.
DRAWN = [*_BOTH, *_CHANGED, "Glm4Moe, untied", "Llama, tied and repeated", "Llama, tied and another"]
_OFF = r"^vLLM does not compute what the policy '.*' does: log-probabilities of 128 tokens differ by \d"
_NONE = r"^vLLM has no model of its own for the .*ForCausalLM '.*'; choose --rollout.engine hf$"
# Experts that vLLM loads past what packs them; a head that it never loads; classes of transformers' that it changes.
REFUSED = {"GptOss, untied": _OFF, "Cohere, untied": _OFF, "Olmo2, untied": _NONE, "Phi, untied": _NONE}
UNPACKED = ["Qwen3Moe, untied"]
PROMPTS = [torch.tensor([1, 4, 20, 13, 15]), torch.tensor([1, 4, 22]), torch.tensor([1, 9, 17, 25, 16, 14, 21])]


def save(name: str, folder: Path) -> str:
    """Write a model with random weights, also where others start at 0 or 1."""
    model, _, head = name.partition(", ")
    kind, options = MODELS[model]
    kind = getattr(transformers, kind)
    config = kind.config_class(**COMMON | options, tie_word_embeddings=head != "untied")
    config.pad_token_id = None
    torch.manual_seed(0)
    made = kind(config)
    with torch.no_grad():
        for value in made.state_dict().values():
            if value.dim() == 1:
                value.add_(0.1 * torch.randn_like(value))
            elif value.dim() == 3:
                # Experts, which at this size say little.
                value.mul_(4.0)
    path = folder / name
    made.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    if "and" in head:
        file = path / "model.safetensors"
        weights = load_file(file)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * (1.0 if head.endswith("repeated") else 0.5)
        save_file(weights, file, metadata={"format": "pt"})
    return str(path)


def start(path: str, ranks: Ranks) -> Engine:
    config = EngineConfig(zero_stage=2, dtype="float32")
    policy = Policy.from_pretrained(path, dtype=torch.float32, attention="eager")
    return Engine(policy, config, ranks, OptimizerConfig(learning_rate=1e-2, warmup=0.0), steps=4)


def sampler(path: str, policy: Engine, ranks: Ranks) -> Any:
    from repo_fast.rollout.vllm_sampler import VllmSampler

    settings = RolloutConfig(engine="vllm", temperature=0.8, max_new_tokens=8, vllm=RolloutVllmConfig(compile=False))
    return VllmSampler(
        path, policy, TOKENIZER, settings, ranks, dtype=torch.float32, longest=32, seed=0, pad_is_new=False
    )


@torch.no_grad()
def plain_log_probs(policy: Engine, rollout: Rollout) -> torch.Tensor:
    """The responses' by transformers alone, from logits, sequence by sequence."""
    found = []
    for prompt, response in zip(rollout.prompt_tokens, rollout.response_tokens, strict=True):
        logits = policy.module.model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        found.append((logits / 0.8).log_softmax(-1).gather(1, response[:, None])[:, 0])
    return torch.cat(found)


def update(policy: Engine, rollout: Rollout) -> None:
    batch = pack(rollout.prompt_tokens[:1], rollout.response_tokens[:1], torch.device("cpu"))
    loss = policy(batch, lambda hidden, projection, batch: summed_cross_entropy(hidden, projection, batch.targets))
    policy.backward(loss, last=True)
    assert policy.step().applied


def gaps(path: str, ranks: Ranks) -> dict[str, list[float]]:
    """At the start and after each of two updates: the largest gap; by how much each update moved the responses."""
    policy = start(path, ranks)
    engine = sampler(path, policy, ranks)
    requests = [Request(Prompt(i, "p"), tokens) for i, tokens in enumerate(PROMPTS)]
    found: dict[str, list[float]] = {"gaps": [], "moves": []}
    for updates in range(3):
        rollout = engine.draw(policy, requests, range(len(requests)))
        theirs, ours = torch.cat(rollout.sampler_log_probs), plain_log_probs(policy, rollout)
        found["gaps"].append(float((theirs - ours).abs().max()))
        if updates < 2:
            update(policy, rollout)
            found["moves"].append(float((plain_log_probs(policy, rollout) - ours).abs().mean()))
    engine.close()
    return found


def refusal(path: str, ranks: Ranks) -> str:
    try:
        sampler(path, start(path, ranks), ranks).close()
    except InputError as error:
        return str(error)
    return ""


def with_plain_reload(call: Callable[[], str]) -> str:
    """With what vLLM's reload does by itself."""
    from repo_fast.rollout import vllm

    load = vllm._load
    vllm._load = lambda worker, weights: worker.reload_weights(weights_iterator=weights)
    try:
        return call()
    finally:
        vllm._load = load


def compare(folder: Path) -> dict[str, dict[str, Any]]:
    """By name of the model."""
    import vllm

    # There is no end of an engine but that of its process: the cache of each is small.
    vllm.LLM = functools.partial(vllm.LLM, kv_cache_memory_bytes=2**24)
    ranks = start_distributed()
    order = {name: place for place, name in enumerate(MODELS)}
    found: dict[str, dict[str, Any]] = {}
    for name in sorted([*DRAWN, *REFUSED], key=lambda name: order[name.partition(",")[0]]):
        path = save(name, folder)
        found[name] = {"refused": refusal(path, ranks)} if name in REFUSED else gaps(path, ranks)
        if name in UNPACKED:
            found[name]["with vLLM's own reload"] = with_plain_reload(lambda path=path: refusal(path, ranks))
    stop_distributed()
    return found
