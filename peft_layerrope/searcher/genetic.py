"""The genetic algorithm over Bézier curves, on DEAP."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from deap import algorithms, base, tools

from .evaluator import BudgetView
from .genome import NUM_GENES, BezierGenome
from .grid import Factors

TOURNAMENT_SIZE = 3
CROSSOVER_PROBABILITY = 0.6
MUTATION_PROBABILITY = 0.4
BLEND_ALPHA = 0.3
ELITES = 2
# Mutation: each gene moves with this probability, by this share of its range (one standard deviation).
GENE_PROBABILITY = 1 / 3
GENE_SIGMA = 0.15


class _Fitness(base.Fitness):
    weights = (1.0,)


class Individual(list):
    """Genes with a DEAP fitness."""

    def __init__(self, genes: Sequence[float]) -> None:
        super().__init__(genes)
        self.fitness = _Fitness()


@dataclass(frozen=True)
class CurveResult:
    """The best curve found and how the search went."""

    factors: Factors
    fitness: float
    control_points: list[list[float]]
    history: list[dict[str, Any]]


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


def evolve_curve(
    genome: BezierGenome,
    evaluator: BudgetView,
    *,
    population: int,
    generations: int,
    rng: random.Random,
    seeds: Sequence[Sequence[float]] = (),
) -> CurveResult:
    """Searches the curve whose factors are fittest.

    Tournament selection, blend crossover, Gaussian mutation within bounds, elitism.

    Args:
        genome: decodes genes.
        evaluator: fitness; vectors that several curves share after rounding are evaluated once.
        population: individuals per generation.
        generations: generations after the first.
        rng: the only source of randomness.
        seeds: genes to start with, before random ones.
    """
    toolbox = _toolbox(genome)
    initial = [Individual(genes) for genes in seeds[:population]]
    initial += [Individual(genome.random(rng)) for _ in range(population - len(initial))]
    people, history = initial, []
    champion = tools.HallOfFame(1)
    for generation in range(generations + 1):
        if generation:
            with isolated_random(rng):
                elites = [toolbox.clone(individual) for individual in tools.selBest(people, ELITES)]
                parents = toolbox.select(people, population - len(elites))
                children = algorithms.varAnd(parents, toolbox, CROSSOVER_PROBABILITY, MUTATION_PROBABILITY)
            people = elites + children
        unscored = [individual for individual in people if not individual.fitness.valid]
        for individual, value in zip(unscored, evaluator.evaluate([genome.decode(i) for i in unscored]), strict=True):
            individual.fitness.values = (value,)
        champion.update(people)
        scores = [individual.fitness.values[0] for individual in people]
        record = {
            "generation": generation,
            "best": max(scores),
            "mean": sum(scores) / len(scores),
            "evaluations": evaluator.evaluations,
        }
        history.append(record)
    best = champion[0]
    return CurveResult(genome.decode(best), best.fitness.values[0], genome.control_points(best), history)


def _toolbox(genome: BezierGenome) -> base.Toolbox:
    low, high = genome.bounds
    sigma = [GENE_SIGMA * (h - b) for b, h in zip(low, high, strict=True)]
    toolbox = base.Toolbox()
    toolbox.register("select", tools.selTournament, tournsize=TOURNAMENT_SIZE)
    toolbox.register("mate", tools.cxBlend, alpha=BLEND_ALPHA)
    toolbox.register("mutate", tools.mutGaussian, mu=[0.0] * NUM_GENES, sigma=sigma, indpb=GENE_PROBABILITY)
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
