"""What a report says before any experiment: the held-out table of the search, and the factors."""

from __future__ import annotations

import io
import math

from ..errors import SearchError
from ..plots import plot_factors_by_depth
from ..report import TABLE_LEGEND, format_factors
from ..scoring.statistics import Interval
from ..tuner.config import LayerRopeConfig
from .control_points import genes_of
from .figures import COLOURS, legend_below, new_figure, percent_axis, plain, relative_positions, to_png
from .measuring import times_window
from .search_record import Row, SearchRecord
from .section import Section, SectionFigure, SectionTable
from .units import ACCURACY, LOSS, Unit, verdict

_NONE, _UNIFORM = "none", "uniform"


def facts(record: SearchRecord, config: LayerRopeConfig) -> list[tuple[str, str]]:
    """What was searched, as names and values."""
    chosen = record.row(record.chosen)
    scaling = config.rope_type if config.rope_type == "default" else f"{config.rope_type}, factor {config.factor:g}"
    tried = record.evaluations.get("all_methods")
    found = [
        ("base model", record.model),
        ("task", f"{record.task.name}{_length(record)}"),
        ("rope type", scaling),
        ("factors by layer", format_factors(config.layer_factors or record.layer_factors)),
        ("chosen", chosen.label if chosen is not None else record.chosen),
        ("range", f"{record.grid.min_factor:g} to {record.grid.max_factor:g} in steps of {record.grid.step:g}"),
    ]
    if tried is not None:
        found.append(("evaluated", f"{tried} distinct factor vectors, all methods together"))
    if record.searcher_version is not None:
        found.append(("searched with", f"peft_layerrope {record.searcher_version}"))
    return found


def held_out_section(record: SearchRecord) -> Section:
    """The held-out table, as the search wrote it."""
    loss = record.table[0].test.average_accuracy is None
    unit = LOSS if loss else ACCURACY
    against = [name for name in dict.fromkeys([_UNIFORM, record.better_control]) if record.row(name) is not None]
    names = {_UNIFORM: "vs uniform"}
    header = ["method", *(["loss"] if loss else ["accuracy", "worst", "U"])]
    header += [names.get(name, "vs control") for name in against] + ["tried", "factors"]
    rows = tuple(
        (
            row.label,
            *_score_cells(row, unit),
            *(_difference(row, name, unit) for name in against),
            str(row.evaluations),
            format_factors(row.layer_factors),
        )
        for row in record.table
    )
    legend = TABLE_LEGEND.format(what="right answers")
    caption = f"tried: distinct factor vectors evaluated on the search split. {legend}"
    test = record.test
    measured = record.task.name
    if test is not None:
        measured += f", {test.max_tokens} tokens{times_window(test.max_tokens, record.model_window)}"
        measured += f", {test.groups} held-out contexts (seed {test.seed})"
    curves = _curves(record, measured)
    return Section(
        name="held-out",
        title="Held-out comparison of the search",
        question="What did each method find on the search split, and how does it do on examples it has not seen?",
        measured=measured,
        findings=tuple(_findings(record, against, unit)),
        tables=(SectionTable(tuple(header), rows, caption=caption, text_columns=(0, len(header) - 1)),),
        figures=(curves,) if curves is not None else (),
    )


def factors_section(config: LayerRopeConfig) -> Section:
    """The factor of every layer, with the curve that it came from where there is one."""
    factors = config.layer_factors or []
    points, layers = config.control_points, config.scaled_layers
    try:
        genes_of(config)
    except SearchError:
        points = None
    if not layers or max(layers) >= len(factors):
        layers = None
    picture = io.BytesIO()
    plot_factors_by_depth(factors, picture, control_points=points, scaled_layers=layers)
    caption = "Factor of every layer" + (", and the Bézier curve before refinement." if points is not None else ".")
    lowest, highest = min(factors), max(factors)
    finding = (
        f"Factors from {lowest:g} to {highest:g}; {sum(factor == 1 for factor in factors)} of {len(factors)} are 1."
    )
    return Section(
        name="factors",
        title="Factors by depth",
        question="",
        measured="",
        findings=(finding,),
        figures=(SectionFigure("depth", caption, picture.getvalue()),),
    )


def _findings(record: SearchRecord, against: list[str], unit: Unit) -> list[str]:
    chosen = record.row(record.chosen)
    gaps = {name: chosen.average_accuracy_minus.get(name) for name in (_NONE, *against)}
    return [
        verdict(f'"{chosen.label}"', f'"{record.row(name).label}"', Interval(*gap), unit)
        for name, gap in gaps.items()
        if gap is not None and record.row(name) is not None
    ]


def _score_cells(row: Row, unit: Unit) -> list[str]:
    scores = row.test
    if scores.average_accuracy is None:
        loss = _number(scores.average_loss, math.nan)
        low, high = scores.average_loss_interval or (loss, loss)
        return [unit.mean(Interval(-loss, -_number(high, math.inf), -_number(low, -math.inf)))]
    average = scores.average_accuracy
    worst = min(scores.accuracy_by_position or [average])
    mean = unit.mean(Interval(average, *(scores.average_accuracy_interval or (average, average))))
    return [mean, unit.value(worst), "" if scores.utilisation is None else unit.value(scores.utilisation)]


def _number(value: float | None, otherwise: float) -> float:
    """What was not finite is null in the record."""
    return otherwise if value is None else value


def _difference(row: Row, name: str, unit: Unit) -> str:
    gap = row.average_accuracy_minus.get(name)
    return "" if gap is None else unit.change(Interval(*gap))


def _curves(record: SearchRecord, measured: str) -> SectionFigure | None:
    """Accuracy by position of the methods worth a line."""
    names = dict.fromkeys([_NONE, _UNIFORM, record.better_control, record.chosen])
    rows = [row for row in map(record.row, names) if row is not None and row.test.accuracy_by_position is not None]
    rows = [row for row in rows if len(set(row.test.positions)) > 1]
    if not rows:
        return None
    figure, (axes,) = new_figure()
    for row, colour in zip(rows, (COLOURS[0], COLOURS[1], COLOURS[3], COLOURS[2]), strict=False):
        x = relative_positions(row.test.positions)
        if row.test.accuracy_intervals is not None:
            low, high = zip(*row.test.accuracy_intervals, strict=True)
            axes.fill_between(x, ACCURACY.shown(low), ACCURACY.shown(high), color=colour, alpha=0.15, linewidth=0)
        y = ACCURACY.shown(row.test.accuracy_by_position)
        axes.plot(x, y, "o-", color=colour, label=plain(row.label), markersize=4)
    axes.set_xlabel("place of the answer in the prompt (0: first, 1: last)")
    percent_axis(axes, ACCURACY)
    legend_below(figure, axes, columns=3)
    caption = "Accuracy over the place of the answer on the held-out split; bands: 95 % Wilson intervals."
    title = "Accuracy by position, held out"
    return SectionFigure("positions", caption, to_png(figure, title, measured))


def _length(record: SearchRecord) -> str:
    if record.task.length is None:
        return ""
    return f", prompts of up to {record.task.length} tokens{times_window(record.task.length, record.model_window)}"
