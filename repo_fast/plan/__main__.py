"""What a run would take: memory by model and phase, time by phase, before a GPU is rented.

    python -m repo_fast.plan --config alpaca-7b --gpus 8 --device h100

Any option of the main job can follow. Nothing is loaded but the models' configurations. What the formulas are, and what
is assumed, stands in `memory.py` and `speed.py` beside this file.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence

import torch

from repo_fast.config import TrainConfig, parse
from repo_fast.jobs.launch import OneLineParser, guarded
from repo_fast.plan.memory import Memory, memory, vllm_cache_tokens
from repo_fast.plan.networks import Network, networks
from repo_fast.plan.speed import DEVICES, Device, Workload, step_seconds
from repo_fast.report.tables import grid

# Left for what is not counted: CUDA's context, NCCL's buffers, the allocator's fragments.
USABLE = 0.9
CERTAINTY = (
    "How sure: what stays is within 3 % of what DeepSpeed held in tests, and what generate and update add was planned\n"
    "0.7 to 1.3 times as large as small runs on a CPU had it; score and experience may be planned too large. Times\n"
    "rest on data sheets and assumptions, and no GPU has confirmed them; what goes to host memory and back\n"
    "(engine.offload_*) is not in them."
)
CUDA = torch.device("cuda")
_MICRO_BATCHES = [2**power for power in range(8, 18)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""

    def run() -> int:
        parser = OneLineParser(prog="python -m repo_fast.plan", description=(__doc__ or "").partition("\n")[0])
        parser.add_argument("--gpus", type=_positive, required=True, help="how many, over all machines")
        parser.add_argument("--device", choices=DEVICES, default="h100", help="what kind")
        parser.add_argument("--response_tokens", type=_positive, help="mean length; else half of the longest")
        chosen, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
        config = parse(rest, TrainConfig)
        print(describe(config, chosen.gpus, DEVICES[chosen.device], chosen.response_tokens))
        return 0

    return guarded(run)


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise ValueError
    return number


def describe(config: TrainConfig, gpus: int, device: Device, response_tokens: float | None = None) -> str:
    """The plan as text.

    Args:
        config: Of the run.
        gpus: Ranks, one on each.
        device: What kind.
        response_tokens: Their mean; None: half of the longest.

    Raises:
        InputError: A model cannot be read.
    """
    dtype = torch.float32 if config.engine.dtype == "float32" else torch.bfloat16
    models = networks(config, dtype)
    held = memory(config, models, gpus, dtype, CUDA, device.memory)
    parts = [
        f"{gpus} x {device.name}, {str(dtype).removeprefix('torch.')}, ZeRO stage {config.engine.zero_stage}",
        _memory_table(models, held),
        _verdict(config, models, held, gpus, device, dtype),
        *_of_vllm(config, models[0], device, dtype),
        *(
            f"{model.role}: not packed ({model.masked}). What attention takes under a mask or in padded rows, with the "
            "square of their length, is not in this plan."
            for model in models
            if model.masked
        ),
    ]
    if all(model.shape is not None for model in models):
        work = Workload.of(config, gpus, response_tokens)
        parts.append(_time_table(step_seconds(config, models, gpus, dtype, device, work), work, gpus))
        parts.append(CERTAINTY)
    else:
        parts.append("Time: not known for a mixture of experts, or a recurrent trunk.")
    return "\n\n".join(parts)


def _memory_table(models: Sequence[Network], held: Memory) -> str:
    columns = ("weights", "gradients", "optimizer", "buffers")
    rows = []
    for model in models:
        parts = held.resident[model.role]
        sizes = [f"{parts[column] / 1e9:.2f}" for column in columns]
        rows.append([model.role, f"{model.parameters / 1e9:.2f}", *sizes, f"{sum(parts.values()) / 1e9:.2f}"])
    if held.spared:
        rows.append(["kept once (not in the sum)", "", f"{held.spared / 1e9:.2f}", "", "", "", ""])
    rows.append(["all that stays", "", "", "", "", "", f"{held.resident_total / 1e9:.2f}"])
    rows += [[f"+ {phase}", "", "", "", "", "", f"{size / 1e9:.2f}"] for phase, size in held.phases.items()]
    rows.append(["at most", "", "", "", "", "", f"{held.peak / 1e9:.2f}"])
    return grid(["GB a rank", "parameters, 10⁹", *columns, "sum"], rows)


def _verdict(
    config: TrainConfig, models: Sequence[Network], held: Memory, gpus: int, device: Device, dtype: torch.dtype
) -> str:
    room = USABLE * device.memory
    if held.peak <= room:
        largest = largest_micro_batch(config, models, gpus, device, dtype)
        return (
            f"It fits: {held.peak / 1e9:.1f} of {room / 1e9:.1f} GB (90 % of the device). The largest micro-batch that "
            f"fits: update.micro_batch_tokens {largest:,}."
        )
    lines = [f"It does not fit: {held.peak / 1e9:.1f} GB, and {room / 1e9:.1f} can be used (90 % of the device)."]
    for change, changed in remedies(config, models, gpus):
        alike = (changed.policy, changed.critics) == (config.policy, config.critics)
        own = models if alike else networks(changed, dtype)
        peak = memory(changed, own, gpus, dtype, CUDA, device.memory).peak
        lines.append(f"  with {change}: {peak / 1e9:.1f} GB{', fits' if peak <= room else ''}")
        if peak <= room:
            break
    else:
        lines.append("  beyond that: more GPUs, or a smaller model")
    return "\n".join(lines)


def _of_vllm(config: TrainConfig, policy: Network, device: Device, dtype: torch.dtype) -> list[str]:
    """What is left of its share for keys and values, where it draws."""
    if config.rollout.engine != "vllm":
        return []
    tokens = vllm_cache_tokens(config, policy, dtype, device.memory)
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    share = f"vLLM's {config.rollout.vllm.memory_share * device.memory / 1e9:.1f} GB (rollout.vllm.memory_share)"
    if tokens < longest:
        return [
            f"vLLM does not fit: {share} have to hold its own copy of the policy's weights, in full, and the cache of "
            f"at least one sequence of {longest:,} tokens."
        ]
    return [f"{share} hold its own copy of the policy's weights and a cache of {tokens:,.0f} tokens."]


def largest_micro_batch(
    config: TrainConfig, models: Sequence[Network], gpus: int, device: Device, dtype: torch.dtype
) -> int:
    """The largest power of two of tokens that fits, or 0."""
    room = USABLE * device.memory

    def fits(tokens: int) -> bool:
        update = dataclasses.replace(config.update, micro_batch_tokens=tokens)
        changed = dataclasses.replace(config, update=update)
        return memory(changed, models, gpus, dtype, CUDA, device.memory).peak <= room

    return max((tokens for tokens in _MICRO_BATCHES if fits(tokens)), default=0)


def remedies(config: TrainConfig, models: Sequence[Network], gpus: int) -> list[tuple[str, TrainConfig]]:
    """What to switch on, one after the other, cheapest first; each with all before it."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens

    def engine(**values: object) -> Callable[[TrainConfig], TrainConfig]:
        return lambda c: dataclasses.replace(c, engine=dataclasses.replace(c.engine, **values))

    def smaller(c: TrainConfig) -> TrainConfig:
        return dataclasses.replace(c, update=dataclasses.replace(c.update, micro_batch_tokens=longest))

    def batch(c: TrainConfig) -> TrainConfig:
        return dataclasses.replace(
            c, rollout=dataclasses.replace(c.rollout, batch_size=max(1, c.rollout.batch_size // 4))
        )

    def share(c: TrainConfig) -> TrainConfig:
        return dataclasses.replace(c, critics=dataclasses.replace(c.critics, shared_trunk=True))

    def in_4_bits(c: TrainConfig) -> TrainConfig:
        critics = dataclasses.replace(c.critics, quantize="nf4") if c.critics.lora.rank else c.critics
        return dataclasses.replace(c, policy=dataclasses.replace(c.policy, quantize="nf4"), critics=critics)

    adapters = config.policy.lora.rank > 0
    # Of adapters on a single rank it splits little, and models no longer share what they have frozen.
    splits = gpus > 1 or not adapters
    in_shards = splits or config.engine.zero_stage == 3
    options: list[tuple[str, bool, Callable[[TrainConfig], TrainConfig]]] = [
        ("engine.zero_stage 3", splits and config.engine.zero_stage != 3, engine(zero_stage=3)),
        (
            "engine.activation_checkpointing true",
            not config.engine.activation_checkpointing,
            engine(activation_checkpointing=True),
        ),
        (f"update.micro_batch_tokens {longest}", config.update.micro_batch_tokens > longest, smaller),
        (f"rollout.batch_size {max(1, config.rollout.batch_size // 4)}", config.rollout.engine == "hf", batch),
        (
            "critics.shared_trunk true",
            len(config.critic_streams) > 1,
            share,
        ),
        (
            "policy.quantize nf4" + (" and critics.quantize nf4" if config.critics.lora.rank else ""),
            adapters and config.policy.quantize is None,
            in_4_bits,
        ),
        (
            "engine.offload_frozen true",
            in_shards and not config.engine.offload_frozen and any(not model.trained for model in models),
            engine(offload_frozen=True),
        ),
        ("engine.offload_optimizer true", not config.engine.offload_optimizer, engine(offload_optimizer=True)),
        (
            "engine.offload_parameters true",
            in_shards and not config.engine.offload_parameters,
            engine(offload_parameters=True),
        ),
    ]
    found, changed = [], config
    for name, applies, change in options:
        if applies:
            changed = change(changed)
            found.append((name, changed))
    return found


def _time_table(seconds: dict[str, float], work: Workload, gpus: int) -> str:
    whole = sum(seconds.values())
    rows = [[phase, f"{value:.1f}", f"{value / whole:.0%}"] for phase, value in seconds.items()]
    rows.append(["step", f"{whole:.1f}", f"{work.responses * gpus / whole:,.0f} response tokens/s"])
    return grid(["seconds, estimated", "", ""], rows)


if __name__ == "__main__":
    sys.exit(main())
