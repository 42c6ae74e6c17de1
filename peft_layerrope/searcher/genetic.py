"""The genetic algorithm, on DEAP."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from deap import algorithms, base, tools

from .found import Found, Generation, OnGeneration, random_state
from .genome import Genome
from .individual import Individual
from .memo import BudgetView
from .settings import ELITES

TOURNAMENT_SIZE = 3
CROSSOVER_PROBABILITY = 0.6
MUTATION_PROBABILITY = 0.4
BLEND_ALPHA = 0.3
# Mutation: each gene moves with this probability, by this share of its range (one standard deviation).
GENE_PROBABILITY = 1 / 3
GENE_SIGMA = 0.15


@contextmanager
def isolated_random(rng: random.Random) -> Iterator[None]:
    """Runs DEAP's operators, which draw from the `random` module, on `rng`, and gives the module's state back."""
    outside = random.getstate()
    random.setstate(rng.getstate())
    try:
        yield
    finally:
        rng.setstate(random.getstate())
        random.setstate(outside)


def evolve(
    genome: Genome,
    view: BudgetView,
    *,
    population: int,
    generations: int,
    rng: random.Random,
    seeds: Sequence[Sequence[float]] = (),
    on_generation: OnGeneration | None = None,
) -> Found:
    """Searches the fittest genes: tournament selection, blend crossover, Gaussian mutation within bounds, elitism.

    Args:
        genome: decodes genes.
        view: fitness; vectors that several individuals share after rounding are evaluated once.
        population: individuals per generation.
        generations: generations after the first.
        rng: the only source of randomness.
        seeds: genes to start with, before random ones.
        on_generation: told after each generation.
    """
    toolbox = _toolbox(genome)
    people = [Individual(genes) for genes in seeds[:population]]
    people += [Individual(genome.random(rng)) for _ in range(population - len(people))]
    history: list[dict[str, Any]] = []
    for number in range(generations + 1):
        if number:
            with isolated_random(rng):
                elites = [toolbox.clone(individual) for individual in tools.selBest(people, ELITES)]
                parents = toolbox.select(people, population - len(elites))
                children = algorithms.varAnd(parents, toolbox, CROSSOVER_PROBABILITY, MUTATION_PROBABILITY)
            people = elites + children
        unscored = [individual for individual in people if not individual.fitness.valid]
        values = view.evaluate([genome.decode(individual) for individual in unscored])
        for individual, value in zip(unscored, values, strict=True):
            individual.fitness.values = (value,)
        generation = Generation(number, [list(p) for p in people], [p.fitness.values[0] for p in people])
        history.append(generation.record(view))
        if on_generation is not None:
            on_generation(generation, random_state(rng))
    factors, fitness = view.best()
    champion = next((p for p in people if genome.decode(p) == factors), None)
    return Found(factors, fitness, None if champion is None else genome.control_points(champion), tuple(history))


def _toolbox(genome: Genome) -> base.Toolbox:
    low, high = genome.bounds
    sigma = [GENE_SIGMA * (h - b) for b, h in zip(low, high, strict=True)]
    toolbox = base.Toolbox()
    toolbox.register("select", tools.selTournament, tournsize=TOURNAMENT_SIZE)
    toolbox.register("mate", tools.cxBlend, alpha=BLEND_ALPHA)
    toolbox.register("mutate", tools.mutGaussian, mu=[0.0] * len(low), sigma=sigma, indpb=GENE_PROBABILITY)
    for operator in ("mate", "mutate"):
        toolbox.decorate(operator, _within(low, high))
    return toolbox


def _within(low: Sequence[float], high: Sequence[float]) -> Callable:
    """DEAP decorator: clips the genes of whatever an operator returns."""

    def decorate(operator: Callable) -> Callable:
        def clipped(*args: Any, **kwargs: Any) -> tuple[Individual, ...]:
            individuals = operator(*args, **kwargs)
            for individual in individuals:
                for i, gene in enumerate(individual):
                    individual[i] = min(max(gene, low[i]), high[i])
            return individuals

        return clipped

    return decorate
