"""The report page: what it says before any experiment, from the search's own record, and how it is put together."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from .._version import __version__
from ..declaration import converted
from ..errors import LayerRopeError, SearchError
from ..files import UntrustedFileError, read_json_object, write_atomically, writing
from ..messages import shown
from ..plots import plot_factors_by_depth
from ..report import TABLE_LEGEND, format_factors
from ..scoring.scores import Interval
from ..searcher.space import FactorGrid
from ..tuner.config import MAX_LAYERS, LayerRopeConfig
from .control_points import genes_of
from .measuring import ACCURACY, LOSS, Unit, times_window, verdict
from .report_plan import Ran
from .section import (
    COLOURS,
    Section,
    SectionFigure,
    SectionTable,
    escape_markdown,
    legend_below,
    new_figure,
    percent_axis,
    plain,
    relative_positions,
    to_html,
    to_markdown,
    to_png,
)

RECORD_NAME = "search.json"
_MAX_BYTES = 64 * 2**20  # its history has a line for every generation
_MAX_POSITIONS, _MAX_ROWS = 1000, 50

_Text = Annotated[str, StringConstraints(max_length=200)]
_Factors = Annotated[list[float], Field(min_length=1, max_length=MAX_LAYERS)]
_Values = Annotated[list[float], Field(max_length=_MAX_POSITIONS)]
_Pair = tuple[float, float]
_OpenPair = tuple[float | None, float | None]  # an end that is not finite is null


class _Checked(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


class RowScores(_Checked):
    """Held-out scores of one method: accuracies, or losses."""

    positions: Annotated[list[int], Field(max_length=_MAX_POSITIONS)]
    accuracy_by_position: _Values | None = None
    accuracy_intervals: Annotated[list[_Pair], Field(max_length=_MAX_POSITIONS)] | None = None
    average_accuracy: float | None = None
    average_accuracy_interval: _Pair | None = None
    utilisation: float | None = None
    average_loss: float | None = None
    average_loss_interval: _OpenPair | None = None


class Row(_Checked):
    """One method of the held-out table."""

    name: _Text
    label: _Text
    layer_factors: _Factors
    evaluations: int
    test: RowScores
    average_accuracy_minus: Annotated[dict[_Text, tuple[float, float, float]], Field(max_length=_MAX_ROWS)] = {}


class RecordedTask(_Checked):
    """The task's description, as far as it is needed to make it again."""

    name: _Text
    length: int | None = None
    seed: int = 0
    positions: Annotated[list[int], Field(max_length=_MAX_POSITIONS)] = []


class RecordedSplit(_Checked):
    """One split's description."""

    name: _Text
    seed: int
    groups: int
    max_tokens: int


class _Settings(_Checked):
    grid: FactorGrid = FactorGrid()


class SearchRecord(_Checked):
    """A search, as `search.json` tells it."""

    model: _Text
    searcher_version: _Text | None = None
    model_window: int | None = None
    task: RecordedTask
    splits: Annotated[list[RecordedSplit], Field(max_length=20)]
    settings: _Settings = _Settings()
    layer_factors: _Factors
    chosen: _Text
    table: Annotated[list[Row], Field(min_length=1, max_length=_MAX_ROWS)]
    evaluations: Annotated[dict[_Text, int | None], Field(max_length=_MAX_ROWS)] = {}
    better_control: _Text | None = None

    @property
    def grid(self) -> FactorGrid:
        """The factors that the search could choose from."""
        return self.settings.grid

    @property
    def test(self) -> RecordedSplit | None:
        """The split that the table is from."""
        return next((split for split in self.splits if split.name == "test"), None)

    def row(self, name: str | None) -> Row | None:
        """Returns the row of a method, or None."""
        return next((row for row in self.table if row.name == name), None)


def read_record(folder: Path) -> SearchRecord:
    """Reads and checks `search.json` in an adapter's folder.

    Raises:
        SearchError: there is none, it is damaged, or its values are not what a search writes.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        raise SearchError(f"{folder} has no {RECORD_NAME}: expected the folder of an adapter that was searched.")
    try:
        values = read_json_object(path, _MAX_BYTES)
        known = {name: values[name] for name in SearchRecord.model_fields if name in values}
        record = SearchRecord.model_validate_json(json.dumps(known))  # of JSON, strict checks take lists for tuples
        _check(record)
    except UntrustedFileError as error:
        raise SearchError(f"{path} {error}.") from error
    except ValidationError as error:
        raise converted(error, SearchRecord, SearchError, str(path)) from error
    except LayerRopeError as error:
        raise SearchError(f"{path}: {error}") from error
    return record


def _check(record: SearchRecord) -> None:
    """What types cannot say."""
    if record.row(record.chosen) is None:
        raise SearchError(f"chosen={shown(record.chosen)} is no row of its table.")
    for row in record.table:
        scores = row.test
        if scores.average_accuracy is None and "average_loss" not in scores.model_fields_set:
            raise SearchError(f"row {shown(row.name)} has neither an average_accuracy nor an average_loss.")
        curves = (scores.accuracy_by_position, scores.accuracy_intervals)
        if any(curve is not None and len(curve) != len(scores.positions) for curve in curves):
            raise SearchError(f"row {shown(row.name)} has other than {len(scores.positions)} positions.")


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


_FOOTER = (
    "Every section is measured on examples that did not choose the factors, unless it says otherwise. Written by "
    f"peft_layerrope {__version__}."
)


def write_report(
    path: Path, record: SearchRecord, config: LayerRopeConfig, name: str, ran: Ran, command: str, *, markdown: bool
) -> None:
    """Writes the report.

    Args:
        path: the file; Markdown has its pictures in a folder beside it, named as the file without its ending.
        record: the search.
        config: the adapter.
        name: the adapter's name.
        ran: the experiments.
        command: the command line that repeats the report.
        markdown: Markdown instead of HTML.

    Raises:
        WriteError: a file cannot be written.
    """
    head = [held_out_section(record), factors_section(config)]
    title = f"Report on {name}: per-layer RoPE scaling for {record.model}"
    known = [*facts(record, config), ("this report", command)]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if markdown:
            text = _markdown(path.with_suffix(""), title, known, [*head, *ran.sections], ran.skipped)
        else:
            text = to_html(title, known, head, ran.sections, ran.skipped, _FOOTER)
        write_atomically(path, text)


def _markdown(
    folder: Path,
    title: str,
    known: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    skipped: Sequence[tuple[str, str]],
) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [f"# {escape_markdown(title)}\n", _list(known)]
    for section in sections:
        for figure in section.figures:
            (folder / section.figure_file(figure)).write_bytes(figure.png)
        blocks.append(to_markdown(section, f"{quote(folder.name)}/", level=2))
    if skipped:
        blocks.append("## Not run\n\n" + _list(skipped))
    return "\n".join([*blocks, escape_markdown(_FOOTER), ""])


def _list(pairs: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- {escape_markdown(name)}: {escape_markdown(value)}" for name, value in pairs) + "\n"
