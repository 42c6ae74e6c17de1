"""Cubic Bézier curves over the depth of a model: control points to factors, as pure functions.

A curve has control points `P0..P3`. x is the normalised depth over the scaled layers (`P0.x = 0`,
`P3.x = 1`), y the factor (arXiv 2503.04355, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BISECTION_STEPS = 60  # halves [0, 1] to below a float64's resolution


def _cubic(p0: float, p1: float, p2: float, p3: float, t: np.ndarray) -> np.ndarray:
    u = 1.0 - t
    return u**3 * p0 + 3 * u**2 * t * p1 + 3 * u * t**2 * p2 + t**3 * p3


def sample_curve(control_points: Sequence[Sequence[float]], num_samples: int) -> np.ndarray:
    """Reads a cubic Bézier curve at equally spaced depths.

    Solves `x(t) = depth` by bisection (inner abscissae within [0, 1] make x(t) monotone) and returns `y(t)`.

    Args:
        control_points: four `(x, y)` pairs; `x` of the first is 0, of the last 1, the inner ones in [0, 1].
        num_samples: number of depths, from 0 to 1 inclusive; a single sample is taken at depth 0.5.

    Returns:
        float64 array of shape `(num_samples,)`.

    Raises:
        ValueError: the control points are not four pairs, not finite, or x(t) would not be monotone.
    """
    points = np.asarray(control_points, dtype=np.float64)
    if points.shape != (4, 2) or not np.isfinite(points).all():
        raise ValueError(f"control_points must be four finite (x, y) pairs, got {control_points!r}.")
    x, y = points[:, 0], points[:, 1]
    if x[0] != 0 or x[3] != 1 or x.min() < 0 or x.max() > 1:
        raise ValueError(f"control points' x must start at 0, end at 1 and stay in [0, 1], got {x.tolist()}.")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1.")
    depths = np.linspace(0.0, 1.0, num_samples) if num_samples > 1 else np.array([0.5])
    low, high = np.zeros_like(depths), np.ones_like(depths)
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        below = _cubic(*x, middle) < depths
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    t = (low + high) / 2
    t = np.where(depths == 0, 0.0, np.where(depths == 1, 1.0, t))  # the ends are exact by definition
    return _cubic(*y, t)
