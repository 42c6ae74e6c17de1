"""Curves against closed forms and a dense brute-force evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from peft_layerrope.searcher.space import sample_curve


def test_a_straight_line_is_linear_in_depth():
    points = [(0, 1.0), (1 / 3, 4 / 3), (2 / 3, 5 / 3), (1, 2.0)]
    np.testing.assert_allclose(sample_curve(points, 11), np.linspace(1, 2, 11), atol=1e-12)


def test_flat_curve_is_constant_whatever_the_abscissae():
    np.testing.assert_allclose(sample_curve([(0, 1.5), (0.9, 1.5), (0.1, 1.5), (1, 1.5)], 7), 1.5)


@pytest.mark.parametrize("inner", [(0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.2, 0.9)])
def test_matches_brute_force(inner):
    points = np.array([(0, 1.0), (inner[0], 2.0), (inner[1], 0.5), (1, 1.7)])
    t = np.linspace(0, 1, 2_000_001)[:, None]
    dense = (
        (1 - t) ** 3 * points[0] + 3 * (1 - t) ** 2 * t * points[1] + 3 * (1 - t) * t**2 * points[2] + t**3 * points[3]
    )
    depths = np.linspace(0, 1, 9)
    expected = np.interp(depths, dense[:, 0], dense[:, 1])
    np.testing.assert_allclose(sample_curve(points, 9), expected, atol=2e-3)


def test_ends_are_exact():
    values = sample_curve([(0, 1.1), (0, 9.0), (1, 9.0), (1, 1.9)], 5)
    assert (values[0], values[-1]) == (1.1, 1.9)


def test_single_sample_is_the_middle():
    assert sample_curve([(0, 1.0), (1 / 3, 4 / 3), (2 / 3, 5 / 3), (1, 2.0)], 1) == pytest.approx([1.5])
