"""The search algorithms over evaluations: genetic, CMA-ES, coordinate steps, and lists of vectors for controls."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from deap import algorithms, base, cma, tools

from ..scoring.scores import rank_key
from .families import Family
from .memo import BudgetView, Individual
from .settings import ELITES, SearchSettings
from .space import Factors, FactorSpace, Genome, LinearGenome, make_genome


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


FIRST_SIGMA = 1.0
"""First step size of CMA-ES, in parameters of which a standard draw does as much harm as is allowed."""


def population_of(num_parameters: int) -> int:
    """Returns how many vectors a generation of CMA-ES has: Hansen's default."""
    return 4 + int(3 * np.log(num_parameters))


class _Strategy(cma.Strategy):
    """DEAP's strategy drawing from its own generator: DEAP itself uses NumPy's global one."""

    def __init__(self, centroid: Sequence[float], sigma: float, rng: np.random.Generator, lambda_: int) -> None:
        super().__init__(centroid=centroid, sigma=sigma, lambda_=lambda_)
        self._rng = rng

    def generate(self, ind_init: type[Individual]) -> list[Individual]:
        steps = self._rng.standard_normal((self.lambda_, self.dim))
        return [ind_init(point) for point in self.centroid + self.sigma * np.dot(steps, self.BD.T)]


def adapt(
    family: Family,
    generations: int,
    score: Callable[[int, np.ndarray, Sequence[np.ndarray]], Sequence[float]],
    seed: int,
    limits: tuple[float, float],
) -> Iterator[np.ndarray]:
    """Searches a family's parameters by CMA-ES, from the unscaled model.

    Args:
        family: what may be chosen from; a standard draw of its parameters should be as far as a search is to look.
        generations: how many.
        score: given the number of a generation, the centroid's log-factors and those of each member, what is to be
            large; where it is not finite, a member is last.
        seed: of the draws.
        limits: of a log-factor.

    Yields:
        The centroid's log-factors, shape `(num_layers,)`, before the first generation and after each.
    """
    count = family.num_parameters
    strategy = _Strategy([0.0] * count, FIRST_SIGMA, np.random.default_rng(seed), population_of(count))

    def log_factors(parameters: Sequence[float]) -> np.ndarray:
        return np.clip(family.log_factors(np.asarray(parameters)), *limits)

    yield log_factors(strategy.centroid)
    for number in range(generations):
        people = strategy.generate(Individual)
        values = score(number, log_factors(strategy.centroid), [log_factors(person) for person in people])
        for person, value in zip(people, values, strict=True):
            person.fitness.values = (rank_key(value),)
        strategy.update(people)  # sorts them
        yield log_factors(strategy.centroid)


_STRENGTHS = (1.0, 4.0, 16.0)  # of the ridge


def fitted_top(members: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> tuple[np.ndarray, float] | None:
    """Fits a parabola, alike in all directions but its slope, to what generations saw, and finds its top. Each
    generation has a level of its own, as contexts have.

    Args:
        members: parameters of each generation, shape `(members, num_parameters)`.
        values: their values, shape `(members,)`; those that are not finite do not count.

    Returns:
        The direction of the top from the unscaled model, of length 1, and how far it is, infinite where the parabola
        does not bend down. None: it says nothing of the members of a generation that it was not fitted to.
    """
    parts = [_centred(np.asarray(some), np.asarray(seen)) for some, seen in zip(members, values, strict=True)]

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
    length = float(np.linalg.norm(slope))
    return np.array(slope) / length, length / (-2 * bend) if bend < 0 else np.inf


def _centred(members: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parameters with their sum of squares, and values, each without its mean."""
    finite = np.isfinite(values)
    rows = np.column_stack([members, (members**2).sum(axis=1)])[finite]
    return rows - rows.mean(axis=0), values[finite] - values[finite].mean()


_STRIDES = (4, 2, 1)  # steps on the grid, coarse to fine


def coordinate_ascent(start: Factors, view: BudgetView, space: FactorSpace, max_evaluations: int) -> Found:
    """Moves one layer's factor at a time along the grid as long as the fitness rises.

    Sweeps over the scaled layers with strides of 4, 2 and 1 grid steps, taking the better of up and down; a stride
    is repeated until a sweep finds nothing, or the budget is spent.

    Args:
        start: a vector of the space.
        view: fitness.
        space: allowed factors, and the layers that may move.
        max_evaluations: distinct vectors to ask for at most.

    Returns:
        The best vector of the view that keeps to the guards.
    """
    limit = view.evaluations + max_evaluations
    current, fitness = start, view.evaluate([start])[0]
    for stride in _STRIDES:
        improved = True
        while improved:
            improved = False
            for layer in space.scaled_layers:
                candidates = _neighbours(current, layer, stride, space)
                if view.evaluations + len(candidates) > limit:
                    return Found(*view.best())
                for candidate, value in zip(candidates, view.evaluate(candidates), strict=True):
                    if value > fitness:
                        current, fitness, improved = candidate, value, True
    return Found(*view.best())


def _neighbours(vector: Factors, layer: int, stride: int, space: FactorSpace) -> list[Factors]:
    values = space.grid.values
    at = values.index(space.grid.snap([vector[layer]])[0])
    return [
        space.tie((*vector[:layer], values[index], *vector[layer + 1 :]))
        for index in (at - stride, at + stride)
        if 0 <= index < len(values)
    ]


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
        on_generation: told after each generation, by the algorithms that have them.
    """
    if settings.algorithm == "greedy":
        return coordinate_ascent(
            space.spread([seeds[-1]] * len(space.scaled_layers)), view, space, settings.search_evaluations
        )
    genome = make_genome(settings.genome, space)
    if settings.algorithm == "random":
        return _random(settings, space, view, rng)
    return evolve(
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
