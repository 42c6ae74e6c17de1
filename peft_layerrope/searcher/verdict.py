"""Which of the vectors that were found is the result: of those under the bound the simplest that none clearly beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..scoring.statistics import Interval, mean_interval, rank_key


@dataclass(frozen=True)
class Harm:
    """What a vector does to ordinary text.

    Attributes:
        divergence: from the unscaled model's next-token distribution, in nats, with its interval.
        loss_rise: rise of the loss on the same text, in nats, with its interval.
    """

    divergence: Interval
    loss_rise: Interval

    def to_dict(self) -> dict[str, list[float]]:
        """Returns plain values: each with its interval."""
        return {
            name: [round(value, 6) for value in (interval.value, interval.low, interval.high)]
            for name, interval in (("divergence", self.divergence), ("loss_rise", self.loss_rise))
        }

    def exceeds(self, bound: float | None) -> bool:
        """Whether the divergence is above a bound for sure."""
        return bound is not None and not self.divergence.low <= bound


def choose(
    fitness: Mapping[str, Sequence[float]], harm: Mapping[str, Harm], names: Sequence[str], bound: float | None
) -> str:
    """Chooses among what several methods found.

    Args:
        fitness: of each, by context of the validation split: what is to be large.
        harm: of each.
        names: from the simplest to the most elaborate; the first one is the unscaled model.
        bound: of the divergence, in nats; None: none.

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
