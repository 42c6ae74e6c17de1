"""Figures as PNG, in one style, from plain results and without matplotlib's global state."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator, SymmetricalLogLocator

from .report import ACCURACY, Unit, printable, unit_of
from .scoring.scores import Interval, PositionScores

UNSCALED = "no scaling"
"""The label whose curve is grey."""

GRAY = "0.55"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which people with any colour vision can tell apart; without its yellow, pale on white."""
_DASHES = ("-", "--", ":")  # one for each round through the colours
_DPI = 180
_WIDTH = 6.0  # inches: letters of 8 points are 8 pixels high where a telephone shows the figure 420 wide
_LINE, _LABEL, _LEGEND = 86, 34, 84  # characters: of a line of the title, of a legend's label and of its line
_LONGEST = 120  # characters of a label
_LEGEND_LINE = 0.17  # inches
_MANY = 5  # curves whose bands are pale


def new_figure(height: float = 4.2, rows: int = 1, columns: int = 1, **settings: object) -> tuple[Figure, list[Axes]]:
    """Returns a figure with its panels, outside of matplotlib's global state."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, **settings).flat)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def plain(text: str, longest: int = _LONGEST) -> str:
    """Returns text, cut short, that matplotlib draws as it is: between dollar signs it would look for formulas."""
    text = printable(text)
    return (text if len(text) <= longest else f"{text[: longest - 1]}…").replace("$", r"\$")


def to_png(figure: Figure, title: str, measured: str) -> bytes:
    """Adds a title, and a legend below the panels, to a figure that always gives the same bytes as PNG."""
    subtitle = textwrap.wrap(plain(measured, 10 * _LINE), _LINE)
    figure.suptitle("\n".join([plain(title), *subtitle]), x=0.01, ha="left", fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        labels = [textwrap.fill(label, _LABEL) for label in labels]
        columns = min(max(_LEGEND // (8 + max(len(line) for label in labels for line in label.splitlines())), 1), 4)
        lines = max(label.count("\n") + 1 for label in labels) * -(-len(labels) // columns)
        figure.set_figheight(figure.get_figheight() + _LEGEND_LINE * (lines - 1))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def unit_axis(axes: Axes, unit: Unit) -> None:
    """Labels the y axis; an accuracy has all of 0 to 100 %."""
    axes.set_ylabel(f"{unit.name} ({unit.symbol})")
    if unit.scale > 1:
        axes.set_ylim(-3, 103)


def relative_positions(positions: Sequence[int]) -> np.ndarray:
    """Positions from 0, the first, to 1, the last."""
    return np.interp(positions, (positions[0], positions[-1]), (0, 1))


def draw_positions(axes: Axes, curves: Mapping[str, PositionScores], relative: bool = True, band: bool = True) -> None:
    """Draws scores of one measure over the position, one line per label, the one called `UNSCALED` in grey.

    With `relative` positions run from 0, the first, to 1, the last; a `band` is the 95 % intervals.
    """
    alpha = 0.07 if len(curves) > _MANY else 0.15
    styles = ((color, dash) for dash in cycle(_DASHES) for color in COLORS)
    for number, (label, scores) in enumerate(curves.items()):
        color, dash = (GRAY, "-") if label == UNSCALED else next(styles)
        unit = unit_of(scores.measure)
        x = relative_positions(scores.positions) if relative else scores.positions
        if band:
            _, low, high = _ends(scores.intervals(), unit)
            axes.fill_between(x, low, high, color=color, alpha=alpha, linewidth=0)
        width = max(2.6 - 0.4 * number, 1.4)  # so that lines that coincide can be told
        y = unit.shown(scores.value_by_position)
        axes.plot(x, y, "o", linestyle=dash, linewidth=width, color=color, label=plain(label), markersize=4)
    if relative:
        axes.set_xlabel("place of the answer in the prompt (0: first, 1: last)")
    unit_axis(axes, unit)


def draw_line(
    axes: Axes,
    x: Sequence[float],
    intervals: Iterable[Interval],
    unit: Unit,
    label: str,
    color: str,
    shift: float = 0,
    fmt: str = "o-",
) -> None:
    """Draws means with their intervals as bars; an infinite one has no bar."""
    middle, low, high = _ends(intervals, unit)
    low, high = np.where(np.isnan(low), middle, low), np.where(np.isnan(high), middle, high)
    bars = {"yerr": [middle - low, high - middle], "elinewidth": 1, "capsize": 2}
    axes.errorbar(np.asarray(x) + shift, middle, fmt=fmt, color=color, label=plain(label), markersize=4, **bars)


def _ends(intervals: Iterable[Interval], unit: Unit) -> np.ndarray:
    """Value, low and high as drawn, of shape `(3, N)`; NaN for what is infinite."""
    ends = np.array([unit.shown_interval(interval) for interval in intervals]).T
    return np.where(np.isfinite(ends), ends, np.nan)


def plot_by_position(curves: Mapping[str, PositionScores], subtitle: str) -> bytes:
    """Draws accuracy or loss with its 95 % bands over the position, as PNG; see [`draw_positions`]."""
    figure, (axes,) = new_figure()
    draw_positions(axes, curves, relative=False)
    if next(iter(curves.values())).measure == "loss":
        axes.set_xlabel("position of the token in the window (first of its bucket)")
        return to_png(figure, "Loss by position of the token", subtitle)
    axes.set_xlabel("position of the answer in the context")
    return to_png(figure, "Accuracy by position of the answer", subtitle)


def plot_gain_over_harm(
    points: Mapping[str, tuple[Interval, Interval]], bound: float | None, subtitle: str, unit: Unit = ACCURACY
) -> bytes:
    """Draws what choices of factors gain on the task over what they cost on ordinary text, as PNG.

    A label's point is its harm in nats and its gain in steps of `unit`, each with its interval; the one called
    `UNSCALED` is grey. A `bound` of the harm is drawn as a line.
    """
    figure, (axes,) = new_figure()
    axes.axhline(0, color=GRAY, linewidth=0.8)
    if bound is not None:
        axes.axvline(bound, color=GRAY, linestyle=":", linewidth=1, label=f"bound, {bound:g} nats")
    colors = iter(COLORS)
    for label, (harm, gain) in points.items():
        color = GRAY if label == UNSCALED else next(colors)
        across, along = ([[max(0.0, i.value - i.low)], [max(0.0, i.high - i.value)]] for i in (harm, gain))
        style = {"fmt": "o", "color": color, "markersize": 5, "linewidth": 1, "label": label}
        axes.errorbar(harm.value, gain.value, along, across, **style)
    # close to 0 the axis is linear, and far from it a factor that ruins the text does not push the others together
    linear = bound if bound is not None else 0.01
    axes.set_xscale("symlog", linthresh=linear)
    axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel=f"harm to ordinary text (nats; logarithmic beyond {linear:g})",
        ylabel=f"gain over no scaling ({unit.step})",
    )
    return to_png(figure, "Gain on the task, harm to ordinary text", subtitle)


def plot_factors_by_depth(
    factors: Sequence[float],
    *,
    control_points: Sequence[Sequence[float]] | None = None,
    scaled_layers: Sequence[int] | None = None,
) -> bytes:
    """Draws the factor of every layer, and the Bézier curve that they are read off, as PNG: of four `(x, y)` control
    points, where x runs over `scaled_layers`, by default all.
    """
    figure, (axes,) = new_figure()
    layers = range(len(factors))
    axes.bar(layers, factors, width=0.6, color=COLORS[0], alpha=0.8, label="factor of the layer")
    if control_points is not None:
        spanned = scaled_layers or layers
        points = [(spanned[0] + x * (spanned[-1] - spanned[0]), y) for x, y in control_points]
        curve = Path(points, [Path.MOVETO, *[Path.CURVE4] * 3])
        axes.add_patch(PathPatch(curve, fill=False, edgecolor=COLORS[1], label="Bézier curve"))
        axes.plot(*zip(*points, strict=True), "s:", color=GRAY, markersize=4, label="control points")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="layer", ylabel="factor")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    return to_png(figure, "RoPE scaling factor by depth", "1.0 leaves a layer as it was trained")
