"""Memory of a rank, by model and phase, from formulas.

What stays (weights, gradients, optimizer states) is what DeepSpeed keeps, checked against live tensors. What comes and
goes is an estimate, checked against what small runs on a CPU allocate: activations are those of one layer on paper
times the tokens of a micro-batch, also where no backward needs them; the allocator's fragments, CUDA's context and
NCCL's buffers are not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from repo_fast.config import EngineConfig, TrainConfig
from repo_fast.engine import REDUCE_BUCKET_ELEMENTS
from repo_fast.ops.sweep import chunk_rows
from repo_fast.plan.networks import Network
from repo_fast.speed.throughput import PHASES

# DeepSpeed's defaults: ZeRO-3 releases what it gathered once so many parameters are whole, and its bfloat16 optimizer
# of stage 1 reduces so many gradients at a time.
_LIVE_PARAMETERS = 10**9
_REDUCED_ELEMENTS = 500_000_000
_FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank's device.

    Attributes:
        resident: By model: what stays through a step, as `weights`, `gradients`, `optimizer`, `buffers`.
        phases: By phase: the most that is held beside it at once.
        spared: Weights that models would hold if they were apart.
        offloaded: Bytes of host memory, of what is not here by the offloading that is asked for.
    """

    resident: dict[str, dict[str, float]]
    phases: dict[str, float]
    spared: float = 0.0
    offloaded: float = 0.0

    @property
    def resident_total(self) -> float:
        return sum(sum(parts.values()) for parts in self.resident.values())

    @property
    def peak(self) -> float:
        """The most at any time."""
        return self.resident_total + max(self.phases.values())


def memory(
    config: TrainConfig,
    models: Sequence[Network],
    ranks: int,
    dtype: torch.dtype,
    device: torch.device,
    device_bytes: float = 0.0,
) -> Memory:
    """What a rank of so many holds; of `device_bytes`, vLLM takes its share, while it draws or all the time."""
    width = dtype.itemsize
    resident = {model.role: _resident(model, config.engine, ranks, width) for model in models}
    shared = _shared(models, config.engine, width)
    for role, spared in shared.items():
        resident[role]["weights"] -= spared
    policy = models[0]
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    tokens = max(config.update.micro_batch_tokens, longest)
    # A demonstration that is longer than a micro-batch is one by itself; only the policy learns these.
    learned = max(tokens, longest_row(config))
    drawing, vllm = config.rollout.engine == "vllm", config.rollout.vllm

    def forwards(which: Sequence[Network]) -> float:
        """One after the other, without a backward. The last one's weights are still whole when the next gathers."""
        gathered = sorted(_gathered(model, config.engine, ranks, width) for model in which)
        return sum(gathered[-2:]) + max((_forward(model, tokens, width, device) for model in which), default=0.0)

    phases = {
        "generate": vllm.memory_share * device_bytes if drawing else _generation(policy, config, ranks, longest, width),
        "score": forwards([model for model in models if model.scores]),
        "experience": forwards([model for model in models if not model.scores]),
        "update": max(
            _update(model, config.engine, ranks, learned if model is policy else tokens, width, device)
            for model in models
            if model.trained
        ),
    }
    if drawing and not vllm.sleep:
        phases |= {phase: phases["generate"] + phases[phase] for phase in PHASES if phase != "generate"}
    offloaded = sum(_offloaded(model, config.engine, ranks, width) for model in models)
    return Memory(resident, {phase: phases[phase] for phase in PHASES}, sum(shared.values()), offloaded)


def longest_row(config: TrainConfig) -> int:
    """Tokens of the longest sequence that an update may have: no micro-batch can be made shorter."""
    rollout = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    return rollout if config.data.ptx is None else max(rollout, config.data.ptx_max_tokens)


def vllm_bytes(config: TrainConfig, policy: Network, dtype: torch.dtype, tokens: float) -> float:
    """What vLLM holds on a rank: its own copy of the policy's weights, and the cache of so many tokens.

    The copy is whole and of plain numbers, also of a policy in 4 bits; what vLLM computes with is not in it.
    """
    merged = policy.parameters - (policy.trained if config.policy.lora.rank else 0)
    return dtype.itemsize * (merged + tokens * policy.cache_elements) / config.rollout.vllm.tensor_parallel


def vllm_cache_tokens(config: TrainConfig, policy: Network, dtype: torch.dtype, device_bytes: float) -> float:
    """For how many tokens vLLM's share has room beside its copy of the weights; below 0, not for these."""
    copy, token = (vllm_bytes(config, policy, dtype, tokens) for tokens in (0, 1))
    return (config.rollout.vllm.memory_share * device_bytes - copy) / (token - copy)


def _shared(models: Sequence[Network], engine: EngineConfig, width: int) -> dict[str, float]:
    """By model: what those before it hold of its weights (`models/sharing.py`)."""
    if engine.zero_stage == 3 or engine.share_base is False:
        return {}
    return {
        model.role: max((model.common_bytes(earlier, width) for earlier in models[:i]), default=0.0)
        for i, model in enumerate(models)
    }


def _resident(model: Network, engine: EngineConfig, ranks: int, width: int) -> dict[str, float]:
    stage, trained = engine.zero_stage, model.trained
    weights = model.weight_bytes(width, ranks if stage == 3 else 1)
    # Their sum over micro-batches: in stage 3 each rank's share, and in the bfloat16 optimizer of stage 1 whole. Others
    # let go of it after a step (`_gradients`).
    gradients = {1: 0.0 if width == _FLOAT32 else _FLOAT32 * trained, 2: 0.0, 3: _FLOAT32 * trained / ranks}[stage]
    return {
        # What is split goes to the host, and the scales of 4-bit weights are not.
        "weights": model.scale_bytes if _away(model, engine) else weights,
        "gradients": 0.0 if engine.offload_optimizer else gradients,
        # A master and Adam's two moments.
        "optimizer": 0.0 if engine.offload_optimizer else 3 * _FLOAT32 * trained / ranks,
        "buffers": width * min(REDUCE_BUCKET_ELEMENTS, trained) if stage == 3 else 0.0,
    }


def _offloaded(model: Network, engine: EngineConfig, ranks: int, width: int) -> float:
    """Of a rank: its shard of the weights; of what is trained a master, Adam's two moments, the gradient, and what that
    is summed in (stage 3), or the new weights before they go to the device.
    """
    weights = model.weight_bytes(width, ranks) - model.scale_bytes if _away(model, engine) else 0.0
    more = _FLOAT32 if engine.zero_stage == 3 else width
    return weights + ((4 * _FLOAT32 + more) * model.trained / ranks if engine.offload_optimizer else 0.0)


def _away(model: Network, engine: EngineConfig) -> bool:
    """Whether its shards are in host memory between uses."""
    return engine.offload_parameters or (engine.offload_frozen and not model.trained)


def _gathers(model: Network, engine: EngineConfig, ranks: int) -> bool:
    """Whether it is made whole to run. A single rank's shards are whole, where they are on the device."""
    return engine.zero_stage == 3 and (ranks > 1 or _away(model, engine))


def _gathered(model: Network, engine: EngineConfig, ranks: int, width: int) -> float:
    """Whole parameters, beside this rank's shards, while the model runs."""
    if not _gathers(model, engine, ranks):
        return 0.0
    # Elements as DeepSpeed counts them: a byte of two 4-bit numbers is one.
    elements = model.parameters - model.quantized / 2
    return model.shared_bytes(width) * min(1.0, (_LIVE_PARAMETERS + model.largest) / elements)


def _forward(model: Network, tokens: int, width: int, device: torch.device) -> float:
    """Without a backward: a layer's activations, and a chunk of logits."""
    logits = _chunk(model, tokens, width, device) * model.vocabulary * width
    return tokens * model.layer_activations + logits + _head_copy(model, width) + width * model.largest_quantized


def _head_copy(model: Network, width: int) -> int:
    """The head's weight beside its bias, as the loss takes the two."""
    return width * model.vocabulary * model.width if model.head_bias else 0


def _chunk(model: Network, tokens: int, width: int, device: torch.device) -> int:
    """Rows of logits that exist at a time."""
    dtype = torch.float32 if width == _FLOAT32 else torch.bfloat16
    return chunk_rows(device, dtype, tokens, model.vocabulary, model.width) if model.vocabulary else 0


def _generation(policy: Network, config: TrainConfig, ranks: int, longest: int, width: int) -> float:
    batch = config.rollout.batch_size
    cache = batch * longest * policy.cache_elements * width
    # The last logits, the scores made of them, log-probabilities and probabilities in float32, the running sum of these
    # in float64; with top-p, their order before that.
    scores = 7 * _FLOAT32 * batch * policy.vocabulary
    whole = policy.shared_bytes(width) if _gathers(policy, config.engine, ranks) else 0.0
    return whole + cache + scores + width * policy.largest_quantized


def _gradients(
    model: Network, engine: EngineConfig, ranks: int, width: int, device: torch.device
) -> tuple[float, float]:
    """Beside what stays: of gradients, what is held from one micro-batch to the next, and what reducing them takes."""
    share = _FLOAT32 * model.trained / ranks
    bucket = width * min(REDUCE_BUCKET_ELEMENTS, model.trained)
    if engine.zero_stage == 3:
        # A copy that is scattered, beside the one before it; gloo makes one more.
        return 0.0, (3 if device.type == "cpu" and ranks > 1 else 2) * bucket
    if engine.zero_stage == 2:
        # The bucket (two, where one is filled while the other is reduced), and the gradients that go into it.
        return share, (3 if device.type == "cuda" else 2) * bucket
    if width == _FLOAT32:
        return _FLOAT32 * model.trained, bucket + share
    return width * model.trained, _FLOAT32 * min(_REDUCED_ELEMENTS, model.trained) + width * model.trained


def _update(model: Network, engine: EngineConfig, ranks: int, tokens: int, width: int, device: torch.device) -> float:
    kept = model.layers * model.layer_activations
    if engine.activation_checkpointing:
        # A layer's input each, and all of the one that is computed again.
        kept = model.layers * model.width * width + model.layer_activations
    backward = tokens * (kept + model.other_activations)
    if model.vocabulary:
        # A chunk of logits, and the gradients of hidden states and head, formed in the forward; over several chunks the
        # head's is summed in float32, and cast when the logits are gone.
        rows = _chunk(model, tokens, width, device)
        logits, weight = rows * model.vocabulary * width, model.vocabulary * model.width
        if rows == tokens:
            head = logits + width * weight
        else:
            cast = width * weight if device.type == "cuda" and width < _FLOAT32 else 0
            head = _FLOAT32 * weight + max(logits, cast)
        backward += tokens * model.width * width + head + _head_copy(model, width)
    held, reducing = _gradients(model, engine, ranks, width, device)
    # Stage 3 takes the optimizer's step a part of at most so many parameters at a time, with a float32 gradient.
    step = _FLOAT32 * min(model.trained / ranks, _LIVE_PARAMETERS)
    gathered = _gathered(model, engine, ranks, width)
    if gathered and not engine.activation_checkpointing:
        # bitsandbytes keeps the bytes of a 4-bit weight from the forward to the backward, and so from being let go of.
        gathered = max(gathered, model.quantized / 2)
    return gathered + held + max(backward + width * model.largest_quantized + reducing, step)
