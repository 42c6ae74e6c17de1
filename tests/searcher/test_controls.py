"""The families that a per-layer search has to beat."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from fakes import minus_distance, space_of, view_of

from peft_layerrope.searcher import FactorGrid
from peft_layerrope.searcher import algorithms as families
from peft_layerrope.searcher.algorithms import best_of

VALUES = FactorGrid().values


def test_families_by_their_definition():
    space = space_of(3)
    assert families.uniform_vectors(space) == [(v,) * 3 for v in VALUES]
    alone = families.first_layers_alone_vectors(space)
    assert set(alone) == {(1.0,) * k + (v,) * (3 - k) for k in (1, 2) for v in VALUES}
    assert set(families.first_and_rest_vectors(space)) == {(a, b, b) for a in VALUES for b in VALUES}


def test_lines_are_straight():
    space = space_of(7, scaled=range(1, 7))
    lines = families.line_vectors(space)
    assert len(lines) == len(VALUES) ** 2
    for (first, last), vector in zip(itertools.product(VALUES, VALUES), lines, strict=True):
        assert vector[0] == 1.0
        np.testing.assert_allclose(vector[1:], np.linspace(first, last, 6), atol=0.05 + 1e-9)


def test_random_vectors_are_distinct_and_end():
    space = space_of(3, scaled=[1])
    drawn = families.random_vectors(space, 5, random.Random(0))
    assert all(v[0] == v[2] == 1.0 and v[1] in VALUES for v in drawn)
    assert len(set(drawn)) == 5
    assert set(families.random_vectors(space, 50, random.Random(0))) == {(1.0, v, 1.0) for v in VALUES}


@pytest.mark.parametrize("name", ["uniform", "first_layers_alone", "first_and_rest", "line", "random"])
def test_families_keep_layers_that_share_keys_together(name):
    space = space_of(6, scaled=(0, 1, 2, 3), sources=(0, 1, 2, 3, 2, 3))
    make = getattr(families, f"{name}_vectors")
    for vector in make(space, 40, random.Random(0)) if name == "random" else make(space):
        assert vector == space.tie(vector)


def test_best_of_keeps_to_the_budget_and_says_so():
    target = [1.7, 1.2, 1.2]
    family = families.first_and_rest_vectors(space_of(3))
    everything = best_of("x", family * 2, view_of(minus_distance(target)), 121, random.Random(0))
    assert (everything.factors, everything.evaluations, everything.exhaustive) == ((1.7, 1.2, 1.2), 121, True)
    view = view_of(minus_distance(target))
    some = best_of("x", family, view, 30, random.Random(0))
    assert (some.evaluations, some.exhaustive) == (30, False)
    assert some.fitness == max(view.fitness.values()) == view.fitness[some.factors]
