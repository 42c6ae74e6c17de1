"""Every algorithm on fitness functions whose optimum is known, without a model."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from fakes import NO_GUARDS, ONE_HEAT, Formula, minus_distance, space_of, view_of

from peft_layerrope import SearchSettings
from peft_layerrope.searcher import Guards
from peft_layerrope.searcher.algorithms import (
    Found,
    Generation,
    adapt,
    evolve,
    fitted_top,
    isolated_random,
    run_strategy,
)
from peft_layerrope.searcher.gradient import per_layer_family, uniform_family
from peft_layerrope.searcher.memo import BudgetView, Memo
from peft_layerrope.searcher.space import make_genome

STRATEGIES = {
    **{f"genetic {curve}": {"algorithm": "genetic", "curve": curve} for curve in ("bezier", "linear", "direct")},
    "paper": {"algorithm": "paper"},
    "greedy": {"algorithm": "greedy"},
    "random": {"algorithm": "random"},
    "random line": {"algorithm": "random", "curve": "linear"},
}
RISING = (1.1, 1.3, 1.5, 1.7, 1.9)  # a line, so that every genome has it


def run(
    fields: dict, target: Sequence[float] = RISING, seed: int = 0, on_generation=None, **more: object
) -> tuple[Found, BudgetView]:
    view = view_of(minus_distance(target))
    settings = SearchSettings(**{"population": 24, "generations": 12, **fields, **more})
    found = run_strategy(
        settings, space_of(len(target)), view, random.Random(seed), seeds=[1.0, 1.5], on_generation=on_generation
    )
    return found, view


@pytest.mark.parametrize("fields", STRATEGIES.values(), ids=STRATEGIES)
class TestEveryAlgorithm:
    def test_comes_near_the_optimum(self, fields):
        found, view = run(fields)
        near = 0.4 if fields["algorithm"] == "random" else 0.2
        assert max(abs(a - b) for a, b in zip(found.factors, RISING, strict=True)) <= near + 1e-9
        assert found.fitness == max(view.fitness.values()) == view.fitness[found.factors]

    def test_is_decided_by_its_seed_alone(self, fields):
        random.seed(123)
        np.random.seed(123)
        before, numpy_before = random.getstate(), np.random.get_state()
        first, first_view = run(fields, seed=5)
        assert random.getstate() == before
        assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_before, strict=True))
        random.seed(321)  # the caller's seeds do not matter
        np.random.seed(321)
        again, again_view = run(fields, seed=5)
        assert again == first
        assert list(again_view.fitness) == list(first_view.fitness)
        if fields["algorithm"] != "greedy":  # it draws nothing
            assert list(run(fields, seed=6)[1].fitness) != list(first_view.fitness)

    @pytest.mark.parametrize("generations", [0, 3])
    def test_keeps_to_its_budget(self, fields, generations):
        found, view = run(fields, population=5, generations=generations)
        assert view.evaluations <= 5 * (generations + 1)
        assert found.factors in view.fitness

    def test_works_with_a_single_free_layer(self, fields):
        view = view_of(minus_distance([1.0, 1.6]))
        settings = SearchSettings(population=6, generations=6, **fields)
        found = run_strategy(settings, space_of(2, scaled=[1]), view, random.Random(0), seeds=[1.0, 1.5])
        assert found.factors[0] == 1.0
        assert abs(found.factors[1] - 1.6) <= 0.1 + 1e-9

    def test_never_returns_what_breaks_a_guard(self, fields):
        memo = Memo(Formula(minus_distance(RISING), tail=lambda v, g: max(v) < 1.6), ONE_HEAT, Guards())
        view = BudgetView(memo)
        view.evaluate([(1.0,) * 5])
        settings = SearchSettings(population=8, generations=3, **fields)
        found = run_strategy(settings, space_of(5), view, random.Random(0), seeds=[1.0, 1.5])
        assert max(found.factors) < 1.6


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name.startswith(("genetic", "cma", "paper"))])
def test_generations_are_told_with_the_fitness_of_their_members(name):
    told: list[tuple[Generation, list]] = []
    fields = STRATEGIES[name]
    found, view = run(fields, generations=3, on_generation=lambda *event: told.append(event))
    genome = make_genome(fields.get("curve", "bezier"), space_of(len(RISING)))
    assert [generation.number for generation, _ in told] == [0, 1, 2, 3]
    for generation, _ in told:
        assert [view.fitness[genome.decode(genes)] for genes in generation.population] == generation.fitness
    assert [record["best"] for record in found.history] == [max(generation.fitness) for generation, _ in told]
    assert [record["evaluations"] for record in found.history][-1] == view.evaluations
    assert len({str(state) for _, state in told}) == 4


def test_an_evolved_curve_decodes_to_its_factors():
    target = [1.0, 1.1, 1.3, 1.6, 1.8, 1.9, 1.9, 1.7]
    found, _ = run({"algorithm": "genetic"}, target)
    (_, y0), (x1, y1), (x2, y2), (_, y3) = found.control_points
    assert make_genome("bezier", space_of(8)).decode([y0, y1, y2, y3, x1, x2]) == found.factors
    assert max(abs(a - b) for a, b in zip(found.factors, target, strict=True)) <= 0.2 + 1e-9
    assert found.history[-1]["best"] >= found.history[0]["best"]


def test_seeds_are_tried_first():
    evaluator = Formula(minus_distance([1.4] * 4))
    view = BudgetView(Memo(evaluator, ONE_HEAT, NO_GUARDS))
    genome = make_genome("bezier", space_of(4))
    seeds = [genome.constant(1.0), genome.constant(1.4)]
    found = evolve(genome, view, population=4, generations=0, rng=random.Random(0), seeds=seeds)
    assert [vector for vector, _ in evaluator.asked[:2]] == [(1.0,) * 4, (1.4,) * 4]
    assert found.factors == (1.4,) * 4


@pytest.mark.parametrize("family", [per_layer_family, uniform_family])
def test_cma_es_finds_the_optimum_of_a_noisy_function(family):
    """Which changes from generation to generation by as much as its members differ, as contexts do."""
    members, target = family(range(6), range(6)), np.array([0.3, -0.2, 0.1, 0.0, -0.4, 0.2])
    expected = members.log_factors(members.nearest(target))
    rng, seen = np.random.default_rng(1), []

    def score(number, centroid, people):
        seen.append((number, centroid, people))
        offset = rng.normal()
        return [math.nan if p[0] > 0.9 else offset - ((p - target) ** 2).sum() + 0.01 * rng.normal() for p in people]

    centroids = list(adapt(members.scaled(np.full(members.num_parameters, 0.3)), 40, score, 3, (-1.0, 1.0)))
    assert len(centroids) == len(seen) + 1 == 41
    np.testing.assert_array_equal(centroids[0], np.zeros(6))
    np.testing.assert_allclose(np.mean(centroids[-10:], axis=0), expected, atol=0.1)
    for (number, centroid, people), before in zip(seen, centroids, strict=False):
        np.testing.assert_array_equal(centroid, before)
        assert np.abs(people).max() <= 1.0
        assert number == next(i for i, c in enumerate(centroids) if c is before)


@pytest.mark.parametrize(("bend", "distance"), [(0.1, 2.0), (-0.01, np.inf)])
def test_a_parabola_is_fitted_to_what_generations_saw(bend, distance):
    """Each of which has a level of its own that is far larger than what its members differ by."""
    rng, direction = np.random.default_rng(0), np.ones(8) / np.sqrt(8)
    members = [rng.normal(size=(12, 8)) for _ in range(8)]
    values = [
        rng.normal(0, 5) + 0.4 * some @ direction - bend * (some**2).sum(axis=1) + rng.normal(0, 0.1, 12)
        for some in members
    ]
    values[2][3] = np.nan
    found, far = fitted_top(members, values)
    assert found @ direction > 0.95
    assert np.linalg.norm(found) == pytest.approx(1)
    assert far == pytest.approx(distance, rel=0.2)


def test_a_parabola_that_predicts_nothing_is_none():
    rng = np.random.default_rng(1)
    members = [rng.normal(size=(8, 12)) for _ in range(4)]
    assert fitted_top(members, [rng.normal(size=8) for _ in members]) is None
    assert fitted_top(members[:1], [members[0].sum(axis=1)]) is None


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
