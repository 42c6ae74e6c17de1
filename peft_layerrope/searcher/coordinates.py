"""Coordinate search: one layer's factor at a time along the grid, as long as the fitness rises."""

from __future__ import annotations

from .found import Found
from .grid import Factors
from .memo import BudgetView
from .space import FactorSpace

_STRIDES = (4, 2, 1)  # steps on the grid, coarse to fine


def climb(start: Factors, view: BudgetView, space: FactorSpace, max_evaluations: int) -> Found:
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
