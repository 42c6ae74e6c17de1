"""What an evaluation found: scores by position, context utilisation, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from ..errors import TaskError
from ..tasks.base import MEASURES, Measure

_CONFIDENCE = 0.95  # of every interval
_PRIOR_CONTEXTS = 0.1
"""Weight, in contexts, of the assumption that all positions of a context are right or wrong together: it is what is
left where the data say nothing, and costs hardly any width transfer. Chosen by the simulation."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, all in the unit of the data."""

    value: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def negated(self) -> Interval:
        """Returns the interval of minus the value."""
        return Interval(-self.value, -self.high, -self.low)

    def to_list(self) -> list[float]:
        """Returns value, low and high for a report, rounded."""
        return [_short(value) for value in (self.value, self.low, self.high)]

    def to_dict(self) -> dict[str, float | None]:
        """Returns value, low and high by name, rounded; None for what is not finite."""
        return {name: _short(end) if math.isfinite(end) else None for name, end in vars(self).items()}

    @classmethod
    def from_list(cls, values: Sequence[float | None]) -> Interval:
        """Makes one of a file's value, low and high, where null stands for what is not finite."""
        otherwise = (math.nan, -math.inf, math.inf)
        return cls(*(end if value is None else value for value, end in zip(values, otherwise, strict=True)))


def rank_key(score: float) -> float:
    """Returns a score, of which more is better, as it takes part in a ranking: last where it is not finite."""
    return float(score) if np.isfinite(score) else -np.inf


def wilson_interval(successes: int, trials: int) -> Interval:
    """Returns a proportion with its Wilson score interval (independent trials)."""
    result = stats.binomtest(successes, trials).proportion_ci(_CONFIDENCE, method="wilson")
    return Interval(successes / trials, float(result.low), float(result.high))


def proportion_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Returns an accuracy, averaged over positions, with its interval over groups: that of Agresti and Coull with an
    effective number of contexts, and the t-quantile for the normal one.

    `values` are each group's means over its positions, weighted or not, from 0 to 1, shape `(..., groups)`; of more
    than one axis, value and ends are arrays.
    """
    values = np.asarray(values, dtype=np.float64)
    count, mean = values.shape[-1], values.mean(axis=-1)
    if count < 2:
        return _interval(mean, np.zeros_like(mean), np.ones_like(mean))
    quantile = _quantile(count)
    contexts = count / _variance_ratio(values, count * mean * (1 - mean))
    center = (contexts * mean + quantile**2 / 2) / (contexts + quantile**2)
    half = quantile * np.sqrt(center * (1 - center) / (contexts + quantile**2))
    return _interval(mean, np.clip(center - half, 0, mean), np.clip(center + half, mean, 1))


def difference_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Returns a mean difference of accuracies with its interval over groups, which is symmetric but for its cut at ±1:
    the variance of Bonett and Price, who add two contexts that differ in either direction, by the share of it that the
    contexts' means have.

    `values` are each group's accuracy minus another one of the same group (of another candidate, or at other
    positions), from -1 to 1, shape `(..., groups)`; of more than one axis, value and ends are arrays.
    """
    values = np.asarray(values, dtype=np.float64)
    count, mean = values.shape[-1], values.mean(axis=-1)
    if count < 2:
        return _interval(mean, -np.ones_like(mean), np.ones_like(mean))
    whole = np.abs(values).sum(axis=-1) - count * mean**2  # of the variance, were every difference -1, 0 or 1
    half = _quantile(count) * np.sqrt(_variance_ratio(values, whole) * (whole + 2)) / count
    return _interval(mean, np.maximum(mean - half, -1), np.minimum(mean + half, 1))


def mean_interval(values: Sequence[float]) -> Interval:
    """Returns the mean of independent values without bounds, such as losses, with its Student-t interval.

    A single value, or values that are all equal, say nothing of their spread: the interval is infinite. Differences
    that are all zero are those of a candidate with its like, and have an interval of no width.
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if array.size > 1 and not array.any():
        return Interval(0.0, 0.0, 0.0)
    if array.size < 2 or np.allclose(array, mean, rtol=1e-9, atol=0):
        return Interval(mean, -np.inf, np.inf)
    half = float(stats.sem(array)) * _quantile(array.size)
    return Interval(mean, mean - half, mean + half)


def _interval(*ends: np.ndarray) -> Interval:
    """Of numbers, not of arrays, where there was one axis."""
    return Interval(*(end if end.ndim else float(end) for end in ends))


def _variance_ratio(values: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The variance of groups' means, `(..., groups)`, over what it would be if all positions of a group had one value,
    at most 1, given the latter's sum of squares, `(...)`.
    """
    squares = values.var(axis=-1, ddof=1) * values.shape[-1]
    return np.minimum((squares + _PRIOR_CONTEXTS) / (whole + _PRIOR_CONTEXTS), 1)


def _quantile(count: int) -> float:
    return float(stats.t.ppf((1 + _CONFIDENCE) / 2, count - 1))


DEFAULT_WEIGHTS = (0.8, 1.0, 1.2)
"""λ_first, λ_middle, λ_last of context utilisation. The paper's values are not public; these are ours: in the
paper's order, and close enough to each other that no single position decides."""

_LARGEST_LOSS = 700  # nats


def utilization(by_position: Sequence[float], weights: Sequence[float] = DEFAULT_WEIGHTS) -> float:
    """Returns context utilisation U (arXiv 2503.04355) of one score per gold position, first to last, in their unit:
    `(λ_first·first + λ_middle·mean(middle) + λ_last·last) / (λ_first + λ_middle + λ_last)`. All inner positions are
    averaged into "middle".

    Raises:
        TaskError: fewer than three positions, or weights that are not three positive numbers.
    """
    if len(weights) != 3 or not all(np.isfinite(w) and w > 0 for w in weights):
        raise TaskError(f"weights={tuple(weights)} must be three positive numbers (first, middle, last).")
    scores = np.asarray(by_position, dtype=np.float64)
    if scores.size < 3:
        raise TaskError(f"utilisation needs at least 3 positions (first, middle, last), got {scores.size}.")
    parts = (scores[0], scores[1:-1].mean(), scores[-1])
    return float(np.dot(weights, parts) / np.sum(weights))


@dataclass(frozen=True)
class WrittenAnswers:
    """More about answers that were written; arrays of shape `(groups, positions)`."""

    # bool: whether every token of the target was the most probable one, in one teacher-forced pass; None where the
    # split has no targets
    forced: np.ndarray | None
    strict: np.ndarray | None  # bool: whether the answer came before any other; None where the metric has no such look
    num_tokens: np.ndarray  # int64: tokens that were written
    cut_off: np.ndarray  # bool: whether writing stopped at the limit, neither ended nor settled

    def to_plain(self) -> list[Any]:
        """Returns everything as JSON values, without loss; see [`from_plain`]."""
        return [None if array is None else array.astype(int).tolist() for array in vars(self).values()]

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> WrittenAnswers:
        """The inverse of [`to_plain`].

        Raises:
            ValueError: they are not such values.
        """
        kinds = (bool, bool, np.int64, bool)
        return cls(*(None if v is None else np.array(v, dtype=kind) for v, kind in zip(plain, kinds, strict=True)))

    @classmethod
    def joined(cls, parts: Sequence[WrittenAnswers]) -> WrittenAnswers:
        """Returns several parts' groups, one after the other."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(np.concatenate(column) if column[0] is not None else None for column in columns))


@dataclass(frozen=True)
class PositionScores:
    """Scores of one model on one split.

    Attributes:
        positions: the split's gold positions, P of them.
        correct: bool array of shape `(groups, P)`: is the answer right: what was written by the task's metric, or else
            every token of the expected answer the most probable one?
        log_prob: float64 array of shape `(groups, P)`: log-probability of the answer, the sum over its tokens, in nats.
            A token counts no worse than chance (minus the log of the vocabulary size), or a few hopeless tokens
            would outweigh everything else that a search could improve. Where `measure` is `"loss"`, the mean over the
            tokens, each as it is.
        measure: what counts: `"accuracy"`, or `"loss"` for perplexity, where nothing is right or wrong.
        written: more about the answers, where they were written.
        sizes: of a loss, how many tokens each position stands for; None: the same number.
    """

    positions: tuple[int, ...]
    correct: np.ndarray
    log_prob: np.ndarray
    measure: Measure = "accuracy"
    written: WrittenAnswers | None = None
    sizes: tuple[int, ...] | None = None

    @property
    def values(self) -> np.ndarray:
        """Shape `(groups, P)`, float64, higher is better: 1 for a right answer and 0 for a wrong one, or minus the
        loss in nats.
        """
        return self.log_prob if self.measure == "loss" else self.correct.astype(np.float64)

    @property
    def value_by_position(self) -> np.ndarray:
        """Shape `(P,)`: the mean over groups of [`values`]."""
        return self.values.mean(axis=0)

    @property
    def accuracy_by_position(self) -> np.ndarray:
        """Shape `(P,)`, from 0 to 1."""
        return self.correct.mean(axis=0)

    @property
    def log_prob_by_position(self) -> np.ndarray:
        """Shape `(P,)`, in nats."""
        return self.log_prob.mean(axis=0)

    @property
    def average_by_group(self) -> np.ndarray:
        """[`values`] averaged over positions, a loss over tokens, per group: shape `(groups,)`. The unit of paired
        comparisons.
        """
        return np.average(self.values, axis=1, weights=self.sizes)

    def average(self) -> Interval:
        """Accuracy (or minus the loss) averaged over all positions, with a 95 % interval over groups."""
        return (mean_interval if self.measure == "loss" else proportion_interval)(self.average_by_group)

    def intervals(self) -> list[Interval]:
        """At each position, accuracy with its 95 % Wilson interval, or minus the loss with a t-interval."""
        if self.measure == "loss":
            return [mean_interval(column) for column in self.log_prob.T]
        groups = self.correct.shape[0]
        return [wilson_interval(int(hits), groups) for hits in self.correct.sum(axis=0)]

    def utilization(self, weights: Sequence[float] = DEFAULT_WEIGHTS) -> float:
        """Context utilisation of the accuracies, from 0 to 1. Minus the mean loss where that is measured; the plain
        mean where there are fewer than three positions.
        """
        return float(self.utilization_by_group("accuracy", weights).mean())

    def log_prob_utilization(self, weights: Sequence[float] = DEFAULT_WEIGHTS) -> float:
        """Context utilisation of the gold log-probabilities, in nats."""
        return float(self.utilization_by_group("log_prob", weights).mean())

    def utilization_by_group(
        self, objective: Literal["log_prob", "accuracy"] = "accuracy", weights: Sequence[float] = DEFAULT_WEIGHTS
    ) -> np.ndarray:
        """Shape `(groups,)`: each group's share in the utilisation, whose mean over groups is [`utilization`].

        A split with fewer than three positions has no first, middle and last, and a loss has no gold position: there
        it is the plain mean.
        """
        values = self.log_prob if objective == "log_prob" else self.values
        if len(self.positions) < 3 or self.measure == "loss":
            return np.average(values, axis=1, weights=self.sizes)
        return np.array([utilization(row, weights) for row in values])

    def paired_difference(self, other: PositionScores) -> Interval:
        """This average minus `other`'s on the same examples, with a paired 95 % interval over groups.

        Raises:
            TaskError: the two were not scored on splits of one shape, or measure different things.
        """
        if self.correct.shape != other.correct.shape or self.measure != other.measure:
            raise TaskError(
                f"cannot pair {self.measure} of shape {self.correct.shape} with {other.measure} of shape "
                f"{other.correct.shape}."
            )
        return paired_interval(self.average_by_group, other.average_by_group, self.measure)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers for a JSON report."""
        average, intervals = self.average(), self.intervals()
        if self.measure == "loss":  # in the loss itself
            average, intervals = average.negated(), [interval.negated() for interval in intervals]
        by_position = [interval.to_list() for interval in intervals]
        plain = {
            "positions": list(self.positions),
            f"{self.measure}_by_position": [value for value, *_ in by_position],
            f"{self.measure}_intervals": [ends for _, *ends in by_position],
            f"average_{self.measure}": _short(average.value),
            f"average_{self.measure}_interval": average.to_list()[1:],
        }
        if self.measure == "loss":
            return plain | {"perplexity": _short(perplexity(average.value))}
        plain["utilization"] = _short(self.utilization())
        plain["log_prob_by_position"] = [_short(v) for v in self.log_prob_by_position]
        if self.written is not None:
            columns = {"teacher_forced": self.written.forced, "strict_accuracy": self.written.strict}
            plain |= {
                f"{name}_by_position": [_short(v) for v in values.mean(axis=0)]
                for name, values in columns.items()
                if values is not None
            }
            plain["answers_cut_off"] = _short(self.written.cut_off.mean())
            plain["mean_answer_tokens"] = _short(self.written.num_tokens.mean())
        return plain

    def to_plain(self) -> list[Any]:
        """Returns everything as JSON values, without loss; see [`from_plain`]."""
        plain = [list(self.positions), self.correct.astype(int).tolist(), self.log_prob.tolist(), self.measure]
        if self.sizes is not None:  # of a loss, for which nothing is written
            return [*plain, None, list(self.sizes)]
        return plain if self.written is None else [*plain, self.written.to_plain()]

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> PositionScores:
        """The inverse of [`to_plain`].

        Raises:
            ValueError: they are not such values.
        """
        positions, correct, log_prob, measure, *more = plain
        written, sizes = (*more, None, None)[:2]
        written = WrittenAnswers.from_plain(written) if written is not None else None
        arrays = np.array(correct, dtype=bool), np.array(log_prob, dtype=np.float64)
        scores = cls(tuple(positions), *arrays, measure, written, tuple(sizes) if sizes is not None else None)
        shape = (len(correct), len(positions))
        fits = scores.correct.shape == scores.log_prob.shape == shape and len(scores.sizes or positions) == shape[1]
        if measure not in MEASURES or not fits:
            raise ValueError(f"not the scores of {shape[0]} groups at {shape[1]} positions.")
        return scores

    @classmethod
    def joined(cls, parts: Sequence[PositionScores]) -> PositionScores:
        """Returns several parts' groups, one after the other."""
        correct, log_prob = (np.concatenate([getattr(p, name) for p in parts]) for name in ("correct", "log_prob"))
        first = parts[0]
        written = WrittenAnswers.joined([p.written for p in parts]) if first.written is not None else None
        return cls(first.positions, correct, log_prob, first.measure, written, first.sizes)


def paired_interval(values: np.ndarray, other: np.ndarray, measure: Measure) -> Interval:
    """Returns a mean paired difference, with its 95 % interval over groups: of [`PositionScores.values`], averaged or
    weighted over positions, `(groups,)`, and the same groups' of another candidate or at other positions.
    """
    return (mean_interval if measure == "loss" else difference_interval)(np.subtract(values, other))


def perplexity(loss: float) -> float:
    """Returns the exponential of a loss in nats; infinite where it is too large for a float."""
    return math.exp(loss) if not loss > _LARGEST_LOSS else math.inf


def _short(value: float) -> float:
    return round(float(value), 6)
