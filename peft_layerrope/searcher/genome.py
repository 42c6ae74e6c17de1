"""The genome of the curve search: the six free coordinates of a cubic Bézier curve."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..bezier import sample_curve
from .grid import FactorGrid, Factors, spread_over_layers

NUM_GENES = 6
"""y0, y1, y2, y3 (factors), x1, x2 (depths)."""


@dataclass(frozen=True)
class BezierGenome:
    """Decodes genes to factors. `x1, x2` in [0, 1] keep the curve a function of depth."""

    grid: FactorGrid
    scaled_layers: tuple[int, ...]
    num_layers: int

    @property
    def bounds(self) -> tuple[list[float], list[float]]:
        """Lower and upper bound of each gene."""
        return [self.grid.low] * 4 + [0.0] * 2, [self.grid.high] * 4 + [1.0] * 2

    def random(self, rng: random.Random) -> list[float]:
        """Draws genes: heights around the middle of the range (1.5 by default), depths anywhere."""
        middle, spread = (self.grid.low + self.grid.high) / 2, (self.grid.high - self.grid.low) / 4
        heights = [min(max(rng.gauss(middle, spread), self.grid.low), self.grid.high) for _ in range(4)]
        return [*heights, rng.random(), rng.random()]

    def constant(self, factor: float) -> list[float]:
        """Returns the genes of a flat curve, for seeding."""
        return [min(max(factor, self.grid.low), self.grid.high)] * 4 + [1 / 3, 2 / 3]

    def control_points(self, genes: Sequence[float]) -> list[list[float]]:
        """Returns the curve's four `(x, y)` points."""
        y0, y1, y2, y3, x1, x2 = genes
        return [[0.0, y0], [x1, y1], [x2, y2], [1.0, y3]]

    def decode(self, genes: Sequence[float]) -> Factors:
        """Returns one factor per layer, on the grid."""
        curve = sample_curve(self.control_points(genes), len(self.scaled_layers))
        return spread_over_layers(self.grid.snap(curve), self.scaled_layers, self.num_layers)
