"""Control points: decoded by hand, moved, clipped, and scored as by hand."""

from __future__ import annotations

import numpy as np
import pytest
from experiment_helpers import FACTORS, GROUPS, by_hand, short_task

from peft_layerrope import LayerRopeConfig
from peft_layerrope.errors import SearchError
from peft_layerrope.experiments import Measuring
from peft_layerrope.experiments.control_points import COORDINATES, genes_of, genome_of, moves, run_control_points
from peft_layerrope.searcher.space import FactorGrid

POINTS = [[0.0, 1.5], [0.5, 2.0], [0.1, 1.9], [1.0, 1.4]]


def bezier_by_hand(points, depth):
    """y where x(t) is `depth`, by trying a great many t."""
    t = np.linspace(0, 1, 400_001)
    weights = [(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3]
    x = sum(w * p[0] for w, p in zip(weights, points, strict=True))
    y = sum(w * p[1] for w, p in zip(weights, points, strict=True))
    return y[np.abs(x - depth).argmin()]


def decoded_by_hand(points, layers, num_layers, low, high, step):
    factors = [1.0] * num_layers
    for index, layer in enumerate(layers):
        value = min(max(bezier_by_hand(points, index / (len(layers) - 1)), low), high)
        factors[layer] = round(low + round((value - low) / step) * step, 10)
    return tuple(factors)


@pytest.mark.parametrize("layers", [[0, 1, 2, 3, 4, 5], [1, 2, 4]])
@pytest.mark.parametrize("grid", [FactorGrid(), FactorGrid(1.0, 3.0, 0.25)])
def test_every_move_is_decoded_as_by_hand(demo_model, layers, grid):
    genome, genes = genome_of(demo_model, layers, grid), genes_of(POINTS)
    found = moves(genome, genes)
    assert [(move.coordinate, move.sign) for move in found] == [(c, s) for c in COORDINATES for s in (1, -1)]
    places = {"y0": (0, 1), "y1": (1, 1), "y2": (2, 1), "y3": (3, 1), "x1": (1, 0), "x2": (2, 0)}
    for move in found:
        point, axis = places[move.coordinate]
        low, high = (0, 1) if axis == 0 else grid.limits
        moved = [list(p) for p in POINTS]
        moved[point][axis] = min(max(moved[point][axis] + 0.3 * move.sign, low), high)
        assert move.after == pytest.approx(moved[point][axis])
        assert move.factors == decoded_by_hand(moved, layers, 6, *grid.limits, grid.step)


def test_moves_are_scored_as_by_hand(demo_model, demo_tokenizer):
    task = short_task(demo_tokenizer)
    config = LayerRopeConfig(layer_factors=FACTORS)
    section = run_control_points(Measuring(demo_model, GROUPS), task, config, POINTS, range(6), FactorGrid())
    curve = by_hand(demo_model, task, section.data["curve_factors"])
    assert section.data["curve_factors"] == list(decoded_by_hand(POINTS, range(6), 6, 1, 2, 0.1))
    for move in section.data["moves"]:
        change = by_hand(demo_model, task, move["layer_factors"]).utilization() - curve.utilization()
        assert move["utilization_change"]["value"] == pytest.approx(change, abs=1e-6)
    final = by_hand(demo_model, task, FACTORS).utilization() - curve.utilization()
    assert section.data["adapter_minus_curve"]["value"] == pytest.approx(final, abs=1e-6)
    unmoved = next(row for row in section.tables[0].rows if row[0] == "y1 2.00, at its limit")
    assert unmoved[1:] == ("as the curve", section.tables[0].rows[0][2], "0", "0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": None}, "has no Bézier control points"),
        ({"points": [[0.1, 1], [0.3, 1], [0.6, 1], [1, 1]]}, "x start at 0"),
        ({"points": [[0, 1], [1.3, 1], [0.6, 1], [1, 1]]}, "x start at 0"),
        ({"layers_to_transform": []}, "must be distinct layer indices"),
        ({"layers_to_transform": [1, 1]}, "must be distinct layer indices"),
        ({"layers_to_transform": [6]}, "must be distinct layer indices"),
    ],
)
def test_adapters_without_a_curve_are_refused(demo_model, demo_tokenizer, changes, message):
    config, curve = (
        LayerRopeConfig(layer_factors=FACTORS),
        {"points": POINTS, "layers_to_transform": range(6)} | changes,
    )
    measuring, task = Measuring(demo_model, GROUPS), short_task(demo_tokenizer)
    with pytest.raises(SearchError, match=message):
        run_control_points(measuring, task, config, grid=FactorGrid(), **curve)
