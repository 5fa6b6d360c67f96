"""How the benchmarks take time and memory.

Time is compared with a *floor*, the bare matrix products, that is timed beside each run: what else the machine does
moves both, so the median of the paired ratios says more than the ratio of two medians. `time_interleaved` times it
before a run and after one in turn, because a GPU at its limit of power is slower after a run that took much of it;
`pytest bench/` always before.

On a GPU time is taken with the device busy, as it is in a training step: a wait is queued on the device first, which
hides what the host takes to launch the floor or a task. It hides it up to its own length, and up to the first point
where the task itself waits for the device. The ops read one count back, that of the valid rows: from there to the next
launch the device has nothing to do, and that counts, here as in a step.

Memory is PyTorch's own record of allocations, on any device: what an extension takes elsewhere is not seen.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MIN_ROUNDS, MAX_ROUNDS = 3, 50
BUSY_MS = 2.0  # longer than it takes to launch an op
SOUNDING_CYCLES = 1_000_000
MIB = 2**20


class Task(NamedTuple):
    """Something to measure: `run`, called with what `setup` returned. Only `run` is measured."""

    run: Callable[..., Any]
    setup: Callable[[], tuple[Any, ...]] = tuple


@dataclass(frozen=True)
class Timing:
    """Rounds in the order in which they ran, in milliseconds, and the floor's beside each of them."""

    milliseconds: Sequence[float]
    floor_milliseconds: Sequence[float]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def spread_ms(self) -> float:
        """The interquartile range."""
        low, _, high = statistics.quantiles(self.milliseconds, n=4, method="inclusive")
        return high - low

    @property
    def share_of_floor(self) -> float:
        """The median of floor ÷ own time, round by round: 1 is as fast as the floor."""
        pairs = zip(self.floor_milliseconds, self.milliseconds, strict=True)
        return statistics.median(floor / own for floor, own in pairs)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was launched; a CPU always has."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def elapsed_ms(task: Task, device: torch.device) -> float:
    """Runs a task once. Device time between two events on a GPU that was busy before, wall-clock time on a CPU."""
    arguments = task.setup()
    if device.type == "cpu":
        start = time.perf_counter()
        task.run(*arguments)
        return 1e3 * (time.perf_counter() - start)
    return _between_events(lambda: task.run(*arguments), device, _busy_cycles(device))


def _between_events(run: Callable[[], Any], device: torch.device, cycles: int) -> float:
    """Device time of what `run` launches, in milliseconds, behind a wait on the device of so many cycles."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    synchronize(device)
    if cycles > 0:
        torch.cuda._sleep(cycles)
    before.record()
    run()
    after.record()
    synchronize(device)
    return before.elapsed_time(after)


@cache
def _busy_cycles(device: torch.device) -> int:
    """How many cycles of its clock a device waits in `BUSY_MS`."""

    def sound() -> float:
        return _between_events(lambda: torch.cuda._sleep(SOUNDING_CYCLES), device, 0)

    sound()  # loads the kernel
    return round(SOUNDING_CYCLES * BUSY_MS / sound())


def median_ms(task: Task, device: torch.device, trials: int) -> float:
    """The median of some runs, after one that is not counted."""
    elapsed_ms(task, device)
    return statistics.median(elapsed_ms(task, device) for _ in range(trials))


def rounds_within(budget_s: float, round_ms: float) -> int:
    """How many rounds of a known length a budget of seconds buys, but `MIN_ROUNDS` at least."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(1e3 * budget_s / max(round_ms, 1e-3))))


def time_interleaved(
    tasks: Mapping[str, Task], floor: Task, device: torch.device, budget_s: float
) -> dict[str, Timing]:
    """Times tasks in turn, round by round, each beside the floor. Two runs of each come first, not counted.

    Args:
        tasks: By name.
        floor: What each is compared with.
        device: Where they run.
        budget_s: Seconds for all rounds together; `MIN_ROUNDS` are run even if they take longer.

    Returns:
        Each task's timing, under its name.
    """
    for task in (floor, *tasks.values()):
        elapsed_ms(task, device)
    floor_ms = elapsed_ms(floor, device)
    rounds = rounds_within(budget_s, sum(elapsed_ms(task, device) + floor_ms for task in tasks.values()))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for i in range(rounds):
        for name, task in tasks.items():
            first, second = (floor, task) if i % 2 == 0 else (task, floor)
            pair = elapsed_ms(first, device), elapsed_ms(second, device)
            times[name].append(pair if i % 2 == 0 else pair[::-1])
    return {name: Timing([own for _, own in pairs], [floor for floor, _ in pairs]) for name, pairs in times.items()}


def peak_scratch(task: Task, device: torch.device) -> float:
    """Runs a task once, with its setup, and returns the MiB that it held at its peak beside its inputs and its results.

    Inputs are what was allocated before; results are the tensors that `run` returns. A result counts as one from the
    moment when its memory is allocated. What a forward in `setup` keeps for the backward counts.

    Raises:
        RuntimeError: PyTorch did not record what was allocated on `device`.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        probe = torch.empty(1, device=device)
        returned = task.run(*task.setup())
        synchronize(device)
    results = [probe, returned] if isinstance(returned, Tensor) else [probe, *returned]
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    own_type = 0 if device.type == "cpu" else 1  # c10's numbers of device types: 1 is CUDA and ROCm
    changes = [
        (event["ts"], event["args"]["Addr"], event["args"]["Bytes"])
        for event in events
        if event["args"]["Device Type"] == own_type
    ]
    if probe.data_ptr() not in [address for _, address, _ in changes]:
        raise RuntimeError(f"peak_scratch: PyTorch's profiler did not record what was allocated on {device}")
    changes.sort(key=lambda change: change[0])
    return _peak(changes, {result.untyped_storage().data_ptr() for result in results}) / MIB


def _peak(changes: Sequence[tuple[float, int, int]], results: set[int]) -> int:
    """The largest number of bytes held, the blocks that end up as results left out.

    `changes` are (time, address, bytes), negative when freed. Addresses are used again: the block that becomes a result
    is the last one allocated at its address.
    """
    final = {address: i for i, (_, address, size) in enumerate(changes) if size > 0 and address in results}
    sizes: dict[int, int] = {}  # of the blocks that are held, by address
    held = peak = 0
    for i, (_, address, size) in enumerate(changes):
        if size > 0:
            if final.get(address) != i:
                sizes[address] = size
                held += size
        else:
            held -= sizes.pop(address, 0)  # 0: an input, allocated before
        peak = max(peak, held)
    return peak
