"""The loss head on a device beside its peers and the bare products: time, memory, where the time goes, and what other
settings would make of it.

Shapes are those of Alpaca-7B's head, of Llama-3's vocabulary, and the one that peers publish figures of. Ours is
measured beside plain PyTorch first, in every shape that a target asks for; then come peers, of which some compile for
a minute.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.loss_head.cases import Case, make_case
from bench.loss_head.check import check
from bench.loss_head.chunks import chunks_of
from bench.loss_head.peers import NOT_MEASURED, PEERS, PRODUCTS
from bench.measuring.machine import device_name
from bench.measuring.measure import Task, Timing, peak_scratch, synchronize, time_interleaved
from bench.measuring.tables import at_least, at_most, render
from repo_fast.ops import sweep

OURS, PLAIN = "repo_fast", "plain"
# The kernels of kernels/ that pass over rows of logits, and how often each moves a logit.
ROW_KERNELS = {"_policy_kernel": 2, "_gradient_kernel": 2, "_log_probs_kernel": 1}
TOP_KERNELS = 12
NAME_LENGTH = 72  # of a kernel, in a table
# Of the time of the floor: where no shape of its own has another one.
POLICY_SHARE, LOG_PROBS_SHARE = 0.90, 0.90
# What peers publish was measured on this device.
PUBLISHED_ON = "H100 80GB HBM3"
PUBLISHED_MS = {"policy_loss": 39.0, "log_probs": 12.5}
# Of plain PyTorch's, by T.
SCRATCH_SHARE = {4096: 0.25, 16384: 0.17}


@dataclass(frozen=True)
class Shape:
    T: int
    D: int
    V: int
    ignored: float = 0.0

    def __str__(self) -> str:
        return f"T {self.T}, D {self.D}, V {self.V}" + (f", {self.ignored:.0%} ignored" if self.ignored else "")

    def case(self, device: torch.device) -> Case:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return make_case(self.T, self.D, self.V, dtype, device, ignored=self.ignored)


ALPACA, LLAMA = Shape(16384, 4096, 32001), Shape(16384, 4096, 128256)
HALF_IGNORED = Shape(16384, 4096, 32001, ignored=0.5)
PUBLISHED, PUBLISHED_NARROW = Shape(8192, 4096, 131072), Shape(8192, 2048, 131072)
SHORT = [Shape(4096, 4096, 32001), Shape(4096, 4096, 128256)]
TINY, TINY_HALF_IGNORED = Shape(64, 32, 301), Shape(64, 32, 301, ignored=0.5)


# ------------------------------------------------------------------------------------------------ beside peers


def compare(
    shape: Shape, computation: str, names: tuple[str, ...], device: torch.device, budget_s: float
) -> dict[str, Any]:
    """One computation by those of the named that can run it.

    Returns:
        `shape`, `computation`, `device` by its name, and `peers` by theirs, the floor first: `first_s`, the first call,
        which compiles where anything does; `ms`, the median, and `spread_ms`; `share`, the floor's time over its own;
        `tflops` (TFLOP/s) of the products that the mathematics needs; `scratch_mib` at the peak; or `why_not`. The
        floor has neither a first call nor scratch.
    """
    case = shape.case(device)
    rows: dict[str, dict[str, Any]] = {PRODUCTS.name: {}}
    tasks: dict[str, Task] = {}
    for name in names:
        why_not = PEERS[name].why_not(computation, device)
        if why_not is not None:
            rows[name] = {"why_not": why_not}
            continue
        try:
            tasks[name], rows[name] = _start(name, computation, case)
        except Exception as error:  # a peer that cannot compute this must not take the others with it
            if name == OURS:
                raise
            rows[name] = {"why_not": _first_line(error)}
    timings = time_interleaved(tasks, PRODUCTS.task(computation, case), device, budget_s)
    floor_ms = [ms for timing in timings.values() for ms in timing.floor_milliseconds]
    for name, timing in {PRODUCTS.name: Timing(floor_ms, floor_ms), **timings}.items():
        rows[name] |= {
            "ms": timing.median_ms,
            "spread_ms": timing.spread_ms,
            "share": timing.share_of_floor,
            "tflops": 1e-9 * case.flop(computation) / timing.median_ms,
        }
    return {"shape": asdict(shape), "computation": computation, "device": device_name(device), "peers": rows}


def _start(name: str, computation: str, case: Case) -> tuple[Task, dict[str, Any]]:
    """A peer's task, called once, its result checked, and its memory."""
    start = time.perf_counter()
    task = PEERS[name].task(computation, case)
    results = task.run(*task.setup())
    synchronize(case.device)
    seconds = time.perf_counter() - start
    if PEERS[name].objective is not None:
        check(PEERS[name], computation, case, results)
    del results
    return task, {"first_s": seconds, "scratch_mib": peak_scratch(task, case.device)}


def judge(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The targets of the loss head against what `compare` found, by name: `value`, `target` and whether `met`.

    Where a shape was measured twice, beside plain PyTorch and beside other peers, what both say is taken from the
    first.
    """
    targets: dict[str, Any] = {}
    for result in results.values():
        peers = {name: row for name, row in result.get("peers", {}).items() if "ms" in row}
        shape = Shape(**result["shape"]) if OURS in peers else None
        if shape not in (ALPACA, LLAMA, HALF_IGNORED, PUBLISHED, *SHORT):
            continue
        own = _judge_log_probs if result["computation"] == "log_probs" else _judge_policy_loss
        targets = own(shape, peers) | _judge_published(shape, result, peers[OURS]["ms"]) | targets
    return targets


def _judge_log_probs(shape: Shape, peers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"one product / log-probs, {shape}": at_least(peers[OURS]["share"], LOG_PROBS_SHARE)}


def _judge_policy_loss(shape: Shape, peers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    targets: dict[str, Any] = {}
    if shape not in SHORT:
        share = 0.93 if shape in (ALPACA, PUBLISHED) else POLICY_SHARE
        targets[f"three products / fused op, {shape}"] = at_least(peers[OURS]["share"], share)
        for name, row in peers.items():
            if name not in (OURS, PRODUCTS.name):
                targets[f"time of {name} / fused op, {shape}"] = at_least(row["ms"] / peers[OURS]["ms"], 1.0)
    if PLAIN in peers and shape.T in SCRATCH_SHARE and not shape.ignored:
        scratch = peers[OURS]["scratch_mib"] / peers[PLAIN]["scratch_mib"]
        targets[f"scratch of fused op / plain, {shape}"] = at_most(scratch, SCRATCH_SHARE[shape.T])
    return targets


def _judge_published(shape: Shape, result: dict[str, Any], ms: float) -> dict[str, Any]:
    computation = result["computation"]
    if shape != PUBLISHED or PUBLISHED_ON not in result["device"] or computation not in PUBLISHED_MS:
        return {}
    return {f"ms of {computation}, {shape}, {PUBLISHED_ON}": at_most(ms, PUBLISHED_MS[computation])}


# --------------------------------------------------------------------------------------- where the time goes


def breakdown(shape: Shape, computation: str, device: torch.device) -> dict[str, Any]:
    """Kernels (on a CPU: operators) of our op by their own time, and what bandwidth the row pass has.

    Returns:
        `total_ms`; `idle_ms`, how long a GPU had nothing to do between the first and the last; `kernels`, the slowest
        first: `name`, `calls`, `ms`, and `gb_s` of those that pass over the logits, counting each logit's read and
        write once.
    """
    case = shape.case(device)
    task = PEERS[OURS].task(computation, case)
    task.run(*task.setup())
    arguments = task.setup()
    synchronize(device)
    on_gpu = device.type != "cpu"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        task.run(*arguments)
        synchronize(device)
    kernels = []
    for event in profiler.key_averages():
        if (event.device_type == DeviceType.CPU) == on_gpu:
            continue
        ms = 1e-3 * (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        row = {"name": event.key, "calls": event.count, "ms": ms}
        moves = ROW_KERNELS.get(event.key)
        if moves is not None:
            logits = case.rows.numel() * shape.V * sweep.product_dtype(case.weight).itemsize
            row["gb_s"] = 1e-6 * moves * logits / ms
        kernels.append(row)
    kernels.sort(key=lambda row: -row["ms"])
    ranges = [event.time_range for event in profiler.events() if event.device_type != DeviceType.CPU]
    return {
        "total_ms": sum(row["ms"] for row in kernels),
        "idle_ms": 1e-3 * idle([(span.start, span.end) for span in ranges]),
        "kernels": kernels[:TOP_KERNELS],
    }


def idle(spans: list[tuple[float, float]]) -> float:
    """The time between the earliest start and the latest end that is in no span."""
    spans = sorted(spans)
    gaps, busy_until = 0.0, spans[0][0] if spans else 0.0
    for start, end in spans:
        gaps += max(0.0, start - busy_until)
        busy_until = max(busy_until, end)
    return gaps


# --------------------------------------------------------------------------------------------------- tuning


def settings(device: torch.device) -> Iterator[tuple[str, bool, Callable[[], AbstractContextManager]]]:
    """What decides the speed, and values to try: name, whether it is the value in the source, and how to set it."""
    tall = (256, 512) if device.type == "cpu" else (2048, 4096, 8192, 16384)
    for count in tall:  # which of them is shipped depends on the shape
        yield f"chunks of {count} rows", False, partial(chunks_of, count)
    if device.type == "cpu":
        return
    from repo_fast.kernels import linear_log_probs as rows

    for module, constant, values in (
        (sweep, "VECTOR_BYTES", (2, 16)),  # 2: products of V columns, whatever V
        (sweep, "ROW_ALIGNMENT_BYTES", (128, 1024)),
        (rows, "BYTES_PER_THREAD", (192, 384, 768)),
        (rows, "MAX_THREADS", (256, 512, 1024)),
        (rows, "TILE_BYTES_PER_THREAD", (16, 32, 64)),
    ):
        for value in values:
            shipped = getattr(module, constant) == value
            yield f"{constant} = {value}", shipped, partial(mock.patch.object, module, constant, value)


def tune(shape: Shape, device: torch.device, budget_s: float) -> dict[str, Any]:
    """Our policy loss, forward and backward, with one setting changed at a time.

    Returns:
        By setting: `shipped`, whether it is the value in the source; `ms`; `speed`, the time of the shipped settings
        over its own, by pairs; or `why_not`.
    """
    case = shape.case(device)
    shipped = PEERS[OURS].task("policy_loss", case)
    rows: dict[str, dict[str, Any]] = {}
    tasks: dict[str, Task] = {}
    for name, is_shipped, setting in settings(device):
        rows[name] = {"shipped": is_shipped}
        task = Task(partial(_run_with, setting, shipped))
        try:
            task.run()
            synchronize(device)
        except Exception as error:  # a tile may need more registers or shared memory than there are
            rows[name]["why_not"] = _first_line(error)
            continue
        tasks[name] = task
    for name, timing in time_interleaved(tasks, shipped, device, budget_s).items():
        rows[name] |= {"ms": timing.median_ms, "speed": timing.share_of_floor}
    return {"shape": asdict(shape), "settings": rows}


def _run_with(setting: Callable[[], AbstractContextManager], task: Task) -> Any:
    with setting():
        return task.run()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


# ---------------------------------------------------------------------------------------------------- units


def units(device: torch.device, tiny: bool, budget_s: float) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The measurements, those that targets ask for first: their names, and functions that make them.

    Args:
        device: Where to measure.
        tiny: Shapes of no interest, for a test.
        budget_s: Seconds for all rounds of all of them.
    """
    two, both = (OURS, PLAIN), ("policy_loss", "log_probs")
    beside = (OURS, *(name for name in PEERS if name not in (OURS, PLAIN, "repo_fast torch", PRODUCTS.name)))
    if tiny:
        beside = (OURS, "torch_linear")
        asked = [(TINY, "policy_loss"), (TINY, "log_probs"), (TINY_HALF_IGNORED, "policy_loss")]
        more, among_peers, typical = [(TINY, "log_probs_backward")], [(TINY, "log_probs")], TINY
    else:
        asked = [(shape, computation) for shape in (ALPACA, PUBLISHED, LLAMA) for computation in both]
        asked += [(HALF_IGNORED, "policy_loss"), *((shape, "policy_loss") for shape in SHORT)]
        typical = ALPACA
        more = [(PUBLISHED_NARROW, computation) for computation in both] + [(ALPACA, "log_probs_backward")]
        among_peers = [(ALPACA, "policy_loss"), (LLAMA, "policy_loss")]
    share = budget_s / (len(asked) + len(more) + len(among_peers) + 2)  # tuning takes as long as two

    for shape, computation in asked:
        yield f"{computation}, {shape}", partial(compare, shape, computation, two, device, share)
    for computation in both:
        yield f"breakdown of {computation}, {typical}", partial(breakdown, typical, computation, device)
    for shape, computation in among_peers:
        name = f"{computation} beside other peers, {shape}"
        yield name, partial(compare, shape, computation, beside, device, share)
    for shape, computation in more:
        yield f"{computation}, {shape}", partial(compare, shape, computation, two, device, share)
    yield f"tuning, {typical}", partial(tune, typical, device, 2 * share)


def table(results: dict[str, dict[str, Any]]) -> str:
    """What `units` found, as text."""
    comparisons: list[list[str]] = []
    kernels: list[list[str]] = []
    tuning: list[list[str]] = []
    for name, result in results.items():
        if "peers" in result:
            comparisons += _section(name, result["peers"], _peer_cells)
        elif "kernels" in result:
            waited = {"the device idle": {"ms": result["idle_ms"], "calls": ""}} if result["idle_ms"] else {}
            kernels += _section(name, {row["name"]: row for row in result["kernels"]} | waited, _kernel_cells)
        elif "settings" in result:
            tuning += _section(name, result["settings"], _setting_cells)
    tables = [
        (["", "ms", "spread", "of floor", "TFLOP/s", "scratch MiB", "first call s"], comparisons),
        (["own time of kernels", "ms", "calls", "GB/s"], kernels),
        (["one setting changed", "ms", "speed", ""], tuning),
    ]
    return "\n\n".join([*(render(header, rows) for header, rows in tables if rows), NOT_MEASURED])


def _section(
    name: str, rows: dict[str, dict[str, Any]], cells: Callable[[dict[str, Any]], list[str]]
) -> list[list[str]]:
    """A heading, and a line for each row: what it is, and its cells, or the reason why there are none."""
    lines = [[f"  {key[:NAME_LENGTH]}", *cells(row)] for key, row in rows.items()]
    return [[name, *[""] * (len(lines[0]) - 1)], *lines] if lines else []


LAST_CELLS = (("scratch_mib", 0), ("first_s", 1))


def _peer_cells(row: dict[str, Any]) -> list[str]:
    if "why_not" in row:
        return [row["why_not"][:40], *[""] * 5]
    cells = [f"{row['ms']:.2f}", f"{row['spread_ms']:.2f}", f"{row['share']:.3f}", f"{row['tflops']:.1f}"]
    return [*cells, *(f"{row[name]:.{digits}f}" if name in row else "" for name, digits in LAST_CELLS)]


def _kernel_cells(row: dict[str, Any]) -> list[str]:
    return [f"{row['ms']:.3f}", str(row["calls"]), f"{row['gb_s']:.0f}" if "gb_s" in row else ""]


def _setting_cells(row: dict[str, Any]) -> list[str]:
    if "why_not" in row:
        return [row["why_not"][:40], "", ""]
    return [f"{row['ms']:.2f}", f"{row['speed']:.3f}", "shipped" if row["shipped"] else ""]
