"""Coordinate refinement: from the curve's best point to the jagged optimum near it."""

from __future__ import annotations

from collections.abc import Sequence

from .evaluator import BudgetView
from .grid import FactorGrid, Factors

_STRIDES = (4, 2, 1)  # steps on the grid, coarse to fine


def refine_by_coordinates(
    start: Factors,
    evaluator: BudgetView,
    grid: FactorGrid,
    scaled_layers: Sequence[int],
    max_evaluations: int,
) -> tuple[Factors, float]:
    """Moves one layer's factor at a time along the grid as long as the fitness rises.

    Sweeps over the layers with strides of 4, 2 and 1 grid steps, taking the better of up and down; a stride is
    repeated until a sweep finds nothing, or the budget is spent.

    Args:
        start: a vector on the grid.
        evaluator: fitness.
        grid: allowed factors.
        scaled_layers: the layers that may move.
        max_evaluations: distinct vectors to ask for at most.

    Returns:
        The best vector and its fitness; never worse than `start`.
    """
    values = grid.values
    limit = evaluator.evaluations + max_evaluations
    current, fitness = start, evaluator.evaluate([start])[0]
    for stride in _STRIDES:
        improved = True
        while improved:
            improved = False
            for layer in scaled_layers:
                candidates = _neighbours(current, layer, stride, values)
                if evaluator.evaluations + len(candidates) > limit:
                    return current, fitness
                for candidate, value in zip(candidates, evaluator.evaluate(candidates), strict=True):
                    if value > fitness:
                        current, fitness, improved = candidate, value, True
    return current, fitness


def _neighbours(vector: Factors, layer: int, stride: int, values: Sequence[float]) -> list[Factors]:
    at = values.index(vector[layer])
    return [
        (*vector[:layer], values[index], *vector[layer + 1 :])
        for index in (at - stride, at + stride)
        if 0 <= index < len(values)
    ]
