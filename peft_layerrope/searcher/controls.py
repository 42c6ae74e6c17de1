"""The simpler things a per-layer search has to beat, each searched on the same split with the same budget."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .genome import LinearGenome
from .grid import Factors
from .memo import BudgetView
from .space import FactorSpace

_CHUNK = 16  # vectors evaluated between two looks at who is best, against whom the others race


@dataclass(frozen=True)
class Candidate:
    """The best point of one method.

    Attributes:
        name: key in reports.
        factors: the best vector.
        fitness: its fitness on the search split.
        evaluations: distinct vectors evaluated for it.
        exhaustive: whether that was its whole family on the grid.
    """

    name: str
    factors: Factors
    fitness: float
    evaluations: int
    exhaustive: bool = False


def uniform_vectors(space: FactorSpace) -> list[Factors]:
    """One factor for all layers."""
    return [(value,) * space.num_layers for value in space.grid.values]


def first_layers_alone_vectors(space: FactorSpace) -> list[Factors]:
    """The first k layers unscaled and one shared factor for the rest, for every k."""
    return [
        space.tie((1.0,) * k + (value,) * (space.num_layers - k))
        for value in space.grid.values
        for k in range(1, space.num_layers)
    ]


def first_and_rest_vectors(space: FactorSpace) -> list[Factors]:
    """The first layer a, all others b, for every a and b."""
    values = space.grid.values
    return [space.tie((a,) + (b,) * (space.num_layers - 1)) for a in values for b in values]


def line_vectors(space: FactorSpace) -> list[Factors]:
    """Straight lines over the scaled layers, between every two factors."""
    genome, values = LinearGenome(space), space.grid.values
    return [genome.decode((first, last)) for first in values for last in values]


def random_vectors(space: FactorSpace, count: int, rng: random.Random) -> list[Factors]:
    """`count` distinct vectors with independent random factors on the scaled layers (fewer if there are fewer)."""
    values = space.grid.values
    count = min(count, len(values) ** len(space.scaled_layers))
    vectors: dict[Factors, None] = {}
    while len(vectors) < count:
        vectors[space.spread([rng.choice(values) for _ in space.scaled_layers])] = None
    return list(vectors)


def best_of(name: str, vectors: Sequence[Factors], view: BudgetView, budget: int, rng: random.Random) -> Candidate:
    """Evaluates a family, or a random `budget` of it where it is larger, and returns its best point."""
    family = list(dict.fromkeys(vectors))
    exhaustive = len(family) <= budget
    members = family if exhaustive else rng.sample(family, budget)
    for start in range(0, len(members), _CHUNK):
        view.evaluate(members[start : start + _CHUNK])
    factors, fitness = view.best()
    return Candidate(name, factors, fitness, view.evaluations, exhaustive)
