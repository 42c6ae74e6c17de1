"""Intervals and paired tests, by SciPy. The unit is the group: one independently drawn context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, all in the unit of the data."""

    value: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Returns a proportion with its Wilson score interval (independent trials)."""
    result = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Interval(successes / trials, float(result.low), float(result.high))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Returns the mean of independent values with its Student-t interval; paired differences go here too.

    A single value, or equal values, give an interval of width zero around the mean only where that is what
    the data say (all equal); a single value has an infinite one.
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if array.size < 2:
        return Interval(mean, -np.inf, np.inf)
    error = float(stats.sem(array))
    half = error * float(stats.t.ppf((1 + confidence) / 2, array.size - 1))
    return Interval(mean, mean - half, mean + half)
