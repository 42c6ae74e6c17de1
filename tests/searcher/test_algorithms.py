"""Both algorithms on fitness functions whose optimum is known, without a model."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from fakes import space_of

from peft_layerrope.searcher.algorithms import ELITES, adapt, evolve, fitted_parabola, isolated_random
from peft_layerrope.searcher.space import BezierGenome, Factors, decay_family, per_layer_family

RISING = (1.1, 1.3, 1.5, 1.7, 1.9)


def evolved(target: Sequence[float] = RISING, seed: int = 0, generations: int = 12, **fields: object):
    """The fittest of each generation, and all vectors that were asked for, generation by generation."""
    genome, asked = BezierGenome(space_of(len(target), **fields)), []

    def score(number: int, vectors: Sequence[Factors]) -> list[float]:
        assert number == len(asked)
        asked.append(list(vectors))
        return [-sum((a - b) ** 2 for a, b in zip(vector, target, strict=True)) for vector in vectors]

    fittest = list(evolve(genome, generations, 24, score, random.Random(seed)))
    return genome, fittest, asked


def test_a_genetic_search_comes_near_the_optimum_and_asks_for_nothing_twice():
    genome, fittest, asked = evolved()
    found = genome.decode(fittest[-1])
    assert max(abs(a - b) for a, b in zip(found, RISING, strict=True)) <= 0.2 + 1e-9
    everything = [vector for vectors in asked for vector in vectors]
    assert len(set(everything)) == len(everything)
    assert all(len(vectors) <= 24 - ELITES for vectors in asked[1:])
    values = [one.fitness.values[0] for one in fittest]
    assert values == sorted(values)
    assert values[-1] == max(-sum((a - b) ** 2 for a, b in zip(v, RISING, strict=True)) for v in everything)
    assert len(fittest) == len(asked) == 12


def test_a_genetic_search_is_decided_by_its_seed_alone():
    random.seed(123)
    np.random.seed(123)
    before, numpy_before = random.getstate(), np.random.get_state()
    first = evolved(seed=5)[2]
    assert random.getstate() == before
    np.testing.assert_equal(np.random.get_state(), numpy_before)
    random.seed(321)  # the caller's seeds do not matter
    assert evolved(seed=5)[2] == first
    assert evolved(seed=6)[2] != first


def test_a_genetic_search_works_with_a_single_free_layer_and_without_finite_scores():
    genome, fittest, _ = evolved((1.0, 1.6), scaled=[1])
    assert genome.decode(fittest[-1]) == pytest.approx((1.0, 1.6), abs=0.1)
    nothing = evolve(genome, 3, 6, lambda number, vectors: [math.nan] * len(vectors), random.Random(0))
    assert len(list(nothing)) == 3


@pytest.mark.parametrize("family", [per_layer_family, decay_family])
def test_cma_es_finds_the_optimum_of_a_noisy_function(family):
    """Which changes from generation to generation by as much as its members differ, as contexts do."""
    members, target = family(space_of(6)), np.array([0.3, -0.2, 0.1, 0.0, -0.4, 0.2])
    expected = members @ np.linalg.lstsq(members, target, rcond=None)[0]
    rng, seen = np.random.default_rng(1), []

    def score(number, centroid, people):
        seen.append((number, centroid, people))
        offset = rng.normal()
        return [math.nan if p[0] > 0.9 else offset - ((p - target) ** 2).sum() + 0.01 * rng.normal() for p in people]

    centroids = list(adapt(0.3 * members, 40, score, 3, (-1.0, 1.0)))
    assert len(centroids) == len(seen) == 40
    np.testing.assert_allclose(np.mean(centroids[-10:], axis=0), expected, atol=0.1)
    before = [np.zeros(6), *centroids]
    for i, (number, centroid, people) in enumerate(seen):
        np.testing.assert_array_equal(centroid, before[i])
        assert np.abs(people).max() <= 1.0
        assert number == i


@pytest.mark.parametrize("num_layers", [24, 32, 80])
def test_forty_vectors_of_cma_es_have_moved_every_layer_up_and_down(num_layers):
    tried = []

    def score(number, centroid, people):
        tried.extend(people)
        return [0.0] * len(people)

    for _ in adapt(per_layer_family(space_of(num_layers)), 9, score, 0, (-1.0, 1.0)):
        if len(tried) >= 40:
            break
    moved = np.array(tried[:40])
    assert (moved.min(axis=0) < -0.1).all()
    assert (moved.max(axis=0) > 0.1).all()


@pytest.mark.parametrize("bend", [-0.1, 0.02])
def test_a_parabola_is_fitted_to_what_generations_saw(bend):
    """Each of which has a level of its own that is far larger than what its members differ by."""
    rng, direction = np.random.default_rng(0), np.ones(8) / np.sqrt(8)
    members = [rng.normal(size=(12, 8)) for _ in range(8)]
    values = [
        rng.normal(0, 5) + 0.4 * some @ direction + bend * (some**2).sum(axis=1) + rng.normal(0, 0.1, 12)
        for some in members
    ]
    values[2][3] = np.nan
    slope, found = fitted_parabola(members, values)
    np.testing.assert_allclose(slope, 0.4 * direction, atol=0.05)
    assert found == pytest.approx(bend, abs=0.01)


def test_a_parabola_that_predicts_nothing_is_none():
    rng = np.random.default_rng(1)
    members = [rng.normal(size=(8, 12)) for _ in range(4)]
    assert fitted_parabola(members, [rng.normal(size=8) for _ in members]) is None
    assert fitted_parabola(members[:1], [members[0].sum(axis=1)]) is None


def test_isolated_random_gives_the_state_back_after_an_error():
    before = random.getstate()
    rng = random.Random(0)

    def draw_and_fail() -> None:
        with isolated_random(rng):
            random.random()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        draw_and_fail()
    assert random.getstate() == before
    assert rng.getstate() != random.Random(0).getstate()
