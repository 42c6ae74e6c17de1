"""How much each coordinate of an adapter's Bézier curve matters: moved a little, one at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..comparison.contenders import Contender
from ..errors import SearchError
from ..plots import COLOURS, new_figure, to_png
from ..report import NATS, Table, Unit, legend, unit_of
from ..scoring.scores import Interval
from ..searcher.space import BezierGenome, FactorGrid, Factors, FactorSpace, default_scaled_layers
from ..tasks import Task
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import find_stack
from .measuring import (
    Measuring,
    factor_vector,
    held_out,
    in_force,
    interval_dict,
    log_prob_difference,
    measure,
    measured_on,
    utilisation_difference,
    with_factors,
)
from .section import Section, SectionFigure

NAME = "control-points"
DEFAULT_GROUPS = 50
STEP = 0.3
COORDINATES = ("y0", "y1", "y2", "y3", "x1", "x2")
"""The free coordinates, in the order of the search's genes."""

_NO_POINTS = (
    "the adapter has no Bézier control points (its factors were searched one by one, or by hand), so there is no curve "
    "to move."
)


@dataclass(frozen=True)
class Move:
    """One coordinate moved.

    Attributes:
        coordinate: which one.
        sign: up (1) or down (-1).
        before: its value on the curve.
        after: its value now; the same where the curve is at its limit.
        factors: what the moved curve means.
    """

    coordinate: str
    sign: int
    before: float
    after: float
    factors: Factors

    @property
    def label(self) -> str:
        """For people."""
        if self.after == self.before:
            return f"{self.coordinate} {self.before:.2f}, at its limit"
        return f"{self.coordinate} {self.before:.2f} → {self.after:.2f}"


def genes_of(config: LayerRopeConfig) -> list[float]:
    """Returns the curve's free coordinates in the search's order.

    Raises:
        SearchError: the adapter has no control points, or they are no curve over depth.
    """
    if config.control_points is None:
        raise SearchError(_NO_POINTS)
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = config.control_points
    if (x0, x3) != (0.0, 1.0) or not (0 <= x1 <= 1 and 0 <= x2 <= 1):
        raise SearchError(f"control_points={config.control_points}: x must start at 0, end at 1 and stay in [0, 1].")
    return [y0, y1, y2, y3, x1, x2]


def genome_of(model: nn.Module, config: LayerRopeConfig, grid: FactorGrid) -> BezierGenome:
    """Returns what decodes the adapter's curve as its search did.

    Raises:
        SearchError: its scaled layers are not the model's.
    """
    key_sources = find_stack(model).key_sources
    scaled = config.scaled_layers
    if scaled is None:
        scaled = [layer for layer in default_scaled_layers(len(key_sources)) if key_sources[layer] == layer]
    if not scaled or len(set(scaled)) != len(scaled) or max(scaled) >= len(key_sources):
        raise SearchError(f"scaled_layers={scaled} must be distinct layers of the model's {len(key_sources)}.")
    return BezierGenome(FactorSpace(grid, tuple(scaled), key_sources))


def moves(genome: BezierGenome, genes: list[float], step: float = STEP) -> list[Move]:
    """Returns each coordinate moved up and down by `step`, at most to its bound."""
    found = []
    lows, highs = genome.bounds
    for index, coordinate in enumerate(COORDINATES):
        for sign in (1, -1):
            # the curve's own value may lie outside of the range, if that was given anew: then it stays where it is
            low, high = min(lows[index], genes[index]), max(highs[index], genes[index])
            after = min(max(genes[index] + sign * step, low), high)
            moved = [*genes[:index], after, *genes[index + 1 :]]
            found.append(Move(coordinate, sign, genes[index], after, genome.decode(moved)))
    return found


def run_control_points(
    model: nn.Module,
    task: Task,
    config: LayerRopeConfig,
    *,
    grid: FactorGrid | None = None,
    step: float = STEP,
    num_groups: int = DEFAULT_GROUPS,
    measuring: Measuring | None = None,
) -> Section:
    """Moves each free coordinate of the adapter's Bézier curve up and down and measures what changes.

    The curve is decoded as the search does, so a move that changes no factor on the grid changes nothing.

    Args:
        model: a transformers causal language model; left as it was found.
        task: where the examples come from.
        config: the adapter, with its control points.
        grid: the factors that the search could choose from; default: the search's default.
        step: how far a coordinate is moved.
        num_groups: held-out contexts.
        measuring: how to measure.

    Raises:
        SearchError: the adapter has no control points, or its scaled layers are not the model's.
        AdapterMismatchError: the adapter is for another number of layers.
        TaskError: the task cannot give the contexts.
    """
    genes, genome = genes_of(config), genome_of(model, config, grid or FactorGrid())
    final = tuple(factor_vector(model, config))
    if not step > 0:
        raise SearchError(f"step={step} must be positive.")
    curve, tried = genome.decode(genes), moves(genome, genes, step)
    split = held_out(task, num_groups)
    vectors = dict.fromkeys([curve, final, *(move.factors for move in tried)])
    contenders = [Contender.of_config(_label(v), with_factors(model, config, v)) for v in vectors]
    by_label = measure(model, split, contenders, NAME, measuring or Measuring())
    scores = {vector: by_label[_label(vector)] for vector in vectors}
    changes = {vector: utilisation_difference(of_one, scores[curve]) for vector, of_one in scores.items()}
    unit, measured = unit_of(split.measure), measured_on(model, task, split)
    rows = [("the curve itself", _label(curve), unit.value(scores[curve].utilisation()), "", "")]
    for label, vector in [("the adapter's factors", final), *((move.label, move.factors) for move in tried)]:
        same = vector == curve
        rows.append(
            (
                label,
                "as the curve" if same else _label(vector),
                unit.value(scores[vector].utilisation()),
                "0" if same else unit.change(changes[vector]),
                "0" if same else NATS.change(log_prob_difference(scores[vector], scores[curve])),
            )
        )
    header = ("moved", "factors", "U" if split.measure == "accuracy" else unit.name, "Δ", "Δ gold log-prob's U")
    caption = (
        f"Each coordinate moved by ±{step:g}, at most to its limit, and rounded to the grid as in the search. Δ: to "
        "the curve itself. " + legend(header, split.measure)
    )
    return Section(
        name=NAME,
        title="Sensitivity of the curve's control points",
        question="How much does the result depend on each coordinate of the Bézier curve?",
        measured=measured + in_force(config),
        findings=tuple(_findings(tried, changes, curve, final, unit)),
        tables=(Table(header, tuple(rows), caption=caption, text_columns=(0, 1)),),
        figures=(_tornado(tried, changes, unit, measured),),
        data={
            "task": task.describe(),
            "split": split.describe(),
            "curve_factors": list(curve),
            "adapter_factors": list(final),
            "adapter_minus_curve": interval_dict(changes[final]),
            "moves": [_move_dict(move, changes[move.factors]) for move in tried],
            "utilisation": {_label(vector): round(of_one.utilisation(), 6) for vector, of_one in scores.items()},
        },
    )


def _findings(
    tried: list[Move], changes: dict[Factors, Interval], curve: Factors, final: Factors, unit: Unit
) -> list[str]:
    worse = [move for move in tried if changes[move.factors].high < 0]
    better = [move for move in tried if changes[move.factors].low > 0]
    idle = [move for move in tried if move.factors == curve]
    lines = []
    if worse:
        worst = min(worse, key=lambda move: changes[move.factors].value)
        lines.append(
            f"{len(worse)} of {len(tried)} moves make it worse beyond noise, {worst.label} the most: "
            f"{unit.change_in_words(changes[worst.factors])}."
        )
    if better:
        best = max(better, key=lambda move: changes[move.factors].value)
        lines.append(
            f"{len(better)} of {len(tried)} moves make it better beyond noise, {best.label} the most: "
            f"{unit.change_in_words(changes[best.factors])}."
        )
    if not worse and not better:
        lines.append(f"None of {len(tried)} moves makes a difference beyond noise.")
    if idle:
        lines.append(f"{len(idle)} moves change no factor: they are rounded away, or the coordinate is at its limit.")
    if final != curve:
        lines.append(f"The adapter's own factors: {unit.change_in_words(changes[final])} against it.")
    return [*lines, "Each interval holds by itself: of moves that do nothing, one in twenty looks as if it did."]


def _tornado(tried: list[Move], changes: dict[Factors, Interval], unit: Unit, measured: str) -> SectionFigure:
    figure, (axes,) = new_figure(height=3.8)

    def spread(coordinate: str) -> float:
        return max(abs(changes[move.factors].value) for move in tried if move.coordinate == coordinate)

    order = sorted(COORDINATES, key=spread)
    for move in tried:
        change, y = changes[move.factors], order.index(move.coordinate) + 0.2 * move.sign
        value, low, high = unit.shown([change.value, change.low, change.high])
        low, high = min(low, high), max(low, high)
        axes.barh(y, value, height=0.38, color=COLOURS[1] if move.sign > 0 else COLOURS[0], alpha=0.85)
        axes.errorbar(value, y, xerr=[[value - low], [high - value]], color="0.25", elinewidth=1, capsize=2)
        axes.annotate(
            f"{move.after:.2f}", (1, y), (4, 0), ("axes fraction", "data"), "offset points", fontsize=7, va="center"
        )
    axes.axvline(0, color="black", linewidth=0.8)
    values = {move.coordinate: move.before for move in tried}
    axes.set_yticks(range(len(order)), [f"{coordinate} = {values[coordinate]:.2f}" for coordinate in order])
    axes.set_xlabel(f"change of {'U' if unit.scale > 0 else unit.name} ({unit.step}); right: the value moved to")
    axes.barh(0, 0, color=COLOURS[1], label="moved up")
    axes.barh(0, 0, color=COLOURS[0], label="moved down")
    caption = "Change of U when one coordinate of the curve is moved; lines: paired 95 % intervals over contexts."
    return SectionFigure("tornado", caption, to_png(figure, "Each control point, moved", measured))


def _move_dict(move: Move, change: Interval) -> dict[str, object]:
    return {
        "coordinate": move.coordinate,
        "from": move.before,
        "to": move.after,
        "layer_factors": list(move.factors),
        "utilisation_change": interval_dict(change),
    }


def _label(factors: Factors) -> str:
    return " ".join(f"{factor:g}" for factor in factors)
