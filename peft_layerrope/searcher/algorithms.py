"""The search algorithms, on DEAP: CMA-ES over a family of vectors, and the paper's genetic algorithm over curves."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from deap import algorithms, base, cma, tools

from ..scoring.scores import rank_key
from .space import BezierGenome, Factors


class _Fitness(base.Fitness):
    weights = (1.0,)


class Individual(list):
    """Genes, with a DEAP fitness."""

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__(values)
        self.fitness = _Fitness()


ELITES = 2
"""Of a generation, who go on as they are."""
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
    genome: BezierGenome,
    generations: int,
    population: int,
    score: Callable[[int, Sequence[Factors]], Sequence[float]],
    rng: random.Random,
) -> Iterator[Individual]:
    """Searches the fittest curve: tournament selection, blend crossover, Gaussian mutation within bounds, elitism.
    Yields the fittest so far, after each generation, of which the first one is random.

    `score` is given the number of a generation and its vectors that no other had, and returns what is to be large; one
    that is not finite is last. `rng` is the only source of randomness.
    """
    toolbox = _toolbox(genome)
    people = [Individual(genome.random(rng)) for _ in range(population)]
    known: dict[Factors, float] = {}
    for number in range(generations):
        if number:
            with isolated_random(rng):
                elites = [toolbox.clone(individual) for individual in tools.selBest(people, ELITES)]
                parents = tools.selTournament(people, population - ELITES, TOURNAMENT_SIZE)
                people = elites + algorithms.varAnd(parents, toolbox, CROSSOVER_PROBABILITY, MUTATION_PROBABILITY)
        vectors = [genome.decode(individual) for individual in people]
        new = [vector for vector in dict.fromkeys(vectors) if vector not in known]
        known |= zip(new, map(rank_key, score(number, new)), strict=True)
        for individual, vector in zip(people, vectors, strict=True):
            individual.fitness.values = (known[vector],)
        yield toolbox.clone(tools.selBest(people, 1)[0])


def _toolbox(genome: BezierGenome) -> base.Toolbox:
    low, high = genome.bounds
    sigma = [GENE_SIGMA * (h - b) for b, h in zip(low, high, strict=True)]

    def within_bounds(people: tuple[Individual, ...]) -> tuple[Individual, ...]:
        for person in people:
            person[:] = np.clip(person, low, high).tolist()
        return people

    toolbox = base.Toolbox()
    toolbox.register("mate", lambda *pair: within_bounds(tools.cxBlend(*pair, BLEND_ALPHA)))
    toolbox.register("mutate", lambda one: within_bounds(tools.mutGaussian(one, 0.0, sigma, GENE_PROBABILITY)))
    return toolbox


def population_of(num_parameters: int) -> int:
    """Returns how many vectors a generation of CMA-ES has: Hansen's default."""
    return 4 + int(3 * np.log(num_parameters))


def adapt(
    family: np.ndarray,
    generations: int,
    score: Callable[[int, np.ndarray, Sequence[np.ndarray]], Sequence[float]],
    seed: int,
    limits: tuple[float, float],
) -> Iterator[np.ndarray]:
    """Searches a family's parameters by CMA-ES, from the unscaled model; a standard draw of them should be as far as a
    search is to look. Yields the centroid's log-factors, shape `(num_layers,)`, after each generation.

    `score` is given the number of a generation, the centroid's log-factors and those of each member, and returns what
    is to be large; where it is not finite, a member is last. A log-factor stays within `limits`.
    """
    count, rng = family.shape[1], np.random.default_rng(seed)
    strategy = cma.Strategy([0.0] * count, 1.0, lambda_=population_of(count))

    def log_factors(parameters: Sequence[float]) -> np.ndarray:
        return np.clip(family @ np.asarray(parameters), *limits)

    for number in range(generations):
        # as DEAP's own `generate`, which draws from NumPy's global generator
        steps = rng.standard_normal((strategy.lambda_, count))
        people = [Individual(point) for point in strategy.centroid + strategy.sigma * np.dot(steps, strategy.BD.T)]
        values = score(number, log_factors(strategy.centroid), [log_factors(person) for person in people])
        for person, value in zip(people, values, strict=True):
            person.fitness.values = (rank_key(value),)
        strategy.update(people)  # sorts them
        yield log_factors(strategy.centroid)


_STRENGTHS = (1.0, 4.0, 16.0)  # of the ridge


def fitted_parabola(members: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> tuple[np.ndarray, float] | None:
    """Fits a parabola, alike in all directions but its slope, to what generations saw: of each the parameters, shape
    `(members, num_parameters)`, and the values, shape `(members,)`; those that are not finite do not count. Each
    generation has a level of its own, as contexts have.

    Returns:
        Its slope at the unscaled model, shape `(num_parameters,)`, and the factor of the sum of squares. None: it says
        nothing of the members of a generation that it was not fitted to.
    """
    parts = [_centered(np.asarray(some), np.asarray(seen)) for some, seen in zip(members, values, strict=True)]

    def ridge(parts: Sequence[tuple[np.ndarray, np.ndarray]], strength: float) -> np.ndarray:
        rows, targets = (np.concatenate(column) for column in zip(*parts, strict=True))
        return np.linalg.solve(rows.T @ rows + strength * np.eye(rows.shape[1]), rows.T @ targets)

    def error(strength: float) -> float:
        """Of each generation, by what the others say."""
        fits = (ridge(parts[:i] + parts[i + 1 :], strength) for i in range(len(parts)))
        return sum(((targets - rows @ fit) ** 2).sum() for (rows, targets), fit in zip(parts, fits, strict=True))

    if len(parts) < 2:
        return None
    strength = min(_STRENGTHS, key=error)
    if error(strength) >= sum((targets**2).sum() for _, targets in parts):
        return None
    *slope, bend = ridge(parts, strength)
    return np.array(slope), float(bend)


def _centered(members: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parameters with their sum of squares, and values, each without its mean."""
    finite = np.isfinite(values)
    rows = np.column_stack([members, (members**2).sum(axis=1)])[finite]
    return rows - rows.mean(axis=0), values[finite] - values[finite].mean()
