"""Time of a step, by phase, from operations, bytes and what a device does in a second.

    forward, update    operations ÷ (device's FLOP/s × its efficiency), or what the links need for the weights, if that
                       takes longer: micro-batch by micro-batch, while the device computes, ZeRO-3 gathers them for each
                       forward and each backward and reduces gradients
    generate           a token of a batch reads all weights once, and the cache of what came before; a forward needs
                       a fixed time to be launched, which Hugging Face's is mostly made of

A response has half of the longest's tokens on average, unless it is said otherwise. Scorers that are functions, and all
that runs on the host, take no time on paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch

from repo_fast.config import TrainConfig
from repo_fast.plan.networks import Network

# Forward, and backward with respect to inputs and weights, once more where activations are computed again.
_GATHERS_AN_UPDATE = 2


@dataclass(frozen=True)
class Device:
    """What a rank computes on.

    Attributes:
        name: As users call it.
        flops: Dense FLOP/s in the dtype of the run, by its data sheet or measured.
        efficiency: Share of these that a transformer's products reach.
        bandwidth: Of its memory, bytes/s.
        memory: Bytes.
        link: To the other ranks of its machine, bytes/s one way.
        network: To the ranks of other machines, bytes/s a rank, one way.
        ranks_a_machine: That share the faster links.
        launch_seconds: Of a layer in a forward of Hugging Face, whatever its size.
        launches_ahead: Whether the device computes while the host launches what comes next; a CPU does not.
    """

    name: str
    flops: float
    efficiency: float
    bandwidth: float
    memory: float
    link: float
    network: float
    ranks_a_machine: int
    launch_seconds: float
    launches_ahead: bool = True


# Data sheets for what is printed there. Efficiency, network and launch are assumptions: nothing here was measured on a
# GPU by this project.
DEVICES = {
    "h100": Device("H100 SXM 80 GB", 989.4e12, 0.5, 3.35e12, 80e9, 450e9, 50e9, 8, 0.6e-3),
    "h200": Device("H200 SXM 141 GB", 989.4e12, 0.5, 4.8e12, 141e9, 450e9, 50e9, 8, 0.6e-3),
    "a100": Device("A100 SXM 80 GB", 312e12, 0.5, 2.0e12, 80e9, 300e9, 25e9, 8, 0.6e-3),
    "a800": Device("A800 SXM 80 GB", 312e12, 0.5, 2.0e12, 80e9, 200e9, 25e9, 8, 0.6e-3),
    "l40s": Device("L40S 48 GB", 362e12, 0.5, 0.864e12, 48e9, 32e9, 12.5e9, 8, 0.6e-3),
    "rtx4090": Device("GeForce RTX 4090 24 GB", 165.2e12, 0.5, 1.008e12, 24e9, 32e9, 12.5e9, 8, 0.6e-3),
}


@dataclass(frozen=True)
class Workload:
    """A rank's part of a step.

    Attributes:
        lengths: Tokens of each sequence, prompt included.
        responses: Of these, tokens of the responses.
    """

    lengths: Sequence[int]
    responses: int

    @classmethod
    def of(cls, config: TrainConfig, ranks: int, mean_response: float | None = None) -> "Workload":
        """Evenly spaced lengths, prompts and responses from one token to the longest, or around a mean."""
        rollout = config.rollout
        count = max(1, round(rollout.prompts_per_step * rollout.responses_per_prompt / ranks))
        longest = rollout.max_new_tokens if mean_response is None else 2 * mean_response - 1
        responses = [round(1 + (longest - 1) * (i + 0.5) / count) for i in range(count)]
        prompts = [round(1 + (config.data.max_prompt_tokens - 1) * (i + 0.5) / count) for i in range(count)]
        # Long prompts do not go with long responses.
        lengths = [prompt + response for prompt, response in zip(prompts, reversed(responses), strict=True)]
        return cls(lengths, sum(responses))

    @classmethod
    def of_demonstrations(cls, config: TrainConfig, ranks: int) -> "Workload":
        """The PTX loss's: evenly spaced lengths up to the longest, two thirds of each a response."""
        if config.data.ptx is None:
            return cls([], 0)
        count = max(1, round(config.update.ptx_batch_size / ranks))
        lengths = [round(1 + (config.data.ptx_max_tokens - 1) * (i + 0.5) / count) for i in range(count)]
        return cls(lengths, sum(lengths) * 2 // 3)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def step_seconds(
    config: TrainConfig, models: Sequence[Network], ranks: int, dtype: torch.dtype, device: Device, work: Workload
) -> dict[str, float]:
    """Seconds of each phase, of models whose operations can be counted (`Network.shape`)."""
    policy, width = models[0], dtype.itemsize
    scorers = [model for model in models if model.scores]
    critics = [model for model in models if model.role.endswith("critic")]
    trained = [policy, *critics]
    # The reference is the policy itself where that has adapters.
    valued = [policy, models[1] if models[1:] and models[1].role == "reference" else policy, *critics]
    if config.update.old_log_probs == "sampler":
        valued = valued[1:]
    forward = [_forward_seconds(model, config, ranks, width, device, work) for model in valued]
    ptx = Workload.of_demonstrations(config, ranks)
    imitation = _update_seconds(policy, config, ranks, width, device, ptx, steps=0) if ptx.tokens else 0.0
    return {
        "generate": _generate_seconds(policy, config, ranks, width, device, work),
        "score": sum(_forward_seconds(model, config, ranks, width, device, work) for model in scorers),
        "experience": sum(forward),
        "update": config.update.epochs
        * (
            sum(_update_seconds(m, config, ranks, width, device, work, config.update.minibatches) for m in trained)
            + config.update.minibatches * imitation
        ),
    }


def _micro_batches(config: TrainConfig, work: Workload) -> int:
    return max(1, ceil(work.tokens / config.update.micro_batch_tokens))


def _gather_rate(ranks: int, device: Device) -> float:
    """Bytes/s of what ranks share."""
    rate = device.link if ranks <= device.ranks_a_machine else min(device.link, device.network)
    return rate * ranks / (ranks - 1)


def _gather_seconds(model: Network, config: TrainConfig, ranks: int, width: int, device: Device) -> float:
    """To make all of a model's shards whole, once."""
    if config.engine.zero_stage != 3 or ranks == 1:
        return 0.0
    return model.shared_bytes(width) / _gather_rate(ranks, device)


def _forward_seconds(
    model: Network, config: TrainConfig, ranks: int, width: int, device: Device, work: Workload
) -> float:
    assert model.shape is not None
    compute = model.shape.forward(work.lengths, work.responses if model.vocabulary else 0)
    gathers = _micro_batches(config, work) * _gather_seconds(model, config, ranks, width, device)
    return max(compute / (device.flops * device.efficiency), gathers)


def _update_seconds(
    model: Network, config: TrainConfig, ranks: int, width: int, device: Device, work: Workload, steps: int
) -> float:
    """Forward and backward of the work, and so many optimizer steps."""
    assert model.shape is not None
    head = work.responses if model.vocabulary else 0
    compute = model.shape.forward_and_backward(work.lengths, head)
    if config.engine.activation_checkpointing:
        compute += model.shape.forward(work.lengths, 0)
    gather = _gather_seconds(model, config, ranks, width, device)
    reduce = gather and width * model.trained / _gather_rate(ranks, device)
    links = max(_micro_batches(config, work), steps) * (_GATHERS_AN_UPDATE * gather + reduce)
    # AdamW reads and writes masters and moments, and reads gradients.
    optimizer = steps * 28 * model.trained / ranks / device.bandwidth
    return max(compute / (device.flops * device.efficiency), links) + optimizer


def _generate_seconds(
    policy: Network, config: TrainConfig, ranks: int, width: int, device: Device, work: Workload
) -> float:
    assert policy.shape is not None
    count = len(work.lengths)
    vllm = config.rollout.engine == "vllm"
    # vLLM's batch is refilled, Hugging Face's goes on until its longest is done.
    batch = count if vllm else min(count, config.rollout.batch_size)
    batches = ceil(count / batch)
    longest = 2 * work.responses / count
    steps = longest if vllm else batches * longest
    prompts = work.tokens - work.responses
    prefill = policy.shape.forward([prompts // count] * count, count) / (device.flops * device.efficiency)
    # A 4-bit weight is read, written as numbers, and these are read.
    weights = (policy.weight_bytes(width) + 2 * width * policy.quantized) / device.bandwidth
    cache = batch * (work.tokens / count) * policy.cache_elements * width / device.bandwidth
    arithmetic = batch * policy.shape.forward([1], 1) / (device.flops * device.efficiency)
    # CUDA graphs launch a whole forward at once.
    launch = 0.0 if vllm else device.launch_seconds * policy.shape.layers
    busy = max(weights + cache, arithmetic)
    each = max(busy, launch) if device.launches_ahead else busy + launch
    return _gather_seconds(policy, config, ranks, width, device) + prefill + steps * each
