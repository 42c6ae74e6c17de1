"""The simpler things a per-layer search has to beat, each searched on the same split with the same budget."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .evaluator import BudgetView, MemoEvaluator
from .grid import FactorGrid, Factors, spread_over_layers


@dataclass(frozen=True)
class Control:
    """The best point of one simple family of factor vectors.

    Attributes:
        name: key in reports.
        factors: the best vector.
        fitness: its fitness on the search split.
        evaluations: distinct vectors evaluated for it.
        exhaustive: whether that was the whole family on the grid.
    """

    name: str
    factors: Factors
    fitness: float
    evaluations: int
    exhaustive: bool


def uniform_vectors(grid: FactorGrid, num_layers: int) -> list[Factors]:
    """One factor for all layers."""
    return [(value,) * num_layers for value in grid.values]


def first_layers_alone_vectors(grid: FactorGrid, num_layers: int) -> list[Factors]:
    """The first k layers unscaled and one shared factor for the rest, for every k."""
    return [(1.0,) * k + (value,) * (num_layers - k) for value in grid.values for k in range(1, num_layers)]


def first_and_rest_vectors(grid: FactorGrid, num_layers: int) -> list[Factors]:
    """The first layer a, all others b, for every a and b."""
    return [(a,) + (b,) * (num_layers - 1) for a in grid.values for b in grid.values]


def random_vectors(
    grid: FactorGrid, scaled_layers: Sequence[int], num_layers: int, count: int, rng: random.Random
) -> list[Factors]:
    """`count` distinct vectors with independent random factors on the scaled layers (fewer if there are fewer)."""
    count = min(count, len(grid.values) ** len(scaled_layers))
    vectors: dict[Factors, None] = {}
    while len(vectors) < count:
        vector = [rng.choice(grid.values) for _ in scaled_layers]
        vectors[spread_over_layers(vector, scaled_layers, num_layers)] = None
    return list(vectors)


def best_of(name: str, vectors: Sequence[Factors], memo: MemoEvaluator, budget: int, rng: random.Random) -> Control:
    """Evaluates a family, or a random `budget` of it where it is larger, and returns its best point."""
    family = list(dict.fromkeys(vectors))
    exhaustive = len(family) <= budget
    view = BudgetView(memo)
    view.evaluate(family if exhaustive else rng.sample(family, budget))
    factors, fitness = view.best()
    return Control(name, factors, fitness, view.evaluations, exhaustive)
