"""The report page: what it says before any experiment, from the search's own record, and how it is put together."""

from __future__ import annotations

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
from ..plots import plot_by_position, plot_factors_by_depth
from ..report import escape_markdown, format_factors, times_window, unit_of
from ..scoring.scores import Interval
from ..searcher.result import NONE, HeldOutTables
from ..searcher.space import FactorGrid
from ..searcher.verdict import Harm
from ..tasks import Measure
from ..tuner.config import MAX_LAYERS, LayerRopeConfig
from .control_points import genes_of
from .measuring import verdict
from .report_plan import Ran
from .section import Section, SectionFigure, to_html, to_markdown

RECORD_NAME = "search.json"
_MAX_BYTES = 64 * 2**20  # its history has a line for every generation
_MAX_POSITIONS, _MAX_ROWS = 1000, 50

_Text = Annotated[str, StringConstraints(max_length=200)]
_Factors = Annotated[list[float], Field(min_length=1, max_length=MAX_LAYERS)]
_Values = Annotated[list[float], Field(max_length=_MAX_POSITIONS)]
_Pair = tuple[float, float]
_OpenPair = tuple[float | None, float | None]  # what is not finite is null
_OpenTriple = tuple[float | None, float | None, float | None]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


class RowScores(_Checked):
    """Held-out scores of one method: accuracies, or losses; as `PositionScores` sum them up."""

    positions: Annotated[list[int], Field(max_length=_MAX_POSITIONS)]
    accuracy_by_position: _Values | None = None
    accuracy_intervals: Annotated[list[_Pair], Field(max_length=_MAX_POSITIONS)] | None = None
    average_accuracy: float | None = None
    average_accuracy_interval: _Pair | None = None
    utilised: float | None = Field(None, alias="utilisation")
    average_loss: float | None = None
    average_loss_interval: _OpenPair | None = None
    written: float | None = Field(None, alias="answers_cut_off")

    @property
    def measure(self) -> Measure:
        """Of what the scores are."""
        return "loss" if self.average_accuracy is None else "accuracy"

    def average(self) -> Interval:
        """Accuracy, or minus the loss, averaged over all positions, with its interval."""
        if self.measure == "loss":
            loss = _number(self.average_loss, math.nan)
            low, high = self.average_loss_interval or (loss, loss)
            return Interval(-loss, -_number(high, math.inf), -_number(low, -math.inf))
        return Interval(self.average_accuracy, *(self.average_accuracy_interval or [self.average_accuracy] * 2))

    @property
    def value_by_position(self) -> list[float]:
        """Accuracy by position; where that is not known, one value for all."""
        return self.accuracy_by_position or [self.average().value]

    def intervals(self) -> list[Interval]:
        """Accuracy by position with its intervals, which have no width where they are not known."""
        values = self.value_by_position
        limits = self.accuracy_intervals or [(value, value) for value in values]
        return [Interval(value, *ends) for value, ends in zip(values, limits, strict=True)]

    def utilisation(self) -> float:
        """Context utilisation of the accuracies."""
        return _number(self.utilised, math.nan)


class Row(_Checked):
    """One method of the held-out table."""

    name: _Text
    label: _Text
    factors: _Factors = Field(alias="layer_factors")
    search_fitness: float | None = None
    evaluations: int
    scores: RowScores = Field(alias="test")
    ordinary_text: Annotated[dict[_Text, _OpenTriple], Field(max_length=_MAX_ROWS)] = {}
    average_accuracy_minus: Annotated[dict[_Text, tuple[float, float, float]], Field(max_length=_MAX_ROWS)] = {}
    average_loss_minus: Annotated[dict[_Text, _OpenTriple], Field(max_length=_MAX_ROWS)] = {}

    @property
    def fitness(self) -> float:
        """On the search split."""
        return _number(self.search_fitness, math.nan)

    @property
    def harm(self) -> Harm | None:
        """What the factors do to ordinary text; None where that was not measured."""
        found = {name: _interval(values) for name, values in self.ordinary_text.items()}
        return Harm(found["divergence"], found.get("loss_rise")) if "divergence" in found else None


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
    algorithm: _Text = ""
    grid: FactorGrid = FactorGrid()


class SearchRecord(HeldOutTables, _Checked):
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

    def difference(self, name: str, baseline: str) -> Interval | None:
        """Average accuracy (or minus the loss) of row `name` minus that of `baseline`, if the file has it."""
        row = self.row(name)
        if baseline in row.average_loss_minus:
            loss = _interval(row.average_loss_minus[baseline])
            return Interval(-loss.value, -loss.high, -loss.low)
        gap = row.average_accuracy_minus.get(baseline)
        return Interval(*gap) if gap is not None else None

    def subtitle(self) -> str:
        """Says in one line what was measured."""
        if (test := self.test) is None:
            return self.task.name
        times = times_window(test.max_tokens, self.model_window)
        return f"{self.task.name}, {test.max_tokens} tokens{times}, {test.groups} held-out contexts (seed {test.seed})"


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
        scores = row.scores
        if scores.average_accuracy is None and "average_loss" not in scores.model_fields_set:
            raise SearchError(f"row {shown(row.name)} has neither an average_accuracy nor an average_loss.")
        curves = (scores.accuracy_by_position, scores.accuracy_intervals)
        if any(curve is not None and len(curve) != len(scores.positions) for curve in curves):
            raise SearchError(f"row {shown(row.name)} has other than {len(scores.positions)} positions.")


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
    unit = unit_of(record.table[0].scores.measure)
    gaps = {name: record.difference(record.chosen, name) for name in dict.fromkeys([NONE, *record.against])}
    chosen = record.row(record.chosen).label
    curves = {
        label: scores
        for label, scores in record.curves_to_plot().items()
        if scores.accuracy_by_position is not None and len(set(scores.positions)) > 1
    }
    figures = ()
    if curves:
        caption = "Accuracy by position on the held-out split; bands: 95 % Wilson intervals."
        figures = (SectionFigure("positions", caption, plot_by_position(curves, record.subtitle())),)
    return Section(
        name="held-out",
        title="Held-out comparison of the search",
        question="What did each method find on the search split, and how does it do on examples it has not seen?",
        measured=record.subtitle(),
        findings=tuple(
            verdict(f'"{chosen}"', f'"{record.row(name).label}"', gap, unit)
            for name, gap in gaps.items()
            if gap is not None and record.row(name) is not None
        ),
        tables=(record.held_out_table(),),
        figures=figures,
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
    picture = plot_factors_by_depth(factors, control_points=points, scaled_layers=layers)
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
        figures=(SectionFigure("depth", caption, picture),),
    )


def _interval(values: _OpenTriple) -> Interval:
    value, low, high = values
    return Interval(_number(value, math.nan), _number(low, -math.inf), _number(high, math.inf))


def _number(value: float | None, otherwise: float) -> float:
    """What was not finite is null in the record."""
    return otherwise if value is None else value


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
