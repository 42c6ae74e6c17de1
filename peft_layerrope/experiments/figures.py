"""Figures in one style, as PNG in memory."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..scoring.scores import PositionScores
from ..scoring.statistics import Interval
from .units import Unit, unit_of

GREY = "0.5"
COLOURS = (GREY, "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The first is for the model as it is. The others, Okabe and Ito's, can be told apart with any colour vision."""

_DASHES = ("-", "-", "--", ":")
_DPI = 150
_WIDTH = 7.2
_LONGEST = 120  # characters of a label or a title


def new_figure(height: float = 4.2, panels: int = 1, **settings: object) -> tuple[Figure, list[Axes]]:
    """Returns a figure with panels side by side, outside of matplotlib's global state."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, **settings)[0]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def plain(text: str) -> str:
    """Returns text, cut short, that matplotlib draws as it is: between dollar signs it would look for formulas."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return (text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…").replace("$", r"\$")


def to_png(figure: Figure, title: str, measured: str) -> bytes:
    """Puts a title over a figure and returns it as PNG; the same figure gives the same bytes."""
    figure.suptitle(f"{plain(title)}\n{plain(measured)}", x=0.01, ha="left", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def legend_below(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """A legend that no line can run through."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False, fontsize=8
    )


def percent_axis(axes: Axes, unit: Unit) -> None:
    """Labels the y axis; an accuracy has all of 0 to 100 %."""
    axes.set_ylabel(f"{unit.name} ({unit.symbol})")
    if unit.scale > 0:
        axes.set_ylim(-3, 103)


def relative_positions(positions: Sequence[int]) -> np.ndarray:
    """Positions from 0, the first, to 1, the last."""
    values = np.asarray(positions, dtype=np.float64)
    return (values - values[0]) / (values[-1] - values[0])


def draw_positions(axes: Axes, curves: Mapping[str, PositionScores], band: bool = True) -> None:
    """Draws scores over the relative position of the answer, one line per label, with 95 % bands."""
    styles = zip(cycle(COLOURS), cycle(_DASHES), strict=False)
    for (label, scores), (colour, dash) in zip(curves.items(), styles, strict=False):
        unit, x = unit_of(scores.measure), relative_positions(scores.positions)
        if band:
            intervals = scores.intervals()
            edges = np.array([unit.shown([getattr(i, end) for i in intervals]) for end in ("low", "high")])
            axes.fill_between(x, *np.where(np.isfinite(edges), edges, np.nan), color=colour, alpha=0.15, linewidth=0)
        y = unit.shown(scores.value_by_position)
        width = 2.6 if dash == "-" else 1.6  # so that lines that coincide can be told
        axes.plot(x, y, marker="o", linestyle=dash, linewidth=width, color=colour, label=plain(label), markersize=4)
    axes.set_xlabel("place of the answer in the prompt (0: first, 1: last)")
    percent_axis(axes, unit)


def draw_line(
    axes: Axes, x: Sequence[float], intervals: Sequence[Interval], unit: Unit, label: str, colour: str, shift: float = 0
) -> None:
    """Draws means with their intervals as bars."""
    middle = unit.shown([i.value for i in intervals])
    ends = np.sort([unit.shown([i.low for i in intervals]), unit.shown([i.high for i in intervals])], axis=0)
    ends = np.where(np.isfinite(ends), ends, middle)  # an infinite interval has no bar
    axes.errorbar(
        np.asarray(x) + shift,
        middle,
        yerr=[middle - ends[0], ends[1] - middle],
        fmt="o-",
        color=colour,
        label=plain(label),
        markersize=4,
        elinewidth=1,
        capsize=2,
    )
