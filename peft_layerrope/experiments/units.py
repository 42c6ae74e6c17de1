"""How scores are written for people: accuracies in %, losses in nats, differences with their intervals."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..scoring.scores import DEFAULT_WEIGHTS, PositionScores, paired_interval, perplexity
from ..scoring.statistics import Interval, mean_interval
from ..tasks import Measure


@dataclass(frozen=True)
class Unit:
    """What scores are shown in. Scores themselves are higher where they are better.

    Attributes:
        name: what is measured.
        symbol: after a value.
        step: after a difference.
        scale: from a score to what is shown; negative where less is better.
        digits: after the point.
    """

    name: str
    symbol: str
    step: str
    scale: float
    digits: int

    def value(self, score: float) -> str:
        """A single score."""
        return f"{self.scale * score:.{self.digits}f}"

    def mean(self, interval: Interval) -> str:
        """A mean with its interval."""
        low, high = sorted(self.scale * v for v in (interval.low, interval.high))
        return f"{self.value(interval.value)} [{low:.{self.digits}f}, {high:.{self.digits}f}]"

    def change(self, interval: Interval) -> str:
        """A difference with half the width of its symmetric interval."""
        return f"{self.scale * interval.value:+.{self.digits}f} ± {self._half(interval)}"

    def change_in_words(self, interval: Interval) -> str:
        """A difference with its interval, for a sentence."""
        value, low, high = (self.scale * v for v in (interval.value, interval.low, interval.high))
        low, high = min(low, high), max(low, high)
        return f"{value:+.{self.digits}f} {self.step} [{low:+.{self.digits}f}, {high:+.{self.digits}f}]"

    def shown(self, scores: np.ndarray) -> np.ndarray:
        """Scores as they are drawn."""
        return self.scale * np.asarray(scores, dtype=np.float64)

    def _half(self, interval: Interval) -> str:
        half = max(interval.high - interval.value, interval.value - interval.low)  # one end may be cut at ±1
        return f"{abs(self.scale) * half:.{self.digits}f}"


ACCURACY = Unit("accuracy", "%", "points", 100, 1)
LOSS = Unit("loss", "nats", "nats", -1, 3)


def unit_of(measure: Measure) -> Unit:
    """Returns the unit of a task's scores."""
    return LOSS if measure == "loss" else ACCURACY


def verdict(subject: str, other: str, difference: Interval, unit: Unit) -> str:
    """Says whether `subject` scores higher or lower than `other`; that it is not known, where the interval holds 0."""
    change = unit.change_in_words(difference)
    if not difference.excludes_zero():
        return f"{subject} against {other}: no difference beyond noise ({change})."
    return f"{subject} {'beats' if difference.value > 0 else 'falls behind'} {other}: {change}."


def utilisation_difference(scores: PositionScores, other: PositionScores) -> Interval:
    """U of `scores` minus that of `other` on the same examples, paired; minus the mean loss where that is measured."""
    return paired_interval(scores.utilisation_by_group(), other.utilisation_by_group(), scores.measure)


def log_prob_difference(scores: PositionScores, other: PositionScores) -> Interval:
    """U of the gold log-probabilities minus that of `other`, paired, in nats."""
    return mean_interval(scores.utilisation_by_group("log_prob") - other.utilisation_by_group("log_prob"))


@dataclass(frozen=True)
class Thirds:
    """Scores of each group with the answer at the first position, at the inner ones on average, and at the last."""

    first: np.ndarray
    middle: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, scores: PositionScores) -> Thirds:
        """Takes scores at three positions at least."""
        values = scores.values
        return cls(values[:, 0], values[:, 1:-1].mean(axis=1), values[:, -1])


_INTERVALS = "Brackets and ±: 95 % intervals over contexts; differences (Δ) are paired."
_WEIGHTS = ", ".join(f"{weight:g}" for weight in DEFAULT_WEIGHTS)
U_LEGEND = (
    f"U: context utilisation of the accuracies in % (weights {_WEIGHTS} for first, middle and last). {_INTERVALS}"
)
AVERAGE_LEGEND = f"Accuracy is right answers in %, mean over all positions. {_INTERVALS}"
SCORE_LEGEND = f"Accuracy is right answers in %. Middle: the mean over all inner positions; {U_LEGEND}"
LOSS_LEGEND = (
    "Loss in nats per token and its exponential, the perplexity; less is better. Brackets and ±: 95 % intervals "
    "over texts; differences (Δ) are paired."
)


def legend(measure: Measure, of_accuracy: str = SCORE_LEGEND) -> str:
    """Says how to read a table: of losses, or as `of_accuracy` says; by default one of [`score_cells`]."""
    return LOSS_LEGEND if measure == "loss" else of_accuracy


def score_header(measure: Measure) -> tuple[str, ...]:
    """Names of the columns of [`score_cells`]."""
    return ("loss", "perplexity") if measure == "loss" else ("first", "middle", "last", "accuracy", "U")


def score_cells(scores: PositionScores) -> tuple[str, ...]:
    """One contender's scores, for a table."""
    unit, average = unit_of(scores.measure), scores.average()
    if scores.measure == "loss":
        return unit.mean(average), f"{perplexity(-average.value):.2f}"
    ends = Thirds.of(scores)
    return (
        *(unit.value(float(part.mean())) for part in (ends.first, ends.middle, ends.last)),
        unit.mean(average),
        unit.value(scores.utilisation()),
    )


def interval_dict(interval: Interval) -> dict[str, float | None]:
    """An interval as JSON values; None for an end that is not finite."""
    return {name: round(value, 6) if math.isfinite(value) else None for name, value in asdict(interval).items()}


def scores_dict(scores: dict[str, PositionScores]) -> dict[str, Any]:
    """Scores by label as JSON values."""
    return {label: of_one.to_dict() for label, of_one in scores.items()}
