"""Plots as PNG, from plain results and without matplotlib's global state."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .bezier import sample_curve
from .scoring.scores import Interval, PositionScores

UNSCALED = "no scaling"
"""The label whose curve is grey."""

_DPI = 150
_GREY = "0.55"
# Okabe and Ito's palette, which people with any colour vision can tell apart; without its yellow, pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":")  # one for each round through the colours
_INSIDE = 5  # curves whose legend fits into the plot
_LINE, _LABEL = 105, 26  # characters


def plot_by_position(curves: Mapping[str, PositionScores], path: str | Path, subtitle: str) -> None:
    """Draws accuracy (with 95 % Wilson bands) or loss (with 95 % bands over windows) over the position, as PNG.

    Args:
        curves: label to scores, all of one measure; the one called `UNSCALED` is grey.
        path: file to write.
        subtitle: what was measured, under the title.
    """
    outside = len(curves) > _INSIDE
    figure = Figure(figsize=(9.4 if outside else 7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    alpha = 0.07 if outside else 0.13  # of many bands
    styles = ((colour, dash) for dash in cycle(_DASHES) for colour in _COLOURS)
    for label, scores in curves.items():
        colour, dash = (_GREY, "-") if label == UNSCALED else next(styles)
        values, low, high = _band(scores)
        axes.fill_between(scores.positions, low, high, color=colour, alpha=alpha, linewidth=0)
        name = "\n".join(textwrap.wrap(label, _LABEL))
        axes.plot(scores.positions, values, marker="o", linestyle=dash, color=colour, label=name, markersize=4)
    if next(iter(curves.values())).measure == "loss":
        axes.set(xlabel="position of the token in the window (first of its bucket)", ylabel="loss (nats)")
        title = "Loss by position of the token"
    else:
        axes.set(xlabel="position of the answer in the context", ylabel="accuracy (%)", ylim=(-3, 103))
        title = "Accuracy by position of the answer"
    _finish(figure, axes, title, subtitle, path, outside)


def _band(scores: PositionScores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, low and high as drawn; the interval of a single window, which is infinite, is left out."""
    scale = -1 if scores.measure == "loss" else 100
    rows = np.array([(i.value, i.low, i.high) for i in scores.intervals()])
    value, one, other = (scale * np.where(np.isfinite(rows), rows, np.nan)).T
    return value, np.minimum(one, other), np.maximum(one, other)


def plot_gain_over_harm(
    points: Mapping[str, tuple[Interval, Interval]], bound: float | None, path: str | Path, subtitle: str
) -> None:
    """Draws what choices of factors gain on the task over what they cost on ordinary text, as PNG.

    Args:
        points: label to harm in nats and gain in points, each with its interval; the one called `UNSCALED` is grey.
        bound: of the harm, drawn as a line; None: none.
        path: file to write.
        subtitle: what was measured, under the title.
    """
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=_GREY, linewidth=0.8)
    if bound is not None:
        axes.axvline(bound, color=_GREY, linestyle=":", linewidth=1, label=f"bound, {bound:g} nats")
    colours = iter(_COLOURS)
    for label, (harm, gain) in points.items():
        colour = _GREY if label == UNSCALED else next(colours)
        ends = [
            [[max(0.0, interval.value - interval.low)], [max(0.0, interval.high - interval.value)]]
            for interval in (harm, gain)
        ]
        axes.errorbar(
            harm.value, gain.value, *reversed(ends), fmt="o", color=colour, markersize=5, linewidth=1, label=label
        )
    # close to 0 the axis is linear, and far from it a factor that ruins the text does not push the others together
    axes.set_xscale("symlog", linthresh=bound if bound is not None else 0.01)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="harm to ordinary text (nats)", ylabel="gain over no scaling (points)")
    _finish(figure, axes, "Gain on the task, harm to ordinary text", subtitle, path)


def plot_factors_by_depth(
    factors: Sequence[float],
    path: str | Path,
    *,
    control_points: Sequence[Sequence[float]] | None = None,
    scaled_layers: Sequence[int] | None = None,
) -> None:
    """Draws the factor of every layer, and the Bézier curve that the search came from, as PNG.

    Args:
        factors: one per layer.
        path: file to write.
        control_points: four `(x, y)` points; x runs over `scaled_layers`.
        scaled_layers: layers that the curve spans; default: all.
    """
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    layers = list(range(len(factors)))
    axes.bar(layers, factors, width=0.6, color="tab:blue", alpha=0.8, label="factor of the layer")
    if control_points is not None:
        spanned = list(scaled_layers) if scaled_layers is not None else layers
        depth = np.linspace(spanned[0], spanned[-1], 200)
        axes.plot(depth, sample_curve(control_points, 200), color="tab:orange", label="Bézier curve before refinement")
        x = [spanned[0] + point[0] * (spanned[-1] - spanned[0]) for point in control_points]
        axes.plot(x, [point[1] for point in control_points], "s:", color=_GREY, markersize=4, label="control points")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="layer", ylabel="factor")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    _finish(figure, axes, "RoPE scaling factor by depth", "1.0 leaves a layer as it was trained", path)


def _finish(
    figure: Figure, axes: Axes, title: str, subtitle: str, path: str | Path, legend_outside: bool = False
) -> None:
    lines = textwrap.wrap(subtitle, _LINE)
    axes.set_title(title, loc="left", pad=9 + 11 * len(lines))
    axes.annotate("\n".join(lines), (0, 1), (0, 6), "axes fraction", "offset points", fontsize=8, color="0.35")
    axes.spines[["top", "right"]].set_visible(False)
    beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)} if legend_outside else {}
    axes.legend(frameon=False, fontsize=8, **beside)
    figure.savefig(path, dpi=_DPI)
