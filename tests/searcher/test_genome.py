"""Grid, space and genome: whatever the genes, factors are allowed ones."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fakes import space_of

from peft_layerrope import SearchError
from peft_layerrope.searcher.space import BezierGenome, FactorGrid, default_scaled_layers


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


def test_space_spreads_and_ties():
    space = space_of(6, scaled=(1, 2), sources=(0, 1, 2, 1, 2, 0))
    vector = space.spread([1.3, 1.7])
    assert vector == (1.0, 1.3, 1.7, 1.3, 1.7, 1.0)
    assert space.tie((1.1, 1.2, 1.3, 2.0, 2.0, 2.0)) == (1.1, 1.2, 1.3, 1.2, 1.3, 1.1)
    assert space.tie(vector) == vector


SPACES = {
    "free": space_of(8),
    "some layers": space_of(6, scaled=(2, 3, 5)),
    "one layer": space_of(3, scaled=(1,)),
    "odd grid": space_of(5, grid=FactorGrid(0.7, 3.0, 0.35)),
    "tied": space_of(6, scaled=(0, 1, 2, 3), sources=(0, 1, 2, 3, 3, 2)),
}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_random_genes_are_in_bounds_and_decode_into_the_space(space):
    genome, rng = BezierGenome(space), random.Random(0)
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


@pytest.mark.parametrize("factor", [1.0, 1.3, 2.0])
def test_a_flat_curve_is_one_factor(factor):
    vector = BezierGenome(space_of(6, scaled=(1, 2, 4, 5))).decode([factor] * 4 + [0.2, 0.9])
    assert vector == (1.0, factor, factor, 1.0, factor, factor)


def test_control_points_are_a_curve_over_depth():
    genome, rng = BezierGenome(space_of(5)), random.Random(2)
    for _ in range(20):
        genes = genome.random(rng)
        points = np.array(genome.control_points(genes))
        assert points.shape == (4, 2)
        assert points[[0, 3], 0].tolist() == [0, 1]
        assert points[:, 1].tolist() == genes[:4]
