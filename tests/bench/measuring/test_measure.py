"""How the benchmarks take time and memory, on work whose time and memory are known."""

import time

import pytest
import torch

from bench.measuring import measure
from bench.measuring.measure import MIB, Task, Timing, elapsed_ms, peak_scratch, time_interleaved

CPU = torch.device("cpu")
BLOCK = MIB // 4  # float32 elements of a MiB


def test_ratios_are_paired_by_round():
    # The machine is ten times slower in the last two rounds; the task is always half as fast as the floor.
    timing = Timing([2.0, 20.0, 2.0, 20.0, 2.0], [1.0, 10.0, 1.0, 10.0, 1.0])
    assert timing.share_of_floor == 0.5
    assert timing.median_ms == 2.0
    assert timing.spread_ms == 18.0


def test_only_the_run_is_timed_and_gets_what_the_setup_made():
    got = []
    task = Task(lambda *arguments: got.append(arguments), lambda: (time.sleep(0.2), "made"))
    assert elapsed_ms(task, CPU) < 200
    assert got == [(None, "made")]


def test_tasks_are_interleaved_each_beside_the_floor_that_goes_first_in_every_other_round():
    calls = []
    tasks = {name: Task(lambda name=name: calls.append(name)) for name in "ab"}
    timings = time_interleaved(tasks, Task(lambda: calls.append("floor")), CPU, budget_s=0.0)
    even, odd = ["floor", "a", "floor", "b"], ["a", "floor", "b", "floor"]
    rounds = [call for i in range(measure.MIN_ROUNDS) for call in (odd if i % 2 else even)]
    assert calls[-len(rounds) :] == rounds
    assert {name: len(timing.milliseconds) for name, timing in timings.items()} == dict.fromkeys(
        "ab", measure.MIN_ROUNDS
    )


def test_a_pair_is_the_floor_and_the_task_whichever_went_first():
    (timing,) = time_interleaved(
        {"slow": Task(lambda: time.sleep(0.05))}, Task(lambda: time.sleep(0.01)), CPU, budget_s=0.0
    ).values()
    assert min(timing.milliseconds) >= 50 and min(timing.floor_milliseconds) < 50


def test_a_slower_task_has_a_smaller_share():
    tasks = {"same": Task(lambda: time.sleep(0.01)), "slow": Task(lambda: time.sleep(0.05))}
    timings = time_interleaved(tasks, tasks["same"], CPU, budget_s=0.0)
    assert timings["slow"].share_of_floor < timings["same"].share_of_floor
    assert timings["slow"].median_ms >= 50


def test_scratch_is_what_is_held_beside_inputs_and_results():
    inputs = torch.ones(BLOCK)

    def run() -> torch.Tensor:
        first = torch.ones(4 * BLOCK)
        result = inputs + 1
        del first
        second = torch.ones(2 * BLOCK)
        third = torch.ones(3 * BLOCK)
        return result.add_(second[0] + third[0])

    assert peak_scratch(Task(run), CPU) == pytest.approx(5, rel=1e-3)


def test_a_result_that_reuses_freed_memory_is_no_scratch_but_what_was_there_before_it_is():
    def run() -> tuple[torch.Tensor, ...]:
        torch.ones(6 * BLOCK)  # freed at once; the allocator may give the same address to a result
        return torch.ones(6 * BLOCK), torch.ones(6 * BLOCK)

    assert peak_scratch(Task(run), CPU) == pytest.approx(6, rel=1e-3)


def test_what_a_forward_keeps_for_the_backward_counts():
    x = torch.ones(BLOCK, requires_grad=True)
    task = Task(lambda y: torch.autograd.grad(y, x, torch.ones_like(y)), lambda: (x.exp().exp(),))
    # Both exponentials are kept; the incoming gradient and the inner derivative come on top, the outer one is x's own.
    assert peak_scratch(task, CPU) == pytest.approx(4, rel=1e-3)


def test_freed_inputs_do_not_make_room():
    inputs = [torch.ones(8 * BLOCK)]

    def run() -> torch.Tensor:
        inputs.clear()
        return torch.ones(2 * BLOCK).sum()

    assert peak_scratch(Task(run), CPU) == pytest.approx(2, rel=1e-3)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list:
    """A stand-in for a GPU whose clock makes 500 cycles a microsecond: the log of what it was told, and a clock.

    Launching takes the host a millisecond, a task the device 3 ms.
    """
    log: list = []
    now = {"host": 0.0, "device": 0.0}  # ms: when the host is done, and when the device will be

    def launch(what: object, host_ms: float, device_ms: float) -> None:
        log.append(what)
        now["host"] += host_ms
        now["device"] = max(now["device"], now["host"]) + device_ms

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            launch("event", 0.0, 0.0)
            self.at = now["device"]

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    def synchronize(device: torch.device) -> None:
        log.append("synchronize")
        now["host"] = max(now.values())

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: launch(cycles, 0.0, cycles / 500_000))
    measure._busy_cycles.cache_clear()
    log.append(lambda: launch("run", 1.0, 3.0))
    yield log
    measure._busy_cycles.cache_clear()


def test_the_device_is_busy_while_a_task_is_launched(gpu):
    run = gpu.pop()
    cuda = torch.device("cuda")
    assert elapsed_ms(Task(run, lambda: gpu.append("setup") or ()), cuda) == pytest.approx(3.0)
    busy = 500_000 * measure.BUSY_MS
    assert gpu[-6:] == ["synchronize", busy, "event", "run", "event", "synchronize"]
    assert gpu.count("setup") == 1 and gpu.index("setup") < gpu.index(busy)
    # Without the wait the host's millisecond would count.
    assert measure._between_events(run, cuda, 0) == pytest.approx(4.0)


def test_what_a_task_waits_for_itself_counts(gpu):
    run = gpu.pop()
    task = Task(lambda: (run(), torch.cuda.synchronize(torch.device("cuda")), run()))
    assert elapsed_ms(task, torch.device("cuda")) == pytest.approx(3.0 + 1.0 + 3.0)


def test_floor_and_tasks_are_measured_alike(gpu):
    run = gpu.pop()
    timings = time_interleaved({"same": Task(run)}, Task(run), torch.device("cuda"), budget_s=0.0)
    assert timings["same"].milliseconds == pytest.approx([3.0] * measure.MIN_ROUNDS)
    assert timings["same"].floor_milliseconds == timings["same"].milliseconds
