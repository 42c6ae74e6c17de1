"""Genomes: what a searcher varies, and the factors that it means. One interface for curves and for plain factors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, Protocol, get_args

from ..bezier import sample_curve
from .space import Factors, FactorSpace

Curve = Literal["bezier", "linear", "direct"]
CURVES: tuple[Curve, ...] = get_args(Curve)


class Genome(Protocol):
    """Decodes genes, a list of floats, to a factor vector."""

    @property
    def bounds(self) -> tuple[list[float], list[float]]:
        """Lower and upper bound of each gene."""

    def random(self, rng: random.Random) -> list[float]:
        """Draws genes: factors around the middle of the range (1.5 by default)."""

    def constant(self, factor: float) -> list[float]:
        """Returns genes with one factor for all scaled layers, for seeding."""

    def decode(self, genes: Sequence[float]) -> Factors:
        """Returns one factor per layer, on the grid."""

    def control_points(self, genes: Sequence[float]) -> list[list[float]] | None:
        """Returns the four `(x, y)` points of the cubic Bézier curve that the genes draw; None if they draw none."""


class _FactorGenes:
    """What the genomes share: genes that are factors, `num_heights` of them, come first."""

    def __init__(self, space: FactorSpace, num_heights: int) -> None:
        self._space = space
        self._num_heights = num_heights

    @property
    def bounds(self) -> tuple[list[float], list[float]]:
        grid = self._space.grid
        return [grid.min_factor] * self._num_heights, [grid.max_factor] * self._num_heights

    def random(self, rng: random.Random) -> list[float]:
        grid = self._space.grid
        middle, spread = (grid.min_factor + grid.max_factor) / 2, (grid.max_factor - grid.min_factor) / 4
        return [self._clip(rng.gauss(middle, spread)) for _ in range(self._num_heights)]

    def constant(self, factor: float) -> list[float]:
        return [self._clip(factor)] * self._num_heights

    def decode(self, genes: Sequence[float]) -> Factors:
        points = self.control_points(genes)
        values = genes if points is None else sample_curve(points, len(self._space.scaled_layers))
        return self._space.spread(self._space.grid.snap(values))

    def control_points(self, genes: Sequence[float]) -> list[list[float]] | None:
        return None

    def _clip(self, factor: float) -> float:
        return min(max(factor, self._space.grid.min_factor), self._space.grid.max_factor)


class BezierGenome(_FactorGenes):
    """The six free coordinates of a cubic Bézier curve over depth: y0, y1, y2, y3 (factors), x1, x2 (depths).

    `x1, x2` in [0, 1] keep the curve a function of depth.
    """

    def __init__(self, space: FactorSpace) -> None:
        super().__init__(space, num_heights=4)

    @property
    def bounds(self) -> tuple[list[float], list[float]]:
        low, high = super().bounds
        return [*low, 0.0, 0.0], [*high, 1.0, 1.0]

    def random(self, rng: random.Random) -> list[float]:
        return [*super().random(rng), rng.random(), rng.random()]

    def constant(self, factor: float) -> list[float]:
        return [*super().constant(factor), 1 / 3, 2 / 3]

    def control_points(self, genes: Sequence[float]) -> list[list[float]]:
        y0, y1, y2, y3, x1, x2 = genes
        return [[0.0, y0], [x1, y1], [x2, y2], [1.0, y3]]


class LinearGenome(_FactorGenes):
    """A straight line over depth: the factors of the first and of the last scaled layer."""

    def __init__(self, space: FactorSpace) -> None:
        super().__init__(space, num_heights=2)

    def control_points(self, genes: Sequence[float]) -> list[list[float]]:
        first, last = genes
        return [[x, first + x * (last - first)] for x in (0.0, 1 / 3, 2 / 3, 1.0)]


class DirectGenome(_FactorGenes):
    """One gene per scaled layer: its factor."""

    def __init__(self, space: FactorSpace) -> None:
        super().__init__(space, num_heights=len(space.scaled_layers))


def make_genome(curve: Curve, space: FactorSpace) -> Genome:
    """Returns the genome called `curve`."""
    genomes = {"bezier": BezierGenome, "linear": LinearGenome, "direct": DirectGenome}
    return genomes[curve](space)
