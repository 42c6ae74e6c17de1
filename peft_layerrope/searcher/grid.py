"""The grid of allowed factors, and which layers may leave 1.0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import SearchError
from ..tuner.config import FACTOR_RANGE

Factors = tuple[float, ...]
"""One factor per layer, every one on the grid (or exactly 1.0 for a layer left alone)."""

_MAX_VALUES = 1000


@dataclass(frozen=True)
class FactorGrid:
    """Factors `low, low + step, .. high`. The paper's grid is 1.0, 1.1 .. 2.0.

    Raises:
        SearchError: the bounds are not positive, are in the wrong order, or give no or too many values.
    """

    low: float = 1.0
    high: float = 2.0
    step: float = 0.1

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) and v > 0 for v in (self.low, self.high, self.step)):
            raise SearchError(f"factor grid {self.low}..{self.high} step {self.step}: all three must be positive.")
        if self.low < FACTOR_RANGE[0] or self.high > FACTOR_RANGE[1]:
            raise SearchError(
                f"min_factor={self.low} and max_factor={self.high} must be from {FACTOR_RANGE[0]:g} to "
                f"{FACTOR_RANGE[1]:g}."
            )
        if self.high <= self.low:
            raise SearchError(f"max_factor={self.high} must be greater than min_factor={self.low}.")
        if (self.high - self.low) / self.step > _MAX_VALUES:
            raise SearchError(f"step={self.step} gives more than {_MAX_VALUES} values between the bounds.")
        if (self.high - self.low) / self.step < 1 - 1e-9:
            raise SearchError(f"step={self.step} is larger than the range {self.low}..{self.high}.")

    @property
    def values(self) -> tuple[float, ...]:
        """All factors, ascending, free of floating-point dust (1.3, not 1.3000000000000003)."""
        count = int((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(round(self.low + i * self.step, 10) for i in range(count))

    def snap(self, values: Sequence[float] | np.ndarray) -> list[float]:
        """Clips to the range and rounds to the grid."""
        grid = self.values
        indices = np.clip(np.rint((np.asarray(values) - self.low) / self.step), 0, len(grid) - 1).astype(int)
        return [grid[i] for i in indices]


def default_scaled_layers(num_layers: int) -> tuple[int, ...]:
    """Returns the layers that may be scaled: all but the first 2 of every 32, rounded (the paper's choice)."""
    return tuple(range(round(num_layers * 2 / 32), num_layers))
