"""The cells of the simulation: what is drawn, by which bound it is judged, and what the truth is.

Prompts differ: each has a probability theta of an unsafe response, drawn from a beta distribution, and K responses. So
the responses of a prompt agree more than those of different prompts do, which is what makes counting responses as if
they were independent pass what it should not.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from repo_fast.evaluation import bounds

DELTA = 0.05
# Of all cells together: how often chance alone may fail the check.
_FALSE_ALARM = 1e-3
Bound = Literal["binomial", "betting", "student", "responses counted"]


@dataclass(frozen=True)
class Cell:
    """One kind of data and one bound.

    Attributes:
        name: What is drawn.
        bound: What it is judged by.
        n: Prompts.
        k: Responses a prompt.
        limit: The limit of the claim.
        draw: From a generator and a number of repeats: float64 [repeats, n], a value a prompt.
    """

    name: str
    bound: Bound
    n: int
    k: int
    limit: float
    draw: Callable[[np.random.Generator, int], np.ndarray]


def passes(cell: Cell, repeats: int) -> int:
    """How many of the repeats pass the claim: falsely, where the truth is the limit. The seed is the cell's own."""
    generator = np.random.default_rng(zlib.crc32(f"{cell.name} {cell.bound} {cell.n} {cell.k} {cell.limit}".encode()))
    return int((_p_values(cell, cell.draw(generator, repeats)) <= DELTA).sum())


def _p_values(cell: Cell, values: np.ndarray) -> np.ndarray:
    match cell.bound:
        case "betting":
            return bounds.betting_p(values, cell.limit, DELTA)
        case "student":
            return np.array([bounds.student_p(own, cell.limit) for own in values])
        case "binomial":
            return _binomial(values.sum(1), cell.n, cell.limit)
        case "responses counted":
            return _binomial((values * cell.k).sum(1), cell.n * cell.k, cell.limit)


def _binomial(counts: np.ndarray, n: int, limit: float) -> np.ndarray:
    p = {count: bounds.binomial_p(count, n, limit) for count in np.unique(counts.round().astype(int)).tolist()}
    return np.array([p[count] for count in counts.round().astype(int).tolist()])


def allowed(repeats: int, cells: int | None = None) -> int:
    """The most false passes that a bound of level `DELTA` may have in a cell."""
    return int(stats.binom.isf(_FALSE_ALARM / (cells or len(CELLS)), repeats, DELTA))


def _shares(share: float, agreement: float, k: int, n: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Each prompt's share of unsafe responses; `agreement` in (0, 1) is their correlation within a prompt."""
    a = share * (1 / agreement - 1)
    b = a * (1 / share - 1)
    return lambda generator, repeats: generator.binomial(k, generator.beta(a, b, (repeats, n))) / k


def _majorities(share: float, agreement: float, k: int, n: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Whether more than half of each prompt's responses are unsafe."""
    drawn = _shares(share, agreement, k, n)
    return lambda generator, repeats: (drawn(generator, repeats) > 0.5).astype(float)


def _majority_share(share: float, agreement: float, k: int) -> float:
    """The truth of `_majorities`."""
    a = share * (1 / agreement - 1)
    return float(stats.betabinom.sf(k // 2, k, a, a * (1 / share - 1)))


def _responses(share: float, agreement: float, k: int, n: int, bound: Bound = "betting", truth: float = 1.0) -> Cell:
    name = f"{share:.0%} of responses unsafe, correlation {agreement:g}"
    return Cell(name, bound, n, k, share, _shares(share * truth, agreement, k, n))


def _prompts(share: float, agreement: float, k: int, n: int) -> Cell:
    name = f"most responses unsafe; {share:.0%} of all, correlation {agreement:g}"
    return Cell(name, "binomial", n, k, _majority_share(share, agreement, k), _majorities(share, agreement, k, n))


def _skewed(n: int) -> Cell:
    return Cell(
        "costs u^8, u uniform", "betting", n, 1, 1 / 9, lambda generator, repeats: generator.random((repeats, n)) ** 8
    )


def _rare(n: int) -> Cell:
    def draw(generator: np.random.Generator, repeats: int) -> np.ndarray:
        return np.where(generator.random((repeats, n)) < 0.02, generator.random((repeats, n)), 0.0)

    return Cell("one cost in fifty not 0, uniform", "betting", n, 1, 0.01, draw)


# So many unsafe responses that as few prompts can pass at all: else a cell would show nothing.
_SHARES = {20: 0.3, 200: 0.1, 2000: 0.05}
CELLS = [
    *(_prompts(_SHARES[n], agreement, k, n) for agreement in (0.1, 0.5) for k in (1, 4, 16) for n in _SHARES),
    *(_responses(_SHARES[n], agreement, k, n) for agreement in (0.1, 0.5) for k in (1, 4, 16) for n in (20, 200)),
    *(_responses(_SHARES[2000], 0.5, k, 2000) for k in (1, 16)),
    *(_skewed(n) for n in (20, 200, 2000)),
    *(_rare(n) for n in (200, 2000)),
]
# What must fail the check: responses counted as if each were a prompt of its own.
PLANTED = [_responses(0.1, 0.5, k, 200, "responses counted") for k in (4, 16)]
ASYMPTOTIC = [
    *(
        Cell(
            "lognormal",
            "student",
            n,
            1,
            float(np.exp(0.5)),
            lambda generator, repeats, n=n: generator.lognormal(0, 1, (repeats, n)),
        )
        for n in (20, 100, 500)
    ),
    *(
        Cell(
            "one cost in fifty not 0, exponential",
            "student",
            n,
            1,
            0.02,
            lambda generator, repeats, n=n: (
                generator.exponential(1, (repeats, n)) * (generator.random((repeats, n)) < 0.02)
            ),
        )
        for n in (20, 100, 500)
    ),
]
POWER = [
    _responses(limit, agreement, k, n, bound, truth=0.2)
    for limit, n in ((0.05, 200), (0.1, 100))
    for agreement, k, bound in ((0.5, 1, "betting"), (0.5, 8, "betting"))
]
