"""Memory of a rank, by model and phase, from formulas.

What stays (weights, gradients, optimizer states) is what DeepSpeed keeps, checked to the byte against live tensors.
What comes and goes is an estimate: activations are those of one layer on paper times the tokens of a micro-batch; the
allocator's fragments, CUDA's context and NCCL's buffers are not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from repo_fast.config import EngineConfig, TrainConfig
from repo_fast.engine import REDUCE_BUCKET_ELEMENTS
from repo_fast.ops.sweep import chunk_rows
from repo_fast.plan.networks import Network
from repo_fast.throughput import PHASES

# DeepSpeed's default: ZeRO-3 releases what it gathered once so many parameters are whole.
_LIVE_PARAMETERS = 10**9
_FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank's device.

    Attributes:
        resident: By model: what stays through a step, as `weights`, `gradients`, `optimizer`, `buffers`.
        phases: By phase: the most that is held beside it at once.
    """

    resident: dict[str, dict[str, float]]
    phases: dict[str, float]

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
    policy = models[0]
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    tokens = max(config.update.micro_batch_tokens, longest)
    forward = max(_gathered(model, config.engine, width) + _forward(model, tokens, width, device) for model in models)
    scorers = [model for model in models if model.role in ("reward", "cost")]
    drawing, vllm = config.rollout.engine == "vllm", config.rollout.vllm
    phases = {
        "generate": vllm.memory_share * device_bytes if drawing else _generation(policy, config, longest, width),
        "score": max(
            (_gathered(m, config.engine, width) + _forward(m, tokens, width, device) for m in scorers), default=0
        ),
        "experience": forward,
        "update": max(_update(model, config.engine, ranks, tokens, width, device) for model in models if model.trained),
    }
    if drawing and not vllm.sleep:
        phases |= {phase: phases["generate"] + phases[phase] for phase in PHASES if phase != "generate"}
    return Memory(resident, {phase: phases[phase] for phase in PHASES})


def _resident(model: Network, engine: EngineConfig, ranks: int, width: int) -> dict[str, float]:
    stage, trained = engine.zero_stage, model.trained
    weights = model.parameters * width / (ranks if stage == 3 else 1)
    # DeepSpeed accumulates in float32 in its bf16 engine of stage 1, whole; in stage 2 in the weights' type; in stage 3
    # each rank its share, in float32.
    gradients = {1: _FLOAT32 * trained, 2: width * trained, 3: _FLOAT32 * trained / ranks}[stage]
    return {
        "weights": 0.0 if engine.offload_parameters or (engine.offload_frozen and not trained) else weights,
        "gradients": 0.0 if engine.offload_optimizer else gradients,
        # A master and Adam's two moments.
        "optimizer": 0.0 if engine.offload_optimizer else 3 * _FLOAT32 * trained / ranks,
        "buffers": width * min(REDUCE_BUCKET_ELEMENTS, trained) if stage == 3 else 0.0,
    }


def _gathered(model: Network, engine: EngineConfig, width: int) -> float:
    """Whole parameters, beside this rank's shards, while the model runs."""
    return width * min(model.parameters, _LIVE_PARAMETERS + model.largest) if engine.zero_stage == 3 else 0.0


def _forward(model: Network, tokens: int, width: int, device: torch.device) -> float:
    """Without a backward: a layer's activations, and a chunk of logits."""
    return tokens * model.layer_activations + _logits(model, tokens, width, device)


def _logits(model: Network, tokens: int, width: int, device: torch.device) -> float:
    return min(chunk_rows(device, model.vocabulary), tokens) * model.vocabulary * width if model.vocabulary else 0.0


def _generation(policy: Network, config: TrainConfig, longest: int, width: int) -> float:
    batch = config.rollout.batch_size
    cache = batch * longest * policy.cache_elements * width
    # The last logits, the scores made of them, log-probabilities and probabilities in float32, the running sum of these
    # in float64; with top-p, their order before that.
    scores = 7 * _FLOAT32 * batch * policy.vocabulary
    whole = policy.parameters * width if config.engine.zero_stage == 3 else 0.0
    return whole + cache + scores


def _update(model: Network, engine: EngineConfig, ranks: int, tokens: int, width: int, device: torch.device) -> float:
    kept = model.layers * model.layer_activations
    if engine.activation_checkpointing:
        # A layer's input each, and all of the one that is computed again.
        kept = model.layers * model.width * width + model.layer_activations
    backward = tokens * (kept + model.other_activations) + _logits(model, tokens, width, device)
    if model.vocabulary:
        # The gradients of hidden states and head, formed in the forward; the head's is summed in float32.
        backward += tokens * model.width * width + _FLOAT32 * model.vocabulary * model.width
    # Stage 3 takes the optimizer's step a part of at most so many parameters at a time, with a float32 gradient.
    step = _FLOAT32 * min(model.trained / ranks, _LIVE_PARAMETERS)
    return _gathered(model, engine, width) + max(backward, step)
