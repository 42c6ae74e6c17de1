"""The search algorithms by name, behind one call."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .cma_es import adapt
from .controls import best_of, random_vectors
from .coordinates import climb
from .found import Found, OnGeneration
from .genetic import evolve
from .genome import make_genome
from .grid import Factors
from .memo import BudgetView
from .settings import SearchSettings
from .space import FactorSpace


def run_strategy(
    settings: SearchSettings,
    space: FactorSpace,
    view: BudgetView,
    rng: random.Random,
    seeds: Sequence[float],
    on_generation: OnGeneration | None = None,
) -> Found:
    """Searches as `settings` say.

    Args:
        settings: algorithm, curve and budget.
        space: what may be chosen from.
        view: fitness.
        rng: the only source of randomness.
        seeds: uniform factors to start with: the unscaled model's and the best one. The paper's begins without them.
        on_generation: told after each generation, by algorithms that have them.
    """
    if settings.algorithm == "greedy":
        return climb(space.spread([seeds[-1]] * len(space.scaled_layers)), view, space, settings.search_evaluations)
    genome = make_genome(settings.genome, space)
    if settings.algorithm == "random":
        return _random(settings, space, view, rng)
    algorithm = adapt if settings.algorithm == "cma-es" else evolve
    return algorithm(
        genome,
        view,
        population=settings.population,
        generations=settings.generations,
        rng=rng,
        seeds=[genome.constant(factor) for factor in seeds] if settings.algorithm != "paper" else (),
        on_generation=on_generation,
    )


def _random(settings: SearchSettings, space: FactorSpace, view: BudgetView, rng: random.Random) -> Found:
    """Independent draws: of factors, or of a curve's genes where one was asked for."""
    budget = settings.search_evaluations
    if settings.curve in (None, "direct"):
        vectors: list[Factors] = random_vectors(space, budget, rng)
    else:
        genome = make_genome(settings.curve, space)
        vectors = [genome.decode(genome.random(rng)) for _ in range(budget)]
    best = best_of("random", vectors, view, budget, rng)
    return Found(best.factors, best.fitness)
