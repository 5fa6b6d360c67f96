"""Compiles every Triton kernel at its shipped settings for GPUs that are not there, and says what each one takes.

    python -m tests.kernels.compile_ahead [--json FILE] [--chips CHIP ...]

For NVIDIA's A100, H100 and B200 it prints registers, spills and shared memory, and how many instructions the machine
code of the row passes has for each logit; for AMD's MI300 it only compiles. The launchers of `kernels/` are called as
the trainer calls them, but with tensors on the CPU and with each launch replaced by a compilation: so what is compiled
is what would run, down to the alignment of pointers and strides.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from repo_fast.kernels.fused_rectified_policy_loss import policy_rows
from repo_fast.kernels.generalized_advantages import scan_advantages
from repo_fast.kernels.linear_log_probs import gradient_rows, log_prob_rows
from repo_fast.kernels.prompt_violations import mean_violations
from repo_fast.kernels.rectified_policy_loss import combine_streams, count_tokens, loss_of_tokens
from repo_fast.kernels.scale_in_place import scale_in_place
from repo_fast.ops.sweep import row_pitch

# Compute capability -> bytes of shared memory that a program can have (CUDA C++ programming guide, table of limits).
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ROCM = "gfx942"
CHIPS = [*(f"sm_{capability}" for capability in SHARED_LIMITS), ROCM]
ROWS = [(dtype, V) for dtype in (torch.bfloat16, torch.float32) for V in (32001, 49152, 128256)]
SHAPES = [*ROWS, (torch.float32, 500)]
T, S, D = 64, 8, 4096
NVDISASM = knobs.nvidia.nvdisasm.path


class RowLoops(NamedTuple):
    """What the machine code of a row pass does in its loops over tiles of logits.

    Attributes:
        statistics: Instructions for each logit in the loop that reads.
        gradient: The same in the loop that also writes; 0 without one.
        barriers: At which threads wait for each other, in the loops.
        narrow: Loads and stores of less than 16 bytes, in the loops.
        whole: Instructions for each logit of the whole kernel, which runs the loops once a tile and everything else at
            most once.
    """

    statistics: float
    gradient: float
    barriers: int
    narrow: int
    whole: float


class Usage(NamedTuple):
    """What one compiled kernel takes; registers and spilled bytes are a thread's, shared memory is a program's."""

    kernel: str
    case: str
    capability: int
    warps: int
    registers: int
    spilled: int
    shared: int
    loops: RowLoops | None


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
        chunk = (
            logits,
            torch.zeros(T, D, dtype=dtype),
            torch.zeros(1, D, dtype=dtype).expand(V, D),
            ids,
            ids,
            0,
            1.0,
            None,
        )
        for entropies in (None, floats):
            case = name if entropies is None else f"{name}, entropy"
            yield case, lambda chunk=chunk, entropies=entropies: log_prob_rows(*chunk, floats, entropies)
            yield case, lambda chunk=chunk, entropies=entropies: gradient_rows(*chunk, floats, entropies)
        for entropies in (None, floats):
            case = name if entropies is None else f"{name}, entropy"
            yield case, lambda chunk=chunk, entropies=entropies: policy_rows(
                *chunk, *needed, None, None, None, floats, entropies, floats.expand(3, T), **plain,
                entropy_coefficient=0.0, gradient=True,
            )  # fmt: skip
        yield f"{name}, all options", lambda chunk=chunk: policy_rows(
            *chunk, *needed, number, floats, floats, floats, floats, floats.expand(3, T), **full,
            entropy_coefficient=0.1, gradient=True,
        )  # fmt: skip
        if V > 32001:
            # A cap's instructions do not depend on it.
            continue
        capped = *chunk[:-1], 30.0
        yield f"{name}, softcap", lambda chunk=capped: log_prob_rows(*chunk, floats, floats)
        yield f"{name}, softcap", lambda chunk=capped: gradient_rows(*chunk, floats, floats)
        yield f"{name}, softcap", lambda chunk=capped: policy_rows(
            *chunk, *needed, number, floats, floats, floats, floats, floats.expand(3, T), **full,
            entropy_coefficient=0.1, gradient=True,
        )  # fmt: skip
    # A batch of one token, whose sizes are all 1: Triton makes constants of such arguments.
    one, first = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    row = torch.zeros(1, 512), torch.zeros(1, D), torch.zeros(500, D), first, None, 0, 0.7, None
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
    for K in (2, 4, 8):
        for mixed in (False, True):
            case = f"{K} constraints, {'mixed' if mixed else 'separate'}"
            streams = floats, floats.expand(K, T), ids, violations.expand(K, S), torch.zeros(K)
            yield case, lambda streams=streams, mixed=mixed: combine_streams(*streams, rectified=1, mixed=mixed)
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
    hip = mock.patch.object(torch.version, "hip", "6.4" if target.backend == "hip" else None)
    hip.start()
    try:
        for case, launch in launches():
            launch()
            yield from ((case, kernel) for kernel in compiled)
            compiled.clear()
    finally:
        JITFunction.run = run
        hip.stop()


def usage(case: str, kernel: triton.compiler.CompiledKernel, capability: int) -> Usage:
    """What the assembler says of a kernel, and what its disassembly shows."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        target = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)[1]
        binary = Path(folder) / "kernel.cubin"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target}", source, "-o", binary]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        listing = subprocess.run([NVDISASM, "-c", binary], capture_output=True, text=True, check=True).stdout
    shape = re.match(r"(\w+) V=(\d+)", case)
    return Usage(
        kernel=kernel.metadata.name,
        case=case,
        capability=capability,
        warps=kernel.metadata.num_warps,
        registers=int(re.search(r"Used (\d+) registers", said)[1]),
        spilled=sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        shared=kernel.metadata.shared,
        loops=shape and row_loops(listing, getattr(torch, shape[1]), int(shape[2]), 32 * kernel.metadata.num_warps),
    )


def row_loops(listing: str, dtype: torch.dtype, V: int, threads: int) -> RowLoops | None:
    """Counts a row pass in the text that `nvdisasm -c` makes of it; None where no loop fits in a row of V logits."""
    code, labels = [], {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif (instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)) and not instruction[1].startswith("NOP"):
            code.append(instruction[1])
    within: set[int] = set()
    reading, writing = [], []
    for end, instruction in enumerate(code):
        back = re.search(r"BRA.*`\((\.L_\w+)\)", instruction)
        if not back or labels.get(back[1], len(code)) >= end:
            continue
        body = code[labels[back[1]] : end + 1]
        within.update(range(labels[back[1]], end + 1))
        if all(any(name in line for line in body) for name in ("MUFU.EX2", "LDG")):  # not the target's dot product
            (writing if any("STG" in line for line in body) else reading).append(body)
    if not reading:
        return None
    # Between the two of every row stand those of rows whose logits are too large.
    loops = [reading[0], *writing[-1:]]
    logits = [sum(_bytes(line) for line in body if "LDG" in line) // dtype.itemsize for body in loops]  # of a thread
    if row_pitch(V, dtype) < threads * logits[0]:
        return None
    each = [len(body) / count for body, count in zip(loops, logits, strict=True)]
    tiles = [row_pitch(V, dtype) // (threads * count) for count in logits]
    issued = len(code) - len(within) + sum(len(body) * count for body, count in zip(loops, tiles, strict=True))
    lines = [line for body in loops for line in body]
    return RowLoops(
        statistics=each[0],
        gradient=each[1] if writing else 0.0,
        barriers=sum("BAR" in line for line in lines),
        narrow=sum(_bytes(line) < 16 for line in lines if "LDG" in line or "STG" in line),
        whole=issued * threads / V,
    )


def _bytes(access: str) -> int:
    """That a thread moves by a load or store."""
    width = re.search(r"(?:LDG|STG)\S*?\.(U8|S8|U16|S16|64|128|256)\b", access)
    return {"8": 1, "16": 2}.get(width[1].lstrip("US"), int(width[1].lstrip("US")) // 8) if width else 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--chips", nargs="+", default=CHIPS, choices=CHIPS, help="default: all")
    table = []
    options = parser.parse_args()
    for capability in (capability for capability in SHARED_LIMITS if f"sm_{capability}" in options.chips):
        for case, kernel in compile_all(GPUTarget("cuda", capability, 32)):
            table.append(usage(case, kernel, capability))
    line = "{:24} {:38} {:>6} {:>5} {:>9} {:>13} {:>12} {:>10} {:>8} {:>8} {:>6} {:>8}"
    heads = "kernel", "case", "sm", "warps", "registers", "spilled bytes", "shared bytes"
    print(line.format(*heads, "statistics", "gradient", "barriers", "narrow", "whole"))
    for *row, loops in table:
        cells = [f"{count:.1f}" if isinstance(count, float) else count for count in loops or [""] * 5]
        print(line.format(*row, *cells))
    if ROCM in options.chips:
        print(f"ROCm, {ROCM}: {sum(1 for _ in compile_all(GPUTarget('hip', ROCM, 64)))} kernels compiled")
    if options.json is not None:
        options.json.write_text(
            json.dumps([row._asdict() | {"loops": row.loops and row.loops._asdict()} for row in table])
        )


if __name__ == "__main__":
    main()
