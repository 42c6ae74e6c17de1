"""The searchers on fitness functions whose optimum is known, without a model."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from peft_layerrope import SearchError, SearchSettings
from peft_layerrope.searcher import FactorGrid, default_scaled_layers
from peft_layerrope.searcher import controls as families
from peft_layerrope.searcher.controls import best_of
from peft_layerrope.searcher.evaluator import BudgetView, MemoEvaluator
from peft_layerrope.searcher.genetic import evolve_curve, isolated_random
from peft_layerrope.searcher.genome import BezierGenome
from peft_layerrope.searcher.grid import Factors, spread_over_layers
from peft_layerrope.searcher.refine import refine_by_coordinates

GRID = FactorGrid()


class Distance:
    """Fitness: minus the squared distance to a target; counts what it is asked."""

    def __init__(self, target: Sequence[float]) -> None:
        self.target = target
        self.asked: list[Factors] = []

    def evaluate(self, vectors: Sequence[Factors]) -> list[float]:
        self.asked += vectors
        return [-sum((a - b) ** 2 for a, b in zip(v, self.target, strict=True)) for v in vectors]


def genome(num_layers: int, scaled: Sequence[int] | None = None) -> BezierGenome:
    return BezierGenome(GRID, tuple(scaled if scaled is not None else range(num_layers)), num_layers)


def test_grid_is_the_papers():
    assert GRID.values == (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0)
    assert GRID.snap([0.2, 1.04, 1.06, 1.349999, 7.0]) == [1.0, 1.0, 1.1, 1.3, 2.0]
    assert FactorGrid(0.5, 3.0, 0.25).values[-1] == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 2.0, 0.1), "all three must be positive"),
        ((1.0, 1.0, 0.1), "max_factor=1.0 must be greater than min_factor=1.0"),
        ((1.0, 2.0, 1e-5), "more than 1000 values"),
        ((1.0, 1.5, 1.0), "step=1.0 is larger than the range"),
        ((1.0, float("inf"), 0.1), "all three must be positive"),
    ],
)
def test_grids_that_cannot_work(arguments, message):
    with pytest.raises(SearchError, match=message):
        FactorGrid(*arguments)


@pytest.mark.parametrize(("layers", "first"), [(4, 0), (12, 1), (28, 2), (32, 2), (48, 3), (80, 5)])
def test_default_leaves_two_of_every_32_alone(layers, first):
    assert default_scaled_layers(layers) == tuple(range(first, layers))


def test_decoding_leaves_unscaled_layers_at_one():
    decoded = genome(6, scaled=(2, 3, 5)).decode([1.2, 1.2, 1.2, 1.2, 0.3, 0.6])
    assert decoded == (1.0, 1.0, 1.2, 1.2, 1.0, 1.2) == spread_over_layers([1.2] * 3, (2, 3, 5), 6)


def test_random_genes_stay_in_bounds():
    low, high = genome(8).bounds
    rng = random.Random(0)
    for _ in range(200):
        genes = genome(8).random(rng)
        assert all(b <= g <= h for b, g, h in zip(low, genes, high, strict=True))
        assert set(genome(8).decode(genes)) <= set(GRID.values)


def evolve(target: Sequence[float], seed: int = 0) -> tuple:
    view = BudgetView(MemoEvaluator(Distance(target)))
    curve = evolve_curve(genome(len(target)), view, population=24, generations=12, rng=random.Random(seed))
    return curve, view


def test_evolution_finds_a_curve():
    target = [1.0, 1.1, 1.3, 1.6, 1.8, 1.9, 1.9, 1.7]
    curve, _ = evolve(target)
    assert max(abs(a - b) for a, b in zip(curve.factors, target, strict=True)) <= 0.2
    assert curve.history[-1]["best"] >= curve.history[0]["best"]
    assert (
        genome(8).decode(
            [*[p[1] for p in curve.control_points], curve.control_points[1][0], curve.control_points[2][0]]
        )
        == curve.factors
    )


def test_evolution_is_seeded_and_leaves_global_random_alone():
    random.seed(123)
    before = random.getstate()
    first, again, other = evolve([1.2] * 6, 5), evolve([1.2] * 6, 5), evolve([1.2] * 6, 6)
    assert random.getstate() == before
    random.seed(321)  # the caller's seed does not matter
    assert evolve([1.2] * 6, 5)[0] == first[0] == again[0]
    assert list(other[1].fitness) != list(first[1].fitness)


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


def test_seeds_are_in_the_first_generation():
    inner = Distance([1.4] * 4)
    g = genome(4)
    evolve_curve(
        g,
        BudgetView(MemoEvaluator(inner)),
        population=4,
        generations=0,
        rng=random.Random(0),
        seeds=[g.constant(1.0), g.constant(1.4)],
    )
    assert inner.asked[:2] == [(1.0,) * 4, (1.4,) * 4]


def test_refinement_reaches_a_jagged_optimum_that_no_curve_has():
    target = (1.9, 1.0, 2.0, 1.1, 1.7, 1.0)
    view = BudgetView(MemoEvaluator(Distance(target)))
    assert refine_by_coordinates((1.5,) * 6, view, GRID, range(6), 500) == (target, 0.0)


def test_refinement_keeps_to_its_layers_and_budget():
    view = BudgetView(MemoEvaluator(Distance((2.0,) * 4)))
    start = (1.0,) * 4
    found, fitness = refine_by_coordinates(start, view, GRID, [1, 3], 500)
    assert found == (1.0, 2.0, 1.0, 2.0)
    assert fitness == view.fitness[found]
    view = BudgetView(MemoEvaluator(Distance((2.0,) * 4)))
    refine_by_coordinates(start, view, GRID, range(4), 5)
    assert view.evaluations <= 1 + 5


def test_memo_never_asks_twice_and_views_count_their_own():
    inner = Distance([1.0, 1.0])
    told = []
    memo = MemoEvaluator(inner, lambda vector, fitness: told.append(vector))
    first, second = BudgetView(memo), BudgetView(memo)
    assert first.evaluate([(1.0, 2.0), (1.0, 2.0)]) == [-1.0, -1.0]
    second.evaluate([(1.0, 2.0), (2.0, 2.0)])
    assert inner.asked == told == [(1.0, 2.0), (2.0, 2.0)]
    assert (memo.evaluations, memo.requested) == (2, 4)
    assert (first.evaluations, second.evaluations) == (1, 2)
    assert second.best() == ((1.0, 2.0), -1.0)


def test_control_families():
    assert families.uniform_vectors(GRID, 3)[4] == (1.4, 1.4, 1.4)
    alone = families.first_layers_alone_vectors(GRID, 3)
    assert set(alone) == {(1.0,) * k + (v,) * (3 - k) for k in (1, 2) for v in GRID.values}
    pairs = families.first_and_rest_vectors(GRID, 3)
    assert len(set(pairs)) == 121
    assert (1.3, 1.8, 1.8) in pairs
    drawn = families.random_vectors(GRID, [1], 3, 5, random.Random(0))
    assert all(v[0] == v[2] == 1.0 and v[1] in GRID.values for v in drawn)
    assert len(set(drawn)) == 5
    assert len(families.random_vectors(GRID, [1], 3, 50, random.Random(0))) == 11  # all there are


def test_best_of_respects_the_budget_and_says_so():
    memo = MemoEvaluator(Distance([1.7, 1.2, 1.2]))
    family = families.first_and_rest_vectors(GRID, 3)
    everything = best_of("x", family, memo, 500, random.Random(0))
    assert (everything.factors, everything.evaluations, everything.exhaustive) == ((1.7, 1.2, 1.2), 121, True)
    some = best_of("x", family, memo, 30, random.Random(0))
    assert (some.evaluations, some.exhaustive) == (30, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"population": 3}, "population=3 must be an integer of at least 4."),
        ({"generations": -1}, "generations=-1 must be an integer of at least 0."),
        ({"test_groups": 1}, "test_groups=1 must be an integer of at least 2."),
        ({"seed": 1.5}, "seed=1.5 must be an integer of at least 0."),
        ({"objective": "f1"}, "objective='f1' is unknown, expected one of log_prob, accuracy."),
        ({"rope_type": "yarn"}, "rope_type='yarn' is unknown, expected one of default, linear, dynamic."),
        ({"weights": (1, 2)}, "weights=(1, 2) must be three positive numbers (first, middle, last)."),
    ],
)
def test_settings_that_cannot_work(fields, message):
    with pytest.raises(ValueError, match=r"must|expected") as caught:
        SearchSettings(**fields)
    assert str(caught.value) == message


@pytest.mark.parametrize("layers", [(), (4,), (-1,), (1, 1)])
def test_scaled_layers_must_exist(layers):
    with pytest.raises(SearchError, match="must be distinct layer indices from 0 to 3"):
        SearchSettings(scaled_layers=layers).layers_to_scale(4)
