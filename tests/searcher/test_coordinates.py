"""Coordinate steps on fitness functions whose optimum is known."""

from __future__ import annotations

import pytest
from fakes import minus_distance, space_of, view_of

from peft_layerrope.searcher.algorithms import coordinate_ascent


def test_climbing_reaches_a_jagged_optimum_that_no_curve_has():
    target = (1.9, 1.0, 2.0, 1.1, 1.7, 1.0)
    found = coordinate_ascent((1.5,) * 6, view_of(minus_distance(target)), space_of(6), 500)
    assert (found.factors, found.fitness) == (target, 0.0)


def test_climbing_moves_only_free_layers_and_those_tied_to_them():
    space = space_of(5, scaled=(1, 3), sources=(0, 1, 2, 3, 1))
    found = coordinate_ascent((1.0,) * 5, view_of(minus_distance((2.0,) * 5)), space, 500)
    assert found.factors == (1.0, 2.0, 1.0, 2.0, 2.0)


@pytest.mark.parametrize("budget", [0, 1, 2, 5, 9, 20])
@pytest.mark.parametrize("known", [True, False])
def test_climbing_keeps_to_its_budget_and_is_never_worse_than_its_start(budget, known):
    start = (1.4, 1.1, 1.9, 1.0)
    view = view_of(minus_distance((2.0,) * 4))
    spent = 1
    if known:
        view.evaluate([start])
        spent = 0
    before = view.evaluations
    found = coordinate_ascent(start, view, space_of(4), max(budget, spent))
    assert view.evaluations - before <= max(budget, spent)
    assert found.fitness == view.fitness[found.factors] >= view.fitness[start]
