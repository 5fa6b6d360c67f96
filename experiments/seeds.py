"""Numbers of several seeds: their mean, its interval, and how a table shows them."""

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t as students_t


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % t-interval over seeds; the bounds are NaN for a single one."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = students_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def over_seeds(values: Sequence[float | None]) -> dict:
    """Mean, bounds and values for `results.json`; None where one of the values is, which is a share among nothing."""
    numbers = [value for value in values if value is not None]
    mean, low, high = interval(numbers) if len(numbers) == len(values) else (math.nan,) * 3
    entry = {"mean": mean, "low": low, "high": high}
    return {**{key: None if math.isnan(value) else value for key, value in entry.items()}, "seeds": list(values)}


def cell(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    """A mean and its bounds in a table; `sign` as in a format."""
    if value is None:
        return "-"
    return (
        f"{value:{sign}.3f}"
        if low is None or high is None
        else f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
    )
