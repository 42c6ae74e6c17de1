"""What is known of a factor vector, and the rules by which racing gives up on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import stats

RACE_LEVEL = 0.05
"""One-sided level of the paired t-test at each of the looks at a race: a vector that is as good as the best so far is
dropped with at most this probability at each."""

MIN_RACE_GROUPS = 4
"""No vector is dropped on fewer groups than this."""


@dataclass(frozen=True)
class HeatScores:
    """A vector's scores on one part of the examples.

    Attributes:
        values: each group's utilisation, the share it has in the fitness.
        tail: each group's accuracy at the last position.
    """

    values: tuple[float, ...]
    tail: tuple[float, ...]


@dataclass(frozen=True)
class Heats:
    """How the search split is cut: racing may stop after each part. The last one may hold the short prompts.

    Attributes:
        sizes: groups of each part of the search split, in order.
        has_short: whether one more heat, after them, scores short prompts.
    """

    sizes: tuple[int, ...]
    has_short: bool = False

    def __len__(self) -> int:
        return len(self.sizes) + self.has_short

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First group and the one after the last, of each part of the search split."""
        ends = np.cumsum(self.sizes).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))


def plan_heats(num_groups: int, race: bool, has_short: bool) -> Heats:
    """Cuts `num_groups` for racing into a quarter, two eighths and two quarters, if a quarter suffices for a test."""
    ends = [num_groups * eighths // 8 for eighths in (0, 2, 3, 4, 6, 8)]
    if not race or ends[1] < MIN_RACE_GROUPS:
        return Heats((num_groups,), has_short)
    return Heats(tuple(end - start for start, end in pairwise(ends)), has_short)


@dataclass(frozen=True)
class Measurement:
    """All that is known of one vector: its scores on the first heats, in order."""

    heats: tuple[HeatScores, ...] = ()

    def plus(self, scores: HeatScores) -> Measurement:
        """Returns this with one more heat."""
        return Measurement((*self.heats, scores))

    def values(self, plan: Heats) -> np.ndarray:
        """Utilisation of each group of the search split seen so far."""
        return np.array([value for heat in self.heats[: len(plan.sizes)] for value in heat.values])

    def is_complete(self, plan: Heats) -> bool:
        """Whether every heat was run."""
        return len(self.heats) == len(plan)

    def fitness(self, plan: Heats) -> float:
        """Mean utilisation of the groups seen."""
        return float(self.values(plan).mean())

    def tail(self, plan: Heats) -> np.ndarray:
        """Accuracy at the last position of each group of the search split seen so far."""
        return np.array([hit for heat in self.heats[: len(plan.sizes)] for hit in heat.tail])

    def short_values(self) -> np.ndarray:
        """Utilisation of each group of the short prompts, where the plan has them: minus their loss, in nats."""
        return np.array(self.heats[-1].values)

    def tail_accuracy(self, plan: Heats) -> float:
        """Accuracy at the last position, over the search split."""
        return float(self.tail(plan).mean())

    def short_loss(self, plan: Heats) -> float | None:
        """Loss on short prompts in nats, or None where there are none."""
        return -float(self.short_values().mean()) if plan.has_short else None


def clearly_worse(values: Sequence[float], rival: Sequence[float]) -> bool:
    """Whether a vector has lost its race: a one-sided paired t-test over the groups seen by both, at `RACE_LEVEL`.
    One whose values are not all finite has lost.

    Args:
        values: its utilisation on the first groups.
        rival: that of the best vector so far, on at least these groups.
    """
    if not np.isfinite(values).all():
        return True
    if len(values) < MIN_RACE_GROUPS:
        return False
    gap = np.asarray(values) - np.asarray(rival)[: len(values)]
    if gap.std() == 0:
        return bool(gap.mean() < 0)
    return bool(stats.ttest_1samp(gap, 0, alternative="less").pvalue < RACE_LEVEL)
