"""What every searcher returns, and what it says while it runs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .grid import Factors
from .memo import BudgetView


@dataclass(frozen=True)
class Found:
    """The best of one search.

    Attributes:
        factors: the best vector.
        fitness: its fitness on the search split.
        control_points: the four `(x, y)` points of its curve; None where there is no curve.
        history: one record per generation.
    """

    factors: Factors
    fitness: float
    control_points: list[list[float]] | None = None
    history: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Generation:
    """One generation: genes and fitness of every individual."""

    number: int
    population: list[list[float]]
    fitness: list[float]

    def record(self, view: BudgetView) -> dict[str, Any]:
        """Returns its line in the history."""
        return {
            "generation": self.number,
            "best": max(self.fitness),
            "mean": sum(self.fitness) / len(self.fitness),
            "evaluations": view.evaluations,
        }


OnGeneration = Callable[[Generation, list[Any]], None]
"""Told of each generation, with the random state after it."""


def random_state(rng: random.Random) -> list[Any]:
    """Returns a generator's state as JSON values."""
    version, internal, gauss = rng.getstate()
    return [version, list(internal), gauss]
