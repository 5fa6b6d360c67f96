"""Times the loss head and its peers, and takes their memory.

    make bench                       a selection, in minutes on two CPU cores
    make bench ARGS=--full           every size and dtype
    make bench ARGS="-k repo_fast"   whatever pytest can select: peers, computations, T512, V32001, bfloat16, ...

or, by hand, the two steps of it:

    pytest bench/ --benchmark-json run.json
    python -m bench.report run.json --out DIR

Runs on the GPU where there is one. Each test is one computation (bench/loss_head/cases.py) on one shape by one peer
(bench/loss_head/peers/); its result is checked before it is timed, and the floor runs right before each of its rounds.
"""

import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch

from bench.loss_head.cases import COMPUTATIONS, Case, make_case
from bench.loss_head.check import check
from bench.loss_head.peers import PEERS, PRODUCTS
from bench.measuring.measure import Task, Timing, elapsed_ms, peak_scratch, rounds_within, synchronize

BUDGET_S = 3.0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Shape:
    """T tokens, of which a share is ignored, D hidden size, V vocabulary."""

    T: int
    D: int
    V: int
    dtype: str = "bfloat16"
    ignored: float = 0.0

    def __str__(self) -> str:
        ignored = f"-{self.ignored:.0%}ignored" if self.ignored else ""
        return f"T{self.T}-D{self.D}-V{self.V}-{self.dtype}{ignored}"


if DEVICE.type == "cpu":
    HEADLINE = Shape(512, 1024, 32001)
    LENGTHS = [Shape(T, 256, 32001) for T in (128, 256, 512, 1024, 2048, 4096)]
    VOCABULARIES = [Shape(256, 256, V) for V in (49152, 128256)]
    QUICK_LENGTHS = {128, 1024, 4096}
else:
    HEADLINE = Shape(16384, 4096, 32001)
    LENGTHS = [Shape(T, 4096, 32001) for T in (1024, 2048, 4096, 8192, 16384)]
    VOCABULARIES = [Shape(8192, 4096, V) for V in (49152, 128256)]
    QUICK_LENGTHS = {1024, 4096, 16384}
# As many valid rows as the headline's, among twice as many tokens.
HALF_IGNORED = replace(HEADLINE, T=2 * HEADLINE.T, ignored=0.5)

QUICK = [
    *((computation, HEADLINE) for computation in COMPUTATIONS),
    ("policy_loss", replace(HEADLINE, dtype="float32")),
    ("policy_loss", HALF_IGNORED),
    *(("policy_loss", shape) for shape in LENGTHS if shape.T in QUICK_LENGTHS),
    *(("policy_loss", shape) for shape in VOCABULARIES),
]
FULL = [
    (computation, replace(shape, dtype=dtype))
    for dtype in ("bfloat16", "float32")
    for shape in dict.fromkeys([HEADLINE, HALF_IGNORED, *LENGTHS, *VOCABULARIES])
    for computation in COMPUTATIONS
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    measured = FULL if metafunc.config.getoption("--full") else QUICK
    metafunc.parametrize(("computation", "shape"), measured, ids=str)
    metafunc.parametrize("name", PEERS)


@lru_cache(maxsize=1)
def case_of(shape: Shape) -> Case:
    return make_case(shape.T, shape.D, shape.V, getattr(torch, shape.dtype), DEVICE, shape.ignored)


@lru_cache(maxsize=1)
def floor_of(computation: str, shape: Shape) -> Task:
    return PRODUCTS.task(computation, case_of(shape))


def test_loss_head(benchmark: Any, name: str, computation: str, shape: Shape) -> None:
    peer, case, floor = PEERS[name], case_of(shape), floor_of(computation, shape)
    why_not = peer.why_not(computation, DEVICE)
    if why_not is not None:
        pytest.skip(why_not)
    start = time.perf_counter()
    task = peer.task(computation, case)
    results = task.run(*task.setup())
    synchronize(DEVICE)
    first_call_s = time.perf_counter() - start
    scratch_mib = None
    if peer is not PRODUCTS:
        check(peer, computation, case, results)
        del results
        scratch_mib = peak_scratch(task, DEVICE)

    # Both are timed in the same way, as device time on a GPU: pytest-benchmark's own figures take more in.
    floor_ms: list[float] = []
    own_ms: list[float] = []
    rounds = rounds_within(BUDGET_S, elapsed_ms(floor, DEVICE) + elapsed_ms(task, DEVICE))
    benchmark.group = f"{computation} {shape} {DEVICE.type}"
    benchmark.pedantic(
        lambda: own_ms.append(elapsed_ms(task, DEVICE)),
        setup=lambda: floor_ms.append(elapsed_ms(floor, DEVICE)),
        rounds=rounds,
    )
    timing = Timing(own_ms, floor_ms)
    benchmark.extra_info |= {
        **asdict(shape),
        "computation": computation,
        "peer": name,
        "notes": peer.notes,
        "ms": timing.median_ms,
        "spread_ms": timing.spread_ms,
        "tflops": case.flop(computation) / timing.median_ms / 1e9,
        "share_of_floor": timing.share_of_floor,
        "scratch_mib": scratch_mib,
        "first_call_s": first_call_s,
    }
