"""Compiles every Triton kernel at its shipped settings for GPUs that are not there, and says what each one takes.

    python -m tests.kernels.compile_ahead [--json FILE]

For NVIDIA's A100, H100 and B200 it prints registers, spills and shared memory; for AMD's MI300 it only compiles. The
launchers of `kernels/` are called as the trainer calls them, but with tensors on the CPU and with each launch replaced
by a compilation: so what is compiled is what would run, down to the alignment of pointers and strides.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from repo_fast.kernels.fused_rectified_policy_loss import policy_rows
from repo_fast.kernels.generalized_advantages import scan_advantages
from repo_fast.kernels.linear_log_probs import gradient_rows, log_prob_rows
from repo_fast.kernels.prompt_violations import mean_violations
from repo_fast.kernels.rectified_policy_loss import count_tokens, loss_of_tokens
from repo_fast.kernels.scale_in_place import scale_in_place
from repo_fast.ops.sweep import row_pitch

# Compute capability -> bytes of shared memory that a program can have (CUDA C++ programming guide, table of limits).
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHAPES = [(torch.bfloat16, 32001), (torch.bfloat16, 128256), (torch.float32, 32001), (torch.float32, 500)]
T, S, D = 64, 8, 4096


class Usage(NamedTuple):
    """What one compiled kernel takes; registers and spilled bytes are a thread's, shared memory is a program's."""

    kernel: str
    case: str
    capability: int
    warps: int
    registers: int
    spilled: int
    shared: int


class _AbsentDevice:
    """Stands for a device of one capability in Triton's launch path, as far as compiling needs it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return f"{self.target.backend} {self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """(case, launch) of everything that ships."""
    floats, ids = torch.zeros(T), torch.zeros(T, dtype=torch.int64)
    number, violations = torch.zeros(()), torch.zeros(S)
    counts = torch.zeros(S + 2, dtype=torch.int32)
    plain = {"clip": (0.2, 0.2), "kl_coefficient": 0.0, "rectify": True, "mixed": False, "reduction": "sequence_mean"}
    full = {"clip": (0.2, 0.2), "kl_coefficient": 0.1, "rectify": False, "mixed": True, "reduction": "token_mean"}
    needed = floats, floats, floats, ids, violations, counts, number
    for dtype, V in SHAPES:
        name = f"{str(dtype).removeprefix('torch.')} V={V}"
        logits = torch.zeros(T, row_pitch(V, dtype), dtype=dtype)[:, :V]
        chunk = logits, torch.zeros(T, D, dtype=dtype), torch.zeros(1, D, dtype=dtype).expand(V, D), ids, ids, 0, 1.0
        for entropies in (None, floats):
            case = name if entropies is None else f"{name}, entropy"
            yield case, lambda chunk=chunk, entropies=entropies: log_prob_rows(*chunk, floats, entropies)
            yield case, lambda chunk=chunk, entropies=entropies: gradient_rows(*chunk, floats, entropies)
        yield name, lambda chunk=chunk: policy_rows(
            *chunk, *needed, None, None, None, floats, floats, floats.expand(3, T), **plain,
            entropy_coefficient=0.0, gradient=True,
        )  # fmt: skip
        yield f"{name}, all options", lambda chunk=chunk: policy_rows(
            *chunk, *needed, number, floats, floats, floats, floats, floats.expand(3, T), **full,
            entropy_coefficient=0.1, gradient=True,
        )  # fmt: skip
    # A batch of one token, whose sizes are all 1: Triton makes constants of such arguments.
    one, first = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    row = torch.zeros(1, 512), torch.zeros(1, D), torch.zeros(500, D), first, None, 0, 0.7
    single = one, one, one, first, one, torch.zeros(3, dtype=torch.int32), number
    summed = plain | {"reduction": "sum"}
    yield "one token", lambda: log_prob_rows(*row, one, one)
    yield "one token", lambda: gradient_rows(*row, one, one)
    yield (
        "one token",
        lambda: policy_rows(
            *row,
            *single,
            None,
            None,
            None,
            one,
            one,
            one.expand(3, 1),
            **summed,
            entropy_coefficient=0.0,
            gradient=True,
        ),
    )
    yield "one token", lambda: loss_of_tokens(one, *single, None, None, None, **summed)
    yield "one token", lambda: count_tokens(first, None, 1)
    yield "one token", lambda: mean_violations(one, first, 0.0, whole_batch=False)
    yield "one token", lambda: scan_advantages(one[None], one[None], torch.zeros(2, dtype=torch.int32), 1.0, 0.95)
    for dtype in (torch.float32, torch.bfloat16):
        yield str(dtype), lambda dtype=dtype: scale_in_place(torch.zeros(T, D, dtype=dtype), number)
    yield "targets", lambda: count_tokens(ids, ids, S)
    yield "sequence ids", lambda: count_tokens(ids, None, S)
    yield "", lambda: loss_of_tokens(floats, *needed, None, None, None, **plain)
    yield "all options", lambda: loss_of_tokens(floats, *needed, number, floats, floats, **full)
    for whole_batch in (False, True):
        case = "batch" if whole_batch else "prompt"
        yield case, lambda whole_batch=whole_batch: mean_violations(violations, ids[:S], 0.0, whole_batch=whole_batch)
    offsets = torch.zeros(S + 1, dtype=torch.int32)
    yield "2 streams", lambda: scan_advantages(floats.expand(2, T), floats.expand(2, T), offsets, 1.0, 0.95)


def compile_all(target: GPUTarget) -> Iterator[tuple[str, triton.compiler.CompiledKernel]]:
    """(case, compiled kernel) of every launch, for one target."""
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, **kwargs):
        compiled.append(run(self, *args, **(kwargs | {"warmup": True})))

    driver.set_active(_AbsentDevice(target))
    JITFunction.run = compile_only
    try:
        for case, launch in launches():
            launch()
            yield from ((case, kernel) for kernel in compiled)
            compiled.clear()
    finally:
        JITFunction.run = run


def usage(case: str, kernel: triton.compiler.CompiledKernel, capability: int) -> Usage:
    """What the assembler says of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        target = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)[1]
        command = [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name={target}",
            source,
            "-o",
            Path(folder) / "kernel.cubin",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Usage(
        kernel=kernel.metadata.name,
        case=case,
        capability=capability,
        warps=kernel.metadata.num_warps,
        registers=int(re.search(r"Used (\d+) registers", said)[1]),
        spilled=sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        shared=kernel.metadata.shared,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    table = []
    options = parser.parse_args()
    for capability in SHARED_LIMITS:
        for case, kernel in compile_all(GPUTarget("cuda", capability, 32)):
            table.append(usage(case, kernel, capability))
    line = "{:24} {:38} {:>6} {:>5} {:>9} {:>13} {:>12}"
    print(line.format("kernel", "case", "sm", "warps", "registers", "spilled bytes", "shared bytes"))
    for row in table:
        print(line.format(*row))
    on_rocm = sum(1 for _ in compile_all(GPUTarget("hip", "gfx942", 64)))
    print(f"ROCm, gfx942: {on_rocm} kernels compiled")
    if options.json is not None:
        options.json.write_text(json.dumps([row._asdict() for row in table]))


if __name__ == "__main__":
    main()
