"""Measurements of factor vectors: what is known of each, what its guards say, and who has paid for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated

import numpy as np
from deap import base, tools

from ..declaration import declared, option
from ..errors import SearchError
from ..scoring.scores import rank_key
from .evaluator import Evaluator, Heats, Measurement, clearly_worse
from .space import Factors


class _Fitness(base.Fitness):
    weights = (1.0,)


class Individual(list):
    """Genes, or a factor vector, with a DEAP fitness."""

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__(values)
        self.fitness = _Fitness()


_DUST = 1e-9  # a drop of exactly the limit, 0.4 - 0.3 against 0.1, is allowed


_guard = partial(option, panel="Guards")


@declared(SearchError)
class Guards:
    """Limits relative to the unscaled model. None switches one off.

    Raises:
        SearchError: a limit that is no number of at least 0.
    """

    max_tail_drop: Annotated[
        float | None, _guard("How far accuracy at the last position may fall, from 0 to 1.", ge=0)
    ] = 0.05
    max_short_rise: Annotated[float | None, _guard("How far the loss on short prompts may rise, in nats.", ge=0)] = 0.5

    def violation(self, measured: Measurement, unscaled: Measurement, plan: Heats) -> float:
        """Returns by how much the limits are exceeded, summed; 0 if they are kept.

        A limit counts as exceeded where the change, less one standard error of its paired mean, is beyond it:
        a single context that turns out otherwise proves no loss.
        """
        excess = 0.0
        if self.max_tail_drop is not None:
            drop = unscaled.tail(plan) - measured.tail(plan)
            excess += max(_at_least(drop) - self.max_tail_drop - _DUST, 0.0)
        if self.max_short_rise is not None and plan.has_short:
            rise = unscaled.short_values() - measured.short_values()  # values are negative losses
            excess += max(_at_least(rise) - self.max_short_rise - _DUST, 0.0)
        return excess


def _at_least(changes: np.ndarray) -> float:
    """The mean of paired changes, less its standard error."""
    if len(changes) < 2:
        return float(changes.mean())
    return float(changes.mean() - changes.std(ddof=1) / np.sqrt(len(changes)))


def constrained(
    fitness: Callable[[Individual], tuple[float]], violation: Callable[[Individual], float], floor: float
) -> Callable[[Individual], tuple[float]]:
    """Returns `fitness` under DEAP's penalty: `floor` minus the violation for whatever violates a guard.

    Args:
        fitness: of an individual that holds a factor vector.
        violation: of the same.
        floor: the unscaled model's fitness, below which every violator ranks.
    """
    return tools.DeltaPenalty(lambda individual: violation(individual) == 0, floor, violation)(fitness)


_Recorder = Callable[[dict[Factors, Measurement]], None]


class Memo:
    """Measurements of all vectors, each heat of each run once.

    Args:
        evaluator: runs what is not known yet.
        plan: the heats.
        guards: limits relative to the unscaled model, which is the first vector to be measured in full.
        known: measurements of an earlier, interrupted run.
        on_measured: told of what is new after each heat.

    Attributes:
        evaluator: see above; may be replaced.
        known: all measurements, in the order in which they began.
        unscaled: the vector of ones, once something was measured.
        requested: how many vectors were asked for, repeats included.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        plan: Heats,
        guards: Guards,
        known: dict[Factors, Measurement] | None = None,
        on_measured: _Recorder | None = None,
    ) -> None:
        self.evaluator = evaluator
        self._stored = dict(known or {})
        self._on_measured = on_measured
        self._guards = guards
        self.unscaled: Factors | None = None
        self.plan = plan
        self.known: dict[Factors, Measurement] = {}
        self.requested = 0

    def measure(self, vectors: Sequence[Factors], rival: Factors | None = None) -> None:
        """Measures each vector as far as it takes.

        Args:
            vectors: may repeat.
            rival: a vector measured in full; whoever clearly loses against it is given up. Default: nobody is.
        """
        self.requested += len(vectors)
        running = list(dict.fromkeys(vectors))
        if self.unscaled is None and running:
            self.unscaled = (1.0,) * len(running[0])
            if running != [self.unscaled]:
                self.measure([self.unscaled])
                self.requested -= 1
        for heat in range(len(self.plan)):
            self._run_heat([v for v in running if len(self._measured(v).heats) <= heat], heat)
            if rival is not None and heat < len(self.plan) - 1:
                running = [v for v in running if not self._loses(v, rival, heat)]

    def _measured(self, vector: Factors) -> Measurement:
        return self.known.get(vector, Measurement())

    def _run_heat(self, vectors: Sequence[Factors], heat: int) -> None:
        """Measures `vectors` on a heat, from what an interrupted run left where it is there."""
        missing = [v for v in vectors if len(self._stored.get(v, Measurement()).heats) <= heat]
        new: dict[Factors, Measurement] = {}
        if missing:
            for vector, scores in zip(missing, self.evaluator.measure(missing, heat), strict=True):
                new[vector] = self._measured(vector).plus(scores)
        for vector in vectors:
            stored = self._stored.get(vector, Measurement()).heats[: heat + 1]
            self.known[vector] = new[vector] if vector in new else Measurement(stored)
        if new and self._on_measured is not None:
            self._on_measured(new)

    def _loses(self, vector: Factors, rival: Factors, heat: int) -> bool:
        seen = Measurement(self.known[vector].heats[: heat + 1])
        return clearly_worse(seen.values(self.plan), self.known[rival].values(self.plan))

    def is_complete(self, vector: Factors) -> bool:
        """Whether the vector was measured in full."""
        return vector in self.known and self.known[vector].is_complete(self.plan)

    def is_feasible(self, vector: Factors) -> bool:
        """Whether the vector was measured in full, with finite scores, and keeps to the guards."""
        return self.is_complete(vector) and math.isfinite(self.raw_fitness(vector)) and self._violation(vector) == 0

    def raw_fitness(self, vector: Factors) -> float:
        """Mean utilisation on the groups seen, without penalty."""
        return self.known[vector].fitness(self.plan)

    def fitness(self, vector: Factors, rival: Factors | None = None) -> float:
        """Fitness under the guards; minus infinity where scores are not finite. Of a vector that was given up: the
        rival's plus the mean gap so far.
        """
        if not self.is_complete(vector):
            return self._estimate(vector, rival)
        score = constrained(
            lambda individual: (self.raw_fitness(tuple(individual)),),
            lambda individual: self._violation(tuple(individual)),
            self.raw_fitness(self.unscaled),
        )
        return rank_key(score(Individual(vector))[0])

    def _estimate(self, vector: Factors, rival: Factors) -> float:
        """The rival's fitness plus the mean gap at the look at which the vector lost, which is negative."""
        looks = range(len(self.known[vector].heats))
        lost = next((heat for heat in looks if self._loses(vector, rival, heat)), looks[-1])
        values = Measurement(self.known[vector].heats[: lost + 1]).values(self.plan)
        best = self.known[rival].values(self.plan)
        return rank_key(best.mean() + (values - best[: len(values)]).mean())

    def _violation(self, vector: Factors) -> float:
        return self._guards.violation(self.known[vector], self.known[self.unscaled], self.plan)


class BudgetView:
    """One searcher's view of a shared memo: counts the distinct vectors that *this* searcher asked for.

    A vector another searcher has paid for costs no time, but it counts here all the same, so that searchers
    compared at equal budgets really have equal budgets.

    Args:
        memo: the shared memo.
        race: whether vectors that clearly lose against this searcher's best are given up early.
    """

    def __init__(self, memo: Memo, race: bool = True) -> None:
        self._memo = memo
        self._race = race
        self._extra = 0
        self.fitness: dict[Factors, float] = {}

    @property
    def evaluations(self) -> int:
        """How many distinct vectors this searcher has asked for, and what was charged to it beside them."""
        return len(self.fitness) + self._extra

    def charge(self, evaluations: int) -> None:
        """Adds the cost of something that is not an evaluation, in evaluations."""
        self._extra += evaluations

    def evaluate(self, vectors: Sequence[Factors]) -> list[float]:
        """Returns one fitness per vector, in order; higher is better."""
        for group in self._groups(list(vectors)):
            rival = self._best_complete() if self._race else None
            self._memo.measure(group, rival)
            for vector in group:
                if vector not in self.fitness or self._memo.is_complete(vector):  # what is known replaces an estimate
                    self.fitness[vector] = self._memo.fitness(vector, rival)
        return [self.fitness[vector] for vector in vectors]

    def _groups(self, vectors: list[Factors]) -> list[list[Factors]]:
        """All at once; at the start of a race 1, then 2, 4 ... so that there soon is somebody to race against."""
        if not self._race or self._best_complete() is not None:
            return [vectors]
        ends = [2**power - 1 for power in range(len(vectors).bit_length() + 1)]
        return [vectors[start:stop] for start, stop in pairwise(ends) if start < len(vectors)]

    def best(self) -> tuple[Factors, float]:
        """Returns the best vector that was measured in full and keeps to the guards, and its fitness; of equals the
        first one asked for. Where none does, the unscaled model.
        """
        vector = self._best_complete() or self._memo.unscaled
        return vector, self.fitness.get(vector, self._memo.fitness(vector))

    def feasible(self, vectors: Sequence[Factors]) -> list[Factors]:
        """Returns those that were measured in full and keep to the guards, in order."""
        return [vector for vector in vectors if self._memo.is_feasible(vector)]

    def _best_complete(self) -> Factors | None:
        return max(self.feasible(list(self.fitness)), key=self.fitness.__getitem__, default=None)
