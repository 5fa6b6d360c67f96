"""The plan's times against measured steps, and a step on 8 to 1024 GPUs by the same formulas.

*Check.* Three constants of this machine, what its products reach, how long a layer takes to launch, and how long the
optimizer takes a parameter, are taken from one measured step; the other steps, with other lengths, K and widths, are
predicted. So the formulas' form is tested, not the figures of a device's data sheet.

*Scale.* What is assumed is printed with the result: `ASSUMPTIONS`.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from bench.measuring.suite import Results
from bench.measuring.tables import render
from bench.training_phase import GEOMETRIES, Geometry
from repo_fast.config import TrainConfig, parse
from repo_fast.plan.memory import memory
from repo_fast.plan.networks import Network, network
from repo_fast.plan.speed import DEVICES, Device, Workload, step_seconds
from repo_fast.speed.throughput import PHASES

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
ASSUMPTIONS = (
    "16 responses and 16 demonstrations a GPU: the batch grows with the GPUs, and the optimizer bears it",
    "products at half of the data sheet's FLOP/s, memory, and links within a machine of 8 GPUs, at all of it",
    "50 GB/s a GPU between machines, without contention and without latency",
    "lengths are evenly spaced, and no rank waits for a slower one",
    "scorers that run on the host, checkpoints and logs take no time",
    "no GPU has confirmed any of it",
)
# Of a step, from which on waiting for links is called a break.
FELT = 0.1
FUNCTION = "bench.job_folder:reward"
CHECKED = ("generate", "experience", "update")


def job_config(geometry: Geometry, responses_per_prompt: int) -> TrainConfig:
    """What `trainer.take_steps` runs, as a configuration."""
    settings = {
        "reward.path": FUNCTION,
        "cost.path": FUNCTION,
        "algorithm.advantage": "rloo",
        "rollout.prompts_per_step": geometry.sequences // responses_per_prompt,
        "rollout.responses_per_prompt": responses_per_prompt,
        "rollout.max_new_tokens": geometry.responses[1],
        "data.max_prompt_tokens": sum(geometry.prompts),
        "update.micro_batch_tokens": geometry.micro_batch_tokens,
        "engine.dtype": "float32",
    }
    return parse([word for key, value in settings.items() for word in (f"--{key}", str(value))], TrainConfig)


def models_of(geometry: Geometry, dtype: torch.dtype) -> list[Network]:
    config = geometry.config(geometry.layers)
    return [
        network("policy", config, dtype, head=True),
        network("reference", config, dtype, head=True, frozen=True),
    ]


def check_plan(steps: Mapping[str, tuple[Geometry, int, dict[str, float]]], reference: str) -> Results:
    """Predicted and measured seconds.

    Args:
        steps: By name: geometry, responses a prompt, the measured metrics of a step and its `optimizer_seconds`.
        reference: The step that gives the constants.

    Returns:
        By step and phase, `measured`, `predicted` seconds; without the reference.
    """
    machine = Device("this machine", 1.0, 1.0, math.inf, math.inf, math.inf, math.inf, 1, 0.0, launches_ahead=False)

    def predicted(name: str, device: Device) -> dict[str, float]:
        geometry, responses_per_prompt, metrics = steps[name]
        config = job_config(geometry, responses_per_prompt)
        work = Workload.of(config, 1, metrics["response_length"])
        return step_seconds(config, models_of(geometry, torch.float32), 1, torch.float32, device, work)

    def parameters(name: str) -> int:
        return models_of(steps[name][0], torch.float32)[0].trained

    metrics = steps[reference][2]
    # With 1 FLOP/s the plan gives operations, and with a second a layer, layers. Its optimizer is as fast as memory.
    flops = predicted(reference, machine)["update"] / (metrics["update_seconds"] - metrics["optimizer_seconds"])
    products_only = predicted(reference, replace(machine, flops=flops))["generate"]
    launch = (metrics["generate_seconds"] - products_only) / (
        predicted(reference, replace(machine, flops=math.inf, launch_seconds=1.0))["generate"]
    )
    machine = replace(machine, flops=flops, launch_seconds=max(0.0, launch))
    found: Results = {}
    for name, (_, _, measured) in steps.items():
        if name != reference:
            seconds = predicted(name, machine)
            seconds["update"] += metrics["optimizer_seconds"] * parameters(name) / parameters(reference)
            found[name] = {
                phase: {"measured": measured[f"{phase}_seconds"], "predicted": seconds[phase]} for phase in CHECKED
            }
    return found


def plan_errors(results: Results) -> dict[str, dict[str, float]]:
    """Of `check_plan`'s predictions: the `median` and the `largest` error by phase, relative to what was measured."""
    errors = {
        phase: [abs(result[phase]["predicted"] / result[phase]["measured"] - 1) for result in results.values()]
        for phase in CHECKED
    }
    return {phase: {"median": statistics.median(found), "largest": max(found)} for phase, found in errors.items()}


def check_table(results: Results) -> str:
    rows = [
        [name, *(f"{result[phase]['predicted'] / result[phase]['measured']:.2f}" for phase in CHECKED)]
        for name, result in results.items()
    ]
    errors = plan_errors(results)
    for which in ("median", "largest"):
        rows.append([f"{which} error", *(f"{errors[phase][which]:.0%}" for phase in CHECKED)])
    return render(["the plan: predicted / measured", *CHECKED], rows)


def simulate(device: Device = DEVICES["h100"]) -> dict[str, Any]:
    """A step of Alpaca-7B's setting, by the rollout engine and the number of GPUs.

    Returns:
        `steps`, by name: seconds by phase, `step`, `tokens_per_s_a_gpu`, `efficiency` against the fewest GPUs,
        `waiting`, the share of a step that links cost, the phase that `waits_most`, and `peak_gb` a rank.
        `breaks_first`, by engine, and `assumptions`, in words.
    """
    geometry, dtype = GEOMETRIES["alpaca-7b"], torch.bfloat16
    llama = geometry.config(geometry.layers)
    models = [
        network("policy", llama, dtype, head=True),
        network("reference", llama, dtype, head=True, frozen=True),
        *(network(role, llama, dtype, frozen=True) for role in ("reward", "cost")),
        *(network(f"{stream} critic", llama, dtype) for stream in ("reward", "cost")),
    ]
    base = parse(["--config", "alpaca-7b"], TrainConfig)
    free = replace(device, link=math.inf, network=math.inf)
    results: Results = {}
    for engine in ("hf", "vllm"):
        first = None
        for gpus in GPUS:
            rollout = replace(base.rollout, engine=engine, prompts_per_step=geometry.sequences * gpus)
            update = replace(base.update, ptx_batch_size=geometry.sequences * gpus)
            config = replace(base, rollout=rollout, update=update)
            work = Workload.of(config, gpus)
            seconds = step_seconds(config, models, gpus, dtype, device, work)
            unhindered = step_seconds(config, models, gpus, dtype, free, work)
            waits = {phase: seconds[phase] - unhindered[phase] for phase in seconds}
            step = sum(seconds.values())
            rate = work.responses / step
            first = first or rate
            results[f"{engine}, {gpus} GPUs"] = {
                **seconds,
                "step": step,
                "tokens_per_s_a_gpu": rate,
                "efficiency": rate / first,
                "waiting": sum(waits.values()) / step,
                "waits_most": max(waits, key=lambda phase: waits[phase]),
                "peak_gb": memory(config, models, gpus, dtype, torch.device("cuda"), device.memory).peak / 1e9,
            }
    breaks = {engine: _breaks_first(results, engine, device) for engine in ("hf", "vllm")}
    return {"steps": results, "breaks_first": breaks, "assumptions": ASSUMPTIONS}


def _breaks_first(steps: Results, engine: str, device: Device) -> str:
    """Where a rollout engine's runs first lose time or memory to their size, in words."""
    for gpus in GPUS:
        row = steps[f"{engine}, {gpus} GPUs"]
        if row["peak_gb"] > device.memory / 1e9:
            return f"memory, at {gpus} GPUs: {row['peak_gb']:.0f} GB a rank"
        if row["waiting"] >= FELT:
            links = "links between machines" if gpus > device.ranks_a_machine else "links within a machine"
            return (
                f"{links}, at {gpus} GPUs: {row['waiting']:.0%} of a step waits for weights and gradients, most of it "
                f"in {row['waits_most']}"
            )
    return f"nothing up to {GPUS[-1]} GPUs"


def scale_table(simulated: Mapping[str, Any]) -> str:
    results = simulated["steps"]
    header = ["on paper, Alpaca-7B, H100", *PHASES, "step, s", "tokens/s a GPU", "efficiency", "waiting", "GB a rank"]
    rows = [
        [
            name,
            *(f"{row[phase]:.1f}" for phase in PHASES),
            f"{row['step']:.1f}",
            f"{row['tokens_per_s_a_gpu']:.0f}",
            f"{row['efficiency']:.0%}",
            f"{row['waiting']:.0%}",
            f"{row['peak_gb']:.0f}",
        ]
        for name, row in results.items()
    ]
    words = [f"Breaks first with {engine}: {what}." for engine, what in simulated["breaks_first"].items()]
    words += ["Assumed:", *(f"- {assumption}" for assumption in simulated["assumptions"])]
    return "\n".join([render(header, rows), "", *words])
