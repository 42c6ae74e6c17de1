"""DEAP's individual: a list with a fitness to be maximised."""

from __future__ import annotations

from collections.abc import Sequence

from deap import base


class _Fitness(base.Fitness):
    weights = (1.0,)


class Individual(list):
    """Genes, or a factor vector, with a DEAP fitness."""

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__(values)
        self.fitness = _Fitness()
