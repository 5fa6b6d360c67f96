"""One-sided tests and bounds of a mean over prompts, and their correction for being several: NumPy and SciPy alone.

A claim says that a mean, or a share, is at most a limit. Two hypotheses are tested, each at its own level: H, that the
claim is false, whose rejection passes it; and H', that it holds, whose rejection fails it. Every test here is of H; H'
is the same test of what is left over: of 1 - Z and 1 - limit, or of the other tail.

    | test                | of                              | assumes                                  |
    |---------------------|---------------------------------|------------------------------------------|
    | `binomial_*`        | a share of prompts              | prompts are drawn independently          |
    | `betting_*`         | a mean of values within [0, 1]  | the same, in an order fixed before       |
    | `student_*`         | any mean                        | the same, and that n is large: asymptotic |

The first two hold at any n, for any distribution. SciPy has the first and the third. For the second, `confseq` (the
authors' own package) has two-sided intervals that bet on both sides at once, and needs a compiler; here one side is
asked for, which is more powerful and twenty lines. Holm's step-down is not in SciPy; `statsmodels` has it, a dependency
of 30 MB for one line.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

# Of the largest bet that cannot lose everything: c of Waudby-Smith and Ramdas.
_TRUNCATION = 0.75


def binomial_p(count: int, n: int, limit: float) -> float:
    """The p-value of "the share is at least `limit`", by the exact binomial test.

    Args:
        count: Prompts of the kind whose share is bounded.
        n: Prompts, drawn independently.
        limit: In [0, 1].

    Returns:
        P(at most `count` of n) where the share is `limit`.

    Raises:
        ValueError: `count` is not in 0..n, n is below 1, or the limit is not in [0, 1].
    """
    _check_count(count, n)
    _check_limit(limit)
    return float(stats.binom.cdf(count, n, limit))


def binomial_reverse_p(count: int, n: int, limit: float) -> float:
    """The p-value of "the share is at most `limit`": P(at least `count` of n) where it is `limit`."""
    return binomial_p(n - count, n, 1 - limit)


def binomial_bound(count: int, n: int, delta: float) -> float:
    """The upper bound of the share at level 1 - delta (Clopper and Pearson 1934): the limits above it are rejected.

    None of 100 at delta 0.05 gives 0.0295, near the rule of three.

    Args:
        count, n: As for `binomial_p`.
        delta: In (0, 1): how often the bound may lie below the share.
    """
    _check_count(count, n)
    _check_delta(delta)
    return 1.0 if count == n else float(stats.beta.isf(delta, count + 1, n - count))


def student_p(values: ArrayLike, limit: float) -> float:
    """The p-value of "the mean is at least `limit`", by Student's t. Asymptotic: see the module's table.

    Args:
        values: float [n], n >= 2, one a prompt, drawn independently.
        limit: In their unit.

    Returns:
        NaN where all values are equal: nothing is known of their spread.

    Raises:
        ValueError: Fewer than two values, or one that is not finite.
    """
    mean, error, n = _mean_error(values)
    return float(stats.t.cdf((mean - limit) / error, n - 1)) if error > 0 else float("nan")


def student_bound(values: ArrayLike, delta: float) -> float:
    """The upper bound of the mean at level 1 - delta by Student's t; NaN where all values are equal."""
    _check_delta(delta)
    mean, error, n = _mean_error(values)
    return float(mean + stats.t.isf(delta, n - 1) * error) if error > 0 else float("nan")


def betting_p(values: ArrayLike, limit: float, delta: float) -> np.ndarray:
    """The p-value of "the mean is at least `limit`", for values within [0, 1], by betting against it.

    Somebody who bets lambda_i on Z_i being below the limit has, after i prompts, prod(1 + lambda_i (limit - Z_i)) of
    what was there at the start. If the mean is at least the limit, that is not expected to grow, and by Ville's
    inequality exceeds 1/p at any time with probability at most p (Waudby-Smith and Ramdas, arXiv 2010.09686, one side
    of theorem 3). The bets are theirs for a fixed n: sqrt(2 log(1/delta) / (n variance of those before)), at most 3/4
    of what could lose everything.

    Args:
        values: float [..., n] within [0, 1], one a prompt, in an order that was fixed before they were known.
        limit: In [0, 1].
        delta: The level that the bets are made for; the p-value is valid at every level.

    Returns:
        float64 [...]: min(1, 1 / largest capital).

    Raises:
        ValueError: No values, values or a limit outside of [0, 1], delta outside of (0, 1).
    """
    Z = _within_unit(values)
    _check_limit(limit)
    _check_delta(delta)
    if limit == 1.0:
        # Any value below 1 settles it: then the mean of all that can be drawn is below 1.
        return np.where((Z < 1).any(-1), 0.0, 1.0)
    bets = np.minimum(_bets(Z, delta), _TRUNCATION / (1 - limit))
    capital = np.log1p(bets * (limit - Z)).cumsum(-1).max(-1)
    return np.minimum(1.0, np.exp(-capital))


def betting_reverse_p(values: ArrayLike, limit: float, delta: float) -> np.ndarray:
    """The p-value of "the mean is at most `limit`": `betting_p` of what is left over to 1."""
    return betting_p(1 - _within_unit(values), 1 - limit, delta)


def betting_bound(values: ArrayLike, delta: float) -> float:
    """The upper bound of the mean at level 1 - delta: the limits above it are rejected.

    Bisection finds it, for the p-value does not rise with the limit: no factor of the capital falls with it.

    Args:
        values: float [n], as for `betting_p`.
        delta: In (0, 1).
    """
    Z = _within_unit(values)
    low, high = 0.0, 1.0
    if betting_p(Z, high, delta) > delta:
        return 1.0
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (low, middle) if betting_p(Z, middle, delta) <= delta else (middle, high)
    return high


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values (1979): rejecting those at most delta errs anywhere with probability at most delta.

    0.01, 0.04, 0.03 give 0.03, 0.06, 0.06. No assumption on how the tests depend on each other.

    Args:
        p_values: float [m]; NaN counts as 1.

    Returns:
        float64 [m], in the order given.
    """
    p = np.nan_to_num(np.asarray(p_values, dtype=np.float64), nan=1.0)
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    found = np.empty_like(p)
    found[order] = adjusted
    return found


def _bets(Z: np.ndarray, delta: float) -> np.ndarray:
    """Of each value [..., n], from those before it alone."""
    n = Z.shape[-1]
    counts = np.arange(1, n + 1)
    means = (0.5 + Z.cumsum(-1)) / (counts + 1)
    variances = (0.25 + ((Z - means) ** 2).cumsum(-1)) / (counts + 1)
    before = np.concatenate([np.full((*Z.shape[:-1], 1), 0.25), variances[..., :-1]], -1)
    return np.sqrt(2 * np.log(1 / delta) / (n * before))


def _within_unit(values: ArrayLike) -> np.ndarray:
    Z = np.asarray(values, dtype=np.float64)
    if Z.ndim == 0 or Z.shape[-1] == 0:
        raise ValueError(f"values has shape {list(Z.shape)}, expected at least one value")
    if not ((Z >= 0) & (Z <= 1)).all():
        raise ValueError(f"values go from {Z.min()} to {Z.max()}, expected numbers within [0, 1]")
    return Z


def _mean_error(values: ArrayLike) -> tuple[float, float, int]:
    """Mean, its standard error, and n."""
    kept = np.asarray(values, dtype=np.float64)
    if kept.ndim != 1 or kept.size < 2 or not np.isfinite(kept).all():
        raise ValueError(f"values has shape {list(kept.shape)}, expected at least two numbers, all finite")
    # Equal values have rounding errors between them and their mean, and no spread.
    error = 0.0 if np.ptp(kept) == 0 else kept.std(ddof=1) / np.sqrt(kept.size)
    return float(kept.mean()), float(error), kept.size


def _check_count(count: int, n: int) -> None:
    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"count is {count} of n {n}, expected at least one prompt, and a count of some of them")


def _check_limit(limit: float) -> None:
    if not 0 <= limit <= 1:
        raise ValueError(f"limit is {limit}, expected a number in [0, 1]")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}, expected a number between 0 and 1")
