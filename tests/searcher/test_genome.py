"""Grid, space and genomes: whatever the genes, factors are allowed ones."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fakes import space_of

from peft_layerrope import SearchError
from peft_layerrope.searcher import FactorGrid, default_scaled_layers
from peft_layerrope.searcher.space import CURVES, make_genome


def test_grid_is_the_papers():
    grid = FactorGrid()
    assert grid.values == (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0)
    assert grid.snap([0.2, 1.04, 1.06, 1.349999, 7.0]) == [1.0, 1.0, 1.1, 1.3, 2.0]
    assert FactorGrid(0.5, 3.0, 0.25).values[-1] == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 2.0, 0.1), "min_factor=0.0 must"),
        ((1.0, 2.0, 0.0), "step=0.0 must"),
        ((1.0, 1.0, 0.1), "max_factor=1.0 must be greater than min_factor=1.0"),
        ((1.0, 2.0, 1e-5), "more than 1000 values"),
        ((1.0, 1.5, 1.0), "step=1.0 is larger than the range"),
        ((1.0, float("inf"), 0.1), "max_factor=inf must"),
        ((1.0, 99999.0, 1000.0), "max_factor=99999.0 must"),
    ],
)
def test_grids_that_cannot_work(arguments, message):
    with pytest.raises(SearchError, match=message):
        FactorGrid(*arguments)


@pytest.mark.parametrize(("layers", "first"), [(4, 0), (12, 1), (28, 2), (32, 2), (48, 3), (80, 5)])
def test_default_leaves_two_of_every_32_alone(layers, first):
    assert default_scaled_layers(layers) == tuple(range(first, layers))


def test_space_spreads_restricts_and_ties():
    space = space_of(6, scaled=(1, 2), sources=(0, 1, 2, 1, 2, 0))
    vector = space.spread([1.3, 1.7])
    assert vector == (1.0, 1.3, 1.7, 1.3, 1.7, 1.0)
    assert space.restrict(vector) == [1.3, 1.7]
    assert space.tie((1.1, 1.2, 1.3, 2.0, 2.0, 2.0)) == (1.1, 1.2, 1.3, 1.2, 1.3, 1.1)
    assert space.tie(vector) == vector


SPACES = {
    "free": space_of(8),
    "some layers": space_of(6, scaled=(2, 3, 5)),
    "one layer": space_of(3, scaled=(1,)),
    "odd grid": space_of(5, grid=FactorGrid(0.7, 3.0, 0.35)),
    "tied": space_of(6, scaled=(0, 1, 2, 3), sources=(0, 1, 2, 3, 3, 2)),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_random_genes_are_in_bounds_and_decode_into_the_space(curve, space):
    genome, rng = make_genome(curve, space), random.Random(0)
    low, high = genome.bounds
    extremes = [low, high, [b + 0.5 * (h - b) for b, h in zip(low, high, strict=True)]]
    for genes in [*extremes, *(genome.random(rng) for _ in range(100))]:
        assert all(b <= gene <= h for b, gene, h in zip(low, genes, high, strict=True))
        vector = genome.decode(genes)
        assert len(vector) == space.num_layers
        assert all(vector[layer] in space.grid.values for layer in space.scaled_layers)
        own = {layer for layer, source in enumerate(space.key_sources) if layer == source}
        assert all(vector[layer] == 1.0 for layer in own - set(space.scaled_layers))
        assert all(vector[layer] == vector[source] for layer, source in enumerate(space.key_sources))


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("factor", [1.0, 1.3, 2.0])
def test_a_constant_genome_is_one_factor(curve, factor):
    space = space_of(6, scaled=(1, 2, 4, 5))
    vector = make_genome(curve, space).decode(make_genome(curve, space).constant(factor))
    assert space.restrict(vector) == [factor] * 4


def test_a_constant_outside_the_grid_is_clipped():
    space = space_of(3, grid=FactorGrid(1.2, 1.8, 0.1))
    for curve in CURVES:
        assert make_genome(curve, space).decode(make_genome(curve, space).constant(1.0)) == (1.2,) * 3


def test_a_linear_genome_is_a_line():
    space = space_of(9, scaled=range(2, 9))
    genome, rng = make_genome("linear", space), random.Random(1)
    for _ in range(50):
        first, last = genome.random(rng)
        decoded = np.array(space.restrict(genome.decode([first, last])))
        assert np.abs(decoded - np.linspace(first, last, 7)).max() <= space.grid.step / 2 + 1e-9


def test_a_direct_genome_is_its_factors():
    space = space_of(4, scaled=(0, 2, 3))
    genome = make_genome("direct", space)
    assert genome.decode([1.2, 1.96, 1.51]) == (1.2, 1.0, 2.0, 1.5)
    assert genome.control_points([1.2, 1.96, 1.51]) is None


@pytest.mark.parametrize("curve", ["bezier", "linear"])
def test_control_points_are_a_curve_over_depth(curve):
    genome, rng = make_genome(curve, space_of(5)), random.Random(2)
    for _ in range(20):
        genes = genome.random(rng)
        points = np.array(genome.control_points(genes))
        assert points.shape == (4, 2)
        assert points[0, 0] == 0
        assert points[3, 0] == 1
        ends = genes[0], genes[3 if curve == "bezier" else 1]
        assert points[[0, 3], 1].tolist() == pytest.approx(ends)
