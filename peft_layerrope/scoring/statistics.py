"""Intervals over groups. The unit is the group: one independently drawn context; positions of one context are not
independent.

An accuracy near 0 or 100 % has too few contexts that tell anything of its spread, where a Student-t interval is far too
narrow, and of no width where all contexts agree. Both intervals here add a few pseudo-contexts, as those of single
answers do, after asking how many contexts the answers are worth (the effective sample size of survey statistics).
`tests/benchmarks/interval_coverage.py` measures how often they cover.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_PRIOR_CONTEXTS = 0.1
"""Weight, in contexts, of the assumption that all positions of a context are right or wrong together: it is what is
left where the data say nothing, and costs hardly any width elsewhere. Chosen by the simulation."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, all in the unit of the data."""

    value: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def rank_key(score: float) -> float:
    """Returns a score, of which more is better, as it takes part in a ranking: last where it is not finite."""
    return float(score) if np.isfinite(score) else -np.inf


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Returns a proportion with its Wilson score interval (independent trials)."""
    result = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Interval(successes / trials, float(result.low), float(result.high))


def proportion_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Returns an accuracy, averaged over positions, with its interval over groups.

    Args:
        values: shape `(groups,)`, from 0 to 1: each group's mean over its positions, weighted or not.
        confidence: its level.
    """
    return Interval(*map(float, proportion_limits(np.asarray(values, dtype=np.float64), confidence)))


def difference_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Returns a mean difference of accuracies with its interval over groups, which is symmetric but for its cut at ±1.

    Args:
        values: shape `(groups,)`, from -1 to 1: each group's accuracy minus another one of the same group: of another
            contender, or at other positions.
        confidence: its level.
    """
    return Interval(*map(float, difference_limits(np.asarray(values, dtype=np.float64), confidence)))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Returns the mean of independent values without bounds, such as losses, with its Student-t interval.

    A single value, or values that are all equal, say nothing of their spread: the interval is infinite. Differences
    that are all zero are those of a contender with its like, and have an interval of no width.
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if array.size > 1 and not array.any():
        return Interval(0.0, 0.0, 0.0)
    if array.size < 2 or np.allclose(array, mean, rtol=1e-9, atol=0):
        return Interval(mean, -np.inf, np.inf)
    half = float(stats.sem(array)) * _quantile(array.size, confidence)
    return Interval(mean, mean - half, mean + half)


def proportion_limits(values: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns value, low and high of [`proportion_interval`] along the last axis: the interval of Agresti and Coull
    with an effective number of contexts, and the t-quantile for the normal one.
    """
    count = values.shape[-1]
    mean = values.mean(axis=-1)
    if count < 2:
        return mean, np.zeros_like(mean), np.ones_like(mean)
    quantile = _quantile(count, confidence)
    contexts = count / _variance_ratio(values, count * mean * (1 - mean))
    centre = (contexts * mean + quantile**2 / 2) / (contexts + quantile**2)
    half = quantile * np.sqrt(centre * (1 - centre) / (contexts + quantile**2))
    return mean, np.clip(centre - half, 0, mean), np.clip(centre + half, mean, 1)


def difference_limits(values: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns value, low and high of [`difference_interval`] along the last axis: the variance of Bonett and Price,
    who add two contexts that differ in either direction, by the share of it that the contexts' means have.
    """
    count = values.shape[-1]
    mean = values.mean(axis=-1)
    if count < 2:
        return mean, -np.ones_like(mean), np.ones_like(mean)
    whole = np.abs(values).sum(axis=-1) - count * mean**2  # of the variance, were every difference -1, 0 or 1
    half = _quantile(count, confidence) * np.sqrt(_variance_ratio(values, whole) * (whole + 2)) / count
    return mean, np.maximum(mean - half, -1), np.minimum(mean + half, 1)


def _variance_ratio(values: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The variance of groups' means over what it would be if all positions of a group had one value, at most 1.

    Args:
        values: shape `(..., groups)`.
        whole: shape `(...)`: the latter's sum of squares.
    """
    squares = values.var(axis=-1, ddof=1) * values.shape[-1]
    return np.minimum((squares + _PRIOR_CONTEXTS) / (whole + _PRIOR_CONTEXTS), 1)


def _quantile(count: int, confidence: float) -> float:
    return float(stats.t.ppf((1 + confidence) / 2, count - 1))
