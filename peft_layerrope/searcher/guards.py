"""Guards: what a vector may not make worse, as constraints of the search."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import numpy as np
from deap import tools

from ..declaration import declared, option
from ..errors import SearchError
from .individual import Individual
from .measurement import Heats, Measurement

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
