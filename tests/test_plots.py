"""Plots draw every curve they are given, in the unit of the scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from peft_layerrope import PositionScores
from peft_layerrope.plots import UNSCALED, draw_positions, new_figure, plot_by_position, plot_gain_over_harm, to_png
from peft_layerrope.scoring.scores import Interval


@pytest.fixture
def drawn(monkeypatch):
    """The axes of what was saved."""
    axes = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kw: (axes.append(self.axes[0]), save(self, *args, **kw))
    )
    return axes


def scores(groups: int = 20, measure: str = "accuracy", seed: int = 0) -> PositionScores:
    rng = np.random.default_rng(seed)
    return PositionScores((0, 5, 10), rng.random((groups, 3)) < 0.6, -rng.random((groups, 3)), measure)


@pytest.mark.parametrize("count", [1, 4, 5, 8, 20])
def test_every_curve_is_drawn_and_told_apart(count, drawn):
    curves = {UNSCALED: scores(), **{f"candidate {i}": scores(seed=i) for i in range(1, count)}}
    assert plot_by_position(curves, "a subtitle").startswith(b"\x89PNG")
    lines = drawn[0].get_lines()
    assert [line.get_label() for line in lines] == list(curves)
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == count
    assert to_hex(lines[0].get_color()) == to_hex("0.55")
    for line, found in zip(lines, curves.values(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), 100 * found.accuracy_by_position)
    assert len(drawn[0].collections) == count  # a band each
    legend = drawn[0].figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == list(curves)
    assert legend.get_window_extent().y1 < drawn[0].get_window_extent().y0  # below, where no line runs through it
    assert drawn[0].get_window_extent().height > 300  # and it takes no room from the curves


def test_bands_are_the_intervals(drawn):
    found = scores()
    plot_by_position({"a": found}, "")
    corners = drawn[0].collections[0].get_paths()[0].vertices
    for position, interval in zip(found.positions, found.intervals(), strict=True):
        heights = corners[corners[:, 0] == position][:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((100 * interval.low, 100 * interval.high))


def test_losses_are_drawn_as_losses(drawn):
    found = scores(measure="loss")
    plot_by_position({"a": found}, "words " * 40)
    axes = drawn[0]
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), -found.log_prob.mean(axis=0))
    assert "nats" in axes.get_ylabel()
    assert axes.get_ylim()[1] < 5


def test_a_single_window_has_no_band(drawn):
    plot_by_position({"a": scores(1, "loss")}, "")
    assert np.isfinite(drawn[0].get_ylim()).all()


def test_gain_over_harm_has_each_choice_with_both_intervals(drawn):
    points = {
        UNSCALED: (Interval(0.0, 0.0, 0.0), Interval(0.0, 0.0, 0.0)),
        "one factor": (Interval(0.05, 0.04, 0.07), Interval(8.0, 3.0, 13.0)),
        "per layer": (Interval(0.008, 0.002, 0.014), Interval(6.0, np.nan, np.nan)),
    }
    plot_gain_over_harm(points, 0.01, "a subtitle")
    axes = drawn[0]
    bars = {bar.get_label(): bar for bar in axes.containers}
    assert list(bars) == list(points)
    for label, (harm, gain) in points.items():
        dot = bars[label].lines[0]
        assert (*dot.get_xdata(), *dot.get_ydata()) == (harm.value, gain.value)
    across, along = (line.get_segments()[0] for line in bars["one factor"].lines[2])
    np.testing.assert_allclose(across[:, 0], (0.04, 0.07))
    np.testing.assert_allclose(along[:, 1], (3.0, 13.0))
    assert any(list(line.get_xdata()) == [0.01, 0.01] for line in axes.get_lines())
    # beyond the bound, where steps are no longer equal, there are numbers to read
    assert {0.01, 0.02, 0.05} <= set(axes.get_xticks().round(9))


@pytest.mark.parametrize(("measure", "scale"), [("accuracy", 100), ("loss", -1)])
def test_curves_of_several_lengths_share_an_axis_from_first_to_last(measure, scale):
    figure, (axes,) = new_figure()
    curves = {"short": scores(measure=measure), UNSCALED: replace(scores(measure=measure), positions=(3, 30, 300))}
    draw_positions(axes, curves)
    for line, found, inner in zip(axes.get_lines(), curves.values(), (0.5, 27 / 297), strict=True):
        np.testing.assert_allclose(line.get_xdata(), (0, inner, 1))
        np.testing.assert_allclose(line.get_ydata(), scale * found.value_by_position)
    assert to_png(figure, "a title", "what $was$ measured").startswith(b"\x89PNG")
    assert figure.get_suptitle().splitlines() == ["a title", r"what \$was\$ measured"]
