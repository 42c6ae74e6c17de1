"""How much each coordinate of an adapter's Bézier curve matters: moved a little, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..comparison.candidates import Candidate
from ..errors import SearchError
from ..plots import COLORS, new_figure, to_png
from ..report import NATS, Table, Unit, format_factors, legend, unit_of
from ..scoring.scores import Interval
from ..searcher.settings import SearchSettings
from ..searcher.space import BezierGenome, FactorGrid, Factors
from ..tasks.base import Task
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import find_stack
from . import (
    Measuring,
    factor_vector,
    in_force,
    json_data,
    log_prob_difference,
    utilization_difference,
    with_factors,
)
from .section import Section, SectionFigure

NAME = "control-points"
STEP = 0.3
COORDINATES = ("y0", "y1", "y2", "y3", "x1", "x2")
"""The free coordinates, in the order of the search's genes."""


@dataclass(frozen=True)
class Move:
    """One coordinate moved."""

    coordinate: str
    sign: int  # up (1) or down (-1)
    before: float  # its value on the curve
    after: float  # its value now; the same where the curve is at its limit
    factors: Factors  # what the moved curve means

    @property
    def label(self) -> str:
        """For people."""
        to = ", at its limit" if self.after == self.before else f" → {self.after:.2f}"
        return f"{self.coordinate} {self.before:.2f}{to}"


Points = Sequence[Sequence[float]]
"""The four `(x, y)` of a curve, as `search.json` has them."""


def is_curve(points: Points | None) -> bool:
    """Whether there are control points, and they are of a curve over depth."""
    x = [point[0] for point in points or ()]
    return bool(x) and (x[0], x[3]) == (0, 1) and min(x) >= 0 and max(x) <= 1


def genes_of(points: Points | None) -> list[float]:
    """Returns the curve's free coordinates in the search's order; raises SearchError if the adapter has no control
    points, or they are no curve over depth.
    """
    if not is_curve(points):
        raise SearchError(
            f"the adapter has no Bézier control points whose x start at 0, end at 1 and stay between, got "
            f"control_points={points}: there is no curve to move."
        )
    (_, y0), (x1, y1), (x2, y2), (_, y3) = points
    return [y0, y1, y2, y3, x1, x2]


def genome_of(model: nn.Module, layers_to_transform: Sequence[int] | None, grid: FactorGrid) -> BezierGenome:
    """Returns what decodes a curve over these layers, by default the paper's choice, as a search did; raises
    SearchError if they are not the model's.
    """
    settings = SearchSettings(algorithm="paper", grid=grid, layers_to_transform=layers_to_transform)
    return BezierGenome(settings.space(find_stack(model).key_sources))


def moves(genome: BezierGenome, genes: list[float], step: float = STEP) -> list[Move]:
    """Returns each coordinate moved up and down by `step`, at most to its bound."""
    found = []
    for index, (coordinate, gene, low, high) in enumerate(zip(COORDINATES, genes, *genome.bounds, strict=True)):
        for sign in (1, -1):
            # the curve's own value may lie outside of the range, if that was given anew: then it stays where it is
            after = min(max(gene + sign * step, min(low, gene)), max(high, gene))
            moved = [*genes[:index], after, *genes[index + 1 :]]
            found.append(Move(coordinate, sign, gene, after, genome.decode(moved)))
    return found


def run_control_points(
    measuring: Measuring,
    task: Task,
    config: LayerRopeConfig,
    points: Points | None,
    layers_to_transform: Sequence[int] | None,
    grid: FactorGrid,
    step: float = STEP,
) -> Section:
    """Moves each free coordinate of the Bézier curve up and down and measures what changes.

    The curve lies over `layers_to_transform`, and is decoded as the search did that chose from `grid`, so a move
    that changes no factor there changes nothing.
    """
    model = measuring.model
    genes, genome = genes_of(points), genome_of(model, layers_to_transform, grid)
    final = tuple(factor_vector(model, config))
    if not step > 0:
        raise SearchError(f"step={step} must be positive.")
    curve, tried = genome.decode(genes), moves(genome, genes, step)
    split = measuring.split(task)
    vectors = (curve, final, *(move.factors for move in tried))
    configs = {format_factors(vector): with_factors(model, config, vector) for vector in vectors}
    by_label = measuring.scores(split, list(map(Candidate.of_config, configs, configs.values())), NAME)
    scores = {vector: by_label[format_factors(vector)] for vector in vectors}
    changes = {vector: utilization_difference(of_one, scores[curve]) for vector, of_one in scores.items()}
    unit, measured = unit_of(split.measure), measuring.described(task, split)
    rows = [("the curve itself", format_factors(curve), unit.value(scores[curve].utilization()), "", "")]
    for label, vector in [("the adapter's factors", final), *((move.label, move.factors) for move in tried)]:
        factors, gaps = "as the curve", ("0", "0")
        if vector != curve:
            nats = log_prob_difference(scores[vector], scores[curve])
            factors, gaps = format_factors(vector), (unit.change(changes[vector]), NATS.change(nats))
        rows.append((label, factors, unit.value(scores[vector].utilization()), *gaps))
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
        data=json_data(
            task=task,
            split=split,
            curve_factors=curve,
            adapter_factors=final,
            adapter_minus_curve=changes[final],
            moves=[
                {
                    "coordinate": move.coordinate,
                    "from": move.before,
                    "to": move.after,
                    "layer_factors": move.factors,
                    "utilization_change": changes[move.factors],
                }
                for move in tried
            ],
            utilization={label: round(of_one.utilization(), 6) for label, of_one in by_label.items()},
        ),
    )


def _findings(
    tried: list[Move], changes: dict[Factors, Interval], curve: Factors, final: Factors, unit: Unit
) -> list[str]:
    worse = [move for move in tried if changes[move.factors].high < 0]
    better = [move for move in tried if changes[move.factors].low > 0]
    idle = [move for move in tried if move.factors == curve]
    lines = []
    for found, word, extreme in ((worse, "worse", min), (better, "better", max)):
        if found:
            most = extreme(found, key=lambda move: changes[move.factors].value)
            lines.append(
                f"{len(found)} of {len(tried)} moves make it {word} beyond noise, {most.label} the most: "
                f"{unit.change_in_words(changes[most.factors])}."
            )
    if not lines:
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
        y = order.index(move.coordinate) + 0.2 * move.sign
        value, low, high = unit.shown_interval(changes[move.factors])
        axes.barh(y, value, height=0.38, color=COLORS[1] if move.sign > 0 else COLORS[0], alpha=0.85)
        axes.errorbar(value, y, xerr=[[value - low], [high - value]], color="0.25", elinewidth=1, capsize=2)
        axes.annotate(
            f"{move.after:.2f}", (1, y), (4, 0), ("axes fraction", "data"), "offset points", fontsize=7, va="center"
        )
    axes.axvline(0, color="black", linewidth=0.8)
    values = {move.coordinate: move.before for move in tried}
    axes.set_yticks(range(len(order)), [f"{coordinate} = {values[coordinate]:.2f}" for coordinate in order])
    axes.set_xlabel(f"change of {'U' if unit.scale > 0 else unit.name} ({unit.step}); right: the value moved to")
    axes.barh(0, 0, color=COLORS[1], label="moved up")
    axes.barh(0, 0, color=COLORS[0], label="moved down")
    caption = "Change of U when one coordinate of the curve is moved; lines: paired 95 % intervals over contexts."
    return SectionFigure("tornado", caption, to_png(figure, "Each control point, moved", measured))
