"""What a search may choose from: the grid's factors on the layers that may be scaled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .grid import FactorGrid, Factors


@dataclass(frozen=True)
class FactorSpace:
    """All factor vectors of a search.

    Attributes:
        grid: allowed factors.
        scaled_layers: layers whose factor is free, ascending. The others keep 1.0, or their source's factor.
        key_sources: for each layer the one whose keys it attends to: itself, except in a model with a shared KV
            cache, where a layer needs the factor of the layer that rotated the keys.
    """

    grid: FactorGrid
    scaled_layers: tuple[int, ...]
    key_sources: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.key_sources)

    def spread(self, values: Sequence[float]) -> Factors:
        """Returns the full vector: `values` on the scaled layers, 1.0 on the others, sources' factors where tied."""
        factors = [1.0] * self.num_layers
        for layer, value in zip(self.scaled_layers, values, strict=True):
            factors[layer] = value
        return self.tie(factors)

    def tie(self, factors: Sequence[float]) -> Factors:
        """Returns `factors` with those of layers that borrow keys replaced by their sources'."""
        return tuple(factors[source] for source in self.key_sources)

    def restrict(self, factors: Sequence[float]) -> list[float]:
        """Returns the entries of the scaled layers; the inverse of [`spread`]."""
        return [factors[layer] for layer in self.scaled_layers]
