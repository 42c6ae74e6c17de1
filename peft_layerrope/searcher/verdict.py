"""Which of the vectors that were found is the result: of those under the bound the simplest that none clearly beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..scoring.scores import Interval, mean_interval, rank_key

MAX_END_DROP = 0.03
"""Accuracy that may be lost where the answer stands first, and where it stands last."""


@dataclass(frozen=True)
class Harm:
    """What a vector costs where the unscaled model does well. Each has its 95 % interval.

    Attributes:
        divergence: of the unscaled model's next-token distributions from the scaled one's, on text that the former
            wrote, in nats: the expected rise of the loss there.
        loss_rise: rise of the loss on people's text, in nats; None where there is none.
        ends: change of the accuracy at the first and at the last position; None where no answers are asked for.
    """

    divergence: Interval
    loss_rise: Interval | None = None
    ends: tuple[Interval, Interval] | None = None

    @property
    def on_text(self) -> Interval:
        """The worse of the two on ordinary text, in nats."""
        return max(self._on_text, key=lambda interval: -rank_key(-interval.value))

    @property
    def _on_text(self) -> tuple[Interval, ...]:
        return (self.divergence, self.loss_rise) if self.loss_rise is not None else (self.divergence,)

    def to_dict(self) -> dict[str, list[float]]:
        """Returns plain values: each with its interval."""
        named = {"divergence": self.divergence, "loss_rise": self.loss_rise}
        if self.ends is not None:
            named |= {"first_position": self.ends[0], "last_position": self.ends[1]}
        return {
            name: [round(value, 6) for value in (interval.value, interval.low, interval.high)]
            for name, interval in named.items()
            if interval is not None
        }

    def exceeds(self, bound: float | None) -> bool:
        """Whether a bound is broken for sure: that on text, in nats, or [`MAX_END_DROP`]. No bound, none of them."""
        if bound is None:
            return False
        return not (
            all(interval.low <= bound for interval in self._on_text)
            and all(interval.high >= -MAX_END_DROP for interval in self.ends or ())
        )


def choose(
    fitness: Mapping[str, Sequence[float]], harm: Mapping[str, Harm], names: Sequence[str], bound: float | None
) -> str:
    """Chooses among what several methods found.

    Args:
        fitness: of each, by context of the validation split: what is to be large.
        harm: of each.
        names: from the simplest to the most elaborate; the first one is the unscaled model.
        bound: of the harm to ordinary text, in nats; None: none.

    Returns:
        The name of the best that keeps to the bound, or of a simpler one that it is not better than by an interval
        that excludes 0.
    """
    allowed = [name for name in names if not harm[name].exceeds(bound)]
    best = max(allowed, key=lambda name: rank_key(np.mean(fitness[name])))
    for name in allowed[: allowed.index(best)]:
        gain = mean_interval(np.subtract(fitness[best], fitness[name]))
        if not gain.low > 0:
            return name
    return best
