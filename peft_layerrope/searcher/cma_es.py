"""Covariance matrix adaptation, by DEAP, behind the genetic algorithm's interface."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from deap import cma

from .found import Found, Generation, OnGeneration
from .genome import Genome
from .individual import Individual
from .memo import BudgetView

SIGMA = 0.25
"""First step size, as a share of each gene's range."""


class _Strategy(cma.Strategy):
    """DEAP's strategy drawing from its own generator: DEAP itself uses NumPy's global one."""

    def __init__(self, centroid: Sequence[float], sigma: float, rng: np.random.Generator, lambda_: int) -> None:
        super().__init__(centroid=centroid, sigma=sigma, lambda_=lambda_)
        self._rng = rng

    def generate(self, ind_init: type[Individual]) -> list[Individual]:
        steps = self._rng.standard_normal((self.lambda_, self.dim))
        return [ind_init(point) for point in self.centroid + self.sigma * np.dot(steps, self.BD.T)]


def adapt(
    genome: Genome,
    view: BudgetView,
    *,
    population: int,
    generations: int,
    rng: random.Random,
    seeds: Sequence[Sequence[float]] = (),
    on_generation: OnGeneration | None = None,
) -> Found:
    """Searches the fittest genes by CMA-ES, from the last of `seeds`, in genes scaled to [0, 1].

    Genes outside their bounds are clipped for evaluation. See [`evolve`] for the arguments.
    """
    low, high = (np.array(bound) for bound in genome.bounds)
    numbers = np.random.default_rng(rng.getrandbits(64))
    start = seeds[-1] if seeds else genome.random(rng)
    centroid = (np.clip(start, low, high) - low) / (high - low)
    strategy = _Strategy(centroid, SIGMA, numbers, population)
    history: list[dict[str, Any]] = []
    for number in range(generations + 1):
        people = strategy.generate(Individual)
        if not number:  # what a searcher should know takes part like a draw
            people[: len(seeds)] = [Individual((np.clip(seed, low, high) - low) / (high - low)) for seed in seeds]
        genes = [(low + np.clip(person, 0, 1) * (high - low)).tolist() for person in people]
        values = view.evaluate([genome.decode(g) for g in genes])
        for person, value in zip(people, values, strict=True):
            person.fitness.values = (value,)
        strategy.update(people)  # sorts them
        generation = Generation(number, genes, values)
        history.append(generation.record(view))
        if on_generation is not None:
            on_generation(generation, [numbers.bit_generator.state["state"]])
    return Found(*view.best(), history=tuple(history))
