"""What a run would take: memory by model and phase, time by phase, before a GPU is rented.

    python -m repo_fast.plan --config alpaca-7b --gpus 8 --device h100

Any option of the main job can follow. Read are the models' configurations, and the adapters of score models that are
folders of such; no model's weights. What the formulas are, and what is assumed, stands in `memory.py` and `speed.py`
beside this file.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from repo_fast.config import TrainConfig, parse
from repo_fast.jobs.launch import OneLineParser, guarded, quiet_libraries
from repo_fast.plan.memory import Memory
from repo_fast.plan.networks import Network
from repo_fast.plan.remedies import USABLE, Plan, largest_micro_batch, remedies
from repo_fast.plan.speed import DEVICES, Device, Workload, step_seconds
from repo_fast.report.progress import printable
from repo_fast.report.tables import grid

CERTAINTY = (
    "How sure: what stays is within 3 % of what DeepSpeed held in tests, and what generate and update add was planned\n"
    "0.7 to 1.3 times as large as small runs on a CPU had it; score and experience may be planned too large. Times\n"
    "rest on data sheets and assumptions, and no GPU has confirmed them; what goes to host memory and back\n"
    "(engine.offload_*) is not in them."
)
_FOLLOWING = (
    "Any option of the main job can follow (repo-fast train --help lists them), --config NAME for one, a "
    "packaged configuration or a YAML file. Score models must be there, as adapters or whole: their configurations say "
    "what they take. For adapters on the policy that are not trained yet, its own path can stand in as reward.path and "
    "cost.path: what is missing then are the adapters themselves, and in the times a second model that scores."
)


def command_line() -> OneLineParser:
    """The tool's own; what it does not know is the main job's."""
    parser = OneLineParser(
        prog="repo-fast plan",
        usage="%(prog)s [--config NAME] --gpus N [--device KIND] [--response_tokens N] [--OPTION VALUE ...]",
        description=(__doc__ or "").partition("\n")[0],
        epilog=_FOLLOWING,
    )
    parser.add_argument("--gpus", type=_positive, required=True, metavar="N", help="how many, over all machines")
    parser.add_argument("--device", choices=DEVICES, default="h100", help="what kind (default: %(default)s)")
    parser.add_argument("--response_tokens", type=_positive, metavar="N", help="mean length; else half of the longest")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""

    def run() -> int:
        chosen, rest = command_line().parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
        config = parse(rest, TrainConfig)
        quiet_libraries()
        print(printable(describe(config, chosen.gpus, DEVICES[chosen.device], chosen.response_tokens)))
        return 0

    return guarded(run)


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}, expected a whole number of at least 1")
    return int(word)


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
    plan = Plan(config, gpus, device, dtype)
    models = plan.models
    parts = [
        f"{gpus} x {device.name}, {str(dtype).removeprefix('torch.')}, ZeRO stage {config.engine.zero_stage}",
        _memory_table(models, plan.held),
        _verdict(plan),
        *_of_the_host(plan),
        *_of_vllm(plan),
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


def _verdict(plan: Plan) -> str:
    peak, room = plan.held.peak, plan.room
    if plan.fits:
        largest, is_most = largest_micro_batch(plan)
        return (
            f"It fits: {_gb(peak)} of {_gb(room)} GB ({100 * USABLE:.0f} % of the device). The largest micro-batch "
            f"that fits: update.micro_batch_tokens {'' if is_most else 'at least '}{largest:,}."
        )
    reasons = []
    if peak > room:
        reasons.append(f"{_gb(peak)} GB, and {_gb(room)} can be used ({100 * USABLE:.0f} % of the device)")
    if not plan.holds_vllm:
        reasons.append(
            f"{_vllm_share(plan)} have to hold its own copy of the policy's weights, in full, and the cache of at "
            f"least one sequence of {plan.longest:,} tokens"
        )
    lines = [f"It does not fit: {'; '.join(reasons)}."]
    word, changed = "with", plan
    for change, changed in remedies(plan):
        named = " and ".join(f"{option} {str(value).lower()}" for option, value in change.items())
        lines.append(f"  {word} {named}: {_gb(changed.held.peak)} GB{', fits' if changed.fits else ''}")
        word = "and with"
    if not changed.fits:
        lines.append("  beyond that: more GPUs, or a smaller model")
    return "\n".join(lines)


def _of_the_host(plan: Plan) -> list[str]:
    """What offloading asks of it."""
    size = plan.held.offloaded
    if not size:
        return []
    return [f"Offloaded: {_gb(size)} GB of host memory a rank, {_gb(plan.gpus * size)} GB of all ranks."]


def _of_vllm(plan: Plan) -> list[str]:
    """What is left of its share for keys and values, where it draws."""
    if not plan.draws_by_vllm or not plan.holds_vllm:
        return []
    return [
        f"{_vllm_share(plan)} hold its own copy of the policy's weights and a cache of {plan.vllm_tokens:,.0f} tokens."
    ]


def _vllm_share(plan: Plan) -> str:
    share = plan.config.rollout.vllm.memory_share * plan.device.memory
    return f"vLLM's {_gb(share)} GB (rollout.vllm.memory_share)"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def _time_table(seconds: dict[str, float], work: Workload, gpus: int) -> str:
    whole = sum(seconds.values())
    rows = [[phase, f"{value:.1f}", f"{value / whole:.0%}"] for phase, value in seconds.items()]
    rows.append(["step", f"{whole:.1f}", f"{work.responses * gpus / whole:,.0f} response tokens/s"])
    return grid(["seconds, estimated", "", ""], rows)


if __name__ == "__main__":
    sys.exit(main())
