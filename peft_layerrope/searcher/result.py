"""What a search returns and writes: the adapter, the held-out table, and `search.json`, which is read here too."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from huggingface_hub import CommitInfo
from peft.utils import CONFIG_NAME
from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from .. import __version__
from ..cards import ACCURACY_PLOT, FACTORS_PLOT, HARM_PLOT, REPORT_NAME, HeldOut, model_card, save_card
from ..declaration import converted
from ..errors import InvalidConfigError, LayerRopeError, SearchError, shown
from ..files import public_name, read_json_object, replacing_files, to_json
from ..hub import push_to_hub
from ..plots import plot_by_position, plot_factors_by_depth, plot_gain_over_harm
from ..report import (
    ACCURACY,
    Table,
    fitness_remark,
    format_factors,
    legend,
    meanings,
    right_answers,
    score_cells,
    times_window,
    unit_of,
)
from ..scoring.preflight import Preflight
from ..scoring.scores import Interval, PositionScores
from ..tasks.base import Measure
from ..tasks.specification import TaskSpecification
from ..tuner.artifacts import check_no_model, save_adapter
from ..tuner.config import MAX_LAYERS, LayerRopeConfig
from .harm import Harm
from .settings import SearchSettings
from .space import FactorGrid, Factors, format_layers

LABELS = {
    "none": "no scaling",
    "uniform": "best uniform factor",
    "uniform_bounded": "uniform within bound",
    "first_and_rest": "first a, rest b",
    "decay": "decay over depth",
    "per_layer": "per layer",
}
NONE, UNIFORM, BOUNDED, FIRST_REST, DECAY, PER_LAYER = LABELS

TIMING_NAME = "timing.json"


@dataclass(frozen=True)
class TableRow:
    """One method on the held-out split."""

    name: str  # key of `LABELS`
    factors: Factors  # that it chose on the search split
    fitness: float  # of the factors, on the search split
    evaluations: int  # distinct vectors it evaluated to choose them
    scores: PositionScores  # held-out
    harm: Harm  # what the factors do to ordinary text

    @property
    def label(self) -> str:
        """Human-readable name."""
        return LABELS[self.name]


@dataclass(frozen=True)
class ResultTable:
    """The held-out comparison: every row scored on the same examples."""

    rows: tuple[TableRow, ...]

    def __iter__(self) -> Iterator[TableRow]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> TableRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; the table has {', '.join(row.name for row in self.rows)}.")

    def __contains__(self, name: object) -> bool:
        return any(row.name == name for row in self.rows)

    def difference(self, name: str, baseline: str) -> Interval:
        """Average accuracy of row `name` minus that of `baseline`, with a paired 95 % interval."""
        return self[name].scores.paired_difference(self[baseline].scores)


_AGAINST = {NONE: "vs none", BOUNDED: "vs uniform"}


class HeldOutTables:
    """The tables and curves of a search, the same of one that has just ended and of what its `search.json` tells.

    Both have a `table` of rows, the `chosen` one, `settings`, `model_window`, and know differences.
    """

    def row(self, name: str | None) -> TableRow | None:
        """Returns the row of a method, or None."""
        return next((row for row in self.table if row.name == name), None)

    def label(self, name: str) -> str:
        """Returns how a row is called in sentences: as the first that has its factors."""
        return next(row.label for row in self.table if row.factors == self.row(name).factors)

    @property
    def against(self) -> tuple[str, ...]:
        """The rows that others are compared with in tables."""
        return tuple(name for name in _AGAINST if self.row(name) is not None)

    def scores_table(self, title: str = "") -> Table:
        """Returns the held-out scores of every candidate, and their paired differences to the simpler ones, where the
        factors differ.
        """
        rows = []
        for row in self.table:
            cells = score_cells(row.scores, ("accuracy", "worst", "U", "loss", "perplexity"))
            others = [name if self.row(name).factors != row.factors else None for name in self.against]
            gaps = [self.difference(row.name, name) if name is not None else None for name in others]
            gains = ["" if gap is None else unit_of(row.scores.measure).gain(gap) for gap in gaps]
            rows.append((row.label, *cells.values(), *gains))
        header = ("candidate", *cells, *(_AGAINST[name] for name in self.against))
        return Table(header, tuple(rows), title, self._legend(header))

    def choice_table(self) -> Table:
        """Returns what each method chose on the search split, and what it does to ordinary text where that is known."""
        harmed = all(row.harm is not None for row in self.table)
        kept = harmed and any(row.harm.kept is not None for row in self.table)
        rows = []
        for row in self.table:
            line = [row.label, str(row.evaluations), f"{row.fitness:.3f}" if math.isfinite(row.fitness) else ""]
            if harmed:
                rise = row.harm.loss_rise
                line += [f"{row.harm.divergence.value:.4f}", f"{rise.value:+.4f}" if rise is not None else "–"]
            if kept:
                line.append(ACCURACY.gain(row.harm.kept) if row.harm.kept is not None else "")
            rows.append((*line, format_factors(row.factors)))
        measured = (("KL", "text loss") if harmed else ()) + (("kept",) if kept else ())
        header = ("candidate", "tried", "fitness", *measured, "factors")
        title = "Found on the search split"
        return Table(header, tuple(rows), title, meanings(header), (0, len(header) - 1))

    def held_out_table(self) -> Table:
        """Returns both side by side, for a model card or a report."""
        scores, choice = self.scores_table(), self.choice_table()
        kept = [i for i, name in enumerate(choice.header) if name not in ("candidate", "fitness")]
        header, *rows = (
            (*left, *(right[i] for i in kept))
            for left, right in zip((scores.header, *scores.rows), (choice.header, *choice.rows), strict=True)
        )
        return Table(header, tuple(rows), "", self._legend(header), (0, len(header) - 1))

    def _legend(self, header: Sequence[str]) -> str:
        first = next(iter(self.table)).scores
        return legend(header, first.measure, right_answers(first), gains=True)

    def _measured(self, task: str, tokens: int, groups: int) -> str:
        return f"{task}, {tokens} tokens{times_window(tokens, self.model_window)}, {groups} held-out contexts"

    def curves_to_plot(self) -> dict[str, PositionScores]:
        """Returns the rows of the accuracy plot: all, but for those whose factors a row before them has."""
        # whose label is their own: of equal factors the first
        return {row.label: row.scores for row in self.table if row.label == self.label(row.name)}


@dataclass(frozen=True)
class SearchResult(HeldOutTables):
    """Result of [`search`].

    Attributes:
        config: the adapter's config, with the factors chosen.
        table: the held-out comparison.
        settings: the search's settings.
        chosen: name of the table's row that `config` holds.
        scaled_layers: indices of the layers that the search was allowed to scale.
        control_points: the four `(x, y)` points of the curve that the factors were read off; None if there is none.
        model_name: name of the base model, free of local paths.
        base: how the base model was loaded: its dtype, and what was asked for beside.
        model_window: the model's trained window in tokens; None if its config does not say.
        task: the task's description.
        splits: descriptions of the search, validation and test split.
        history: one record per generation.
        bound: of the harm to ordinary text, and what that text is.
        timing: seconds by stage: what differs from one run to the next.
        preflight: what the unscaled model wrote before the search; None where nothing is answered in writing.
        notes: what came out and what it took, in sentences.
    """

    config: LayerRopeConfig
    table: ResultTable
    settings: SearchSettings
    chosen: str
    scaled_layers: tuple[int, ...]
    control_points: list[list[float]] | None
    model_name: str
    base: dict[str, Any]
    model_window: int | None
    task: dict[str, Any]
    splits: list[dict[str, Any]]
    history: list[dict[str, Any]]
    bound: dict[str, Any]
    timing: dict[str, Any]
    preflight: Preflight | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the timing as plain values: the content of `search.json`, the same for the same
        search on the same machine.
        """
        return {
            "searcher": "peft_layerrope",
            "searcher_version": __version__,
            "model": public_name(self.model_name),
            "base": self.base,
            "model_window": self.model_window,
            "task": self.task,
            "splits": self.splits,
            "settings": asdict(self.settings),
            "layer_factors": self.config.layer_factors,
            "chosen": self.chosen,
            "control_points": self.control_points,
            "layers_at_edge_of_range": self.edge_layers,
            "table": [self._row_dict(row) for row in self.table],
            "evaluations": {
                "per_layer_search": self.table[PER_LAYER].evaluations,
                "all_methods": sum(row.evaluations for row in self.table),
            },
            "bound": self.bound,
            "preflight": self.preflight.describe() if self.preflight is not None else None,
            "history": self.history,
        }

    def _row_dict(self, row: TableRow) -> dict[str, Any]:
        gaps = {other.name: self.difference(row.name, other.name) for other in self.table if other is not row}
        if self._measure == "loss":  # in the loss itself
            gaps = {name: gap.negated() for name, gap in gaps.items()}
        return {
            "name": row.name,
            "label": row.label,
            "layer_factors": list(row.factors),
            "search_fitness": round(row.fitness, 6) if math.isfinite(row.fitness) else None,
            "evaluations": row.evaluations,
            "test": row.scores.to_dict(),
            "ordinary_text": row.harm.to_dict(),
            f"average_{self._measure}_minus": {name: gap.to_list() for name, gap in gaps.items()},
        }

    @property
    def edge_layers(self) -> list[int]:
        """Scaled layers whose factor is at an end of the range, where a wider one may hold a better value."""
        low, high = self.settings.factor_limits
        factors = self.config.layer_factors
        return [i for i in self.scaled_layers if factors[i] != 1.0 and not low < factors[i] < high]

    @property
    def _measure(self) -> Measure:
        return next(iter(self.table)).scores.measure

    def difference(self, name: str, baseline: str) -> Interval:
        """Average accuracy (or minus the loss) of row `name` minus that of `baseline`, with a paired 95 % interval."""
        return self.table.difference(name, baseline)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the adapter folder: both adapter files, model card, `search.json`, three plots.

        No file tells where on this machine the base model lies. Of a model card that is there already only the
        generated part and its facts change.

        Args:
            directory: created if missing; files of the same names are replaced.

        Raises:
            InvalidConfigError: the folder holds a model; or, once all else is written, the model card that is there
                cannot be read.
            OSError: a file cannot be written; the folder is as it was, or has no `adapter_config.json`.
        """
        folder = Path(directory)
        check_no_model(folder)
        config = copy(self.config)
        config.base_model_name_or_path = base_model = public_name(self.model_name)
        unreadable = None
        with replacing_files(folder, last=CONFIG_NAME) as staging:
            save_adapter(config, staging)
            (staging / REPORT_NAME).write_text(to_json(self.to_dict(), indent=2) + "\n")
            (staging / TIMING_NAME).write_text(to_json(self.timing, indent=2) + "\n")
            (staging / ACCURACY_PLOT).write_bytes(plot_by_position(self.curves_to_plot(), self.subtitle()))
            curve = {"control_points": self.control_points, "scaled_layers": self.scaled_layers}
            (staging / FACTORS_PLOT).write_bytes(plot_factors_by_depth(self.table[self.chosen].factors, **curve))
            harm = self.gain_over_harm(), self.settings.max_harm, self.subtitle(), unit_of(self._measure)
            (staging / HARM_PLOT).write_bytes(plot_gain_over_harm(*harm))
            files = {path.name for place in (folder, staging) for path in place.iterdir()}
            try:
                save_card(model_card(base_model, self.config, self._held_out(), files=files), folder, staging)
            except InvalidConfigError as error:
                unreadable = error
        if unreadable is not None:
            raise unreadable

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Uploads what `save_pretrained` writes, in one commit; `options` are those of [`push_to_hub`], and so is
        what is returned and raised.
        """
        with TemporaryDirectory(prefix="layerrope-") as folder:
            self.save_pretrained(folder)
            return push_to_hub(folder, repo_id, **options)

    def _held_out(self) -> HeldOut:
        """What the model card says of the search."""
        others = [name for name in self.against if name != self.chosen]
        return HeldOut(
            self.table[self.chosen].scores,
            self.task,
            self.subtitle(),
            self.held_out_table().to_markdown(),
            self.remarks(with_time=False),
            {f'"{self.label(name)}"': self.difference(self.chosen, name) for name in others},
            self.base,
        )

    def remarks(self, with_time: bool = True) -> list[str]:
        """Returns what a reader should know beside the table: first the result, then harm, cost and edges."""
        lines = [
            self.notes[0],
            *(self.preflight.remarks() if self.preflight is not None else []),
            *fitness_remark({row.label: row.scores for row in self.table}),
            *self.notes[1:],
        ]
        if with_time:
            since = " since it was resumed" if self.timing.get("resumed") else ""
            lines.append(f"time: {sum(self.timing['seconds'].values()):.0f} s{since}.")
        if self.edge_layers:
            lines.append(
                f"note: the factors of layers {format_layers(self.edge_layers)} are at the edge of the range, "
                "{:g} to {:g}: a wider one may hold better ones.".format(*self.settings.factor_limits)
            )
        return lines

    def subtitle(self) -> str:
        """Says in one line what was measured."""
        test = next(split for split in self.splits if split["name"] == "test")
        return self._measured(self.task["name"], test["max_tokens"], test["groups"])

    def gain_over_harm(self) -> dict[str, tuple[Interval, Interval]]:
        """Returns for each row the harm to ordinary text in nats, and the held-out gain over no scaling in points of
        accuracy or in nats of loss saved.
        """
        points, scale = {}, abs(unit_of(self._measure).scale)
        for row in self.table:
            gain = self.difference(row.name, NONE)
            points[row.label] = row.harm.on_text, Interval(scale * gain.value, scale * gain.low, scale * gain.high)
        return points


_MAX_BYTES = 64 * 2**20  # its history has a line for every generation
_MAX_POSITIONS, _MAX_ROWS = 1000, 50

_Text = Annotated[str, StringConstraints(max_length=200)]
_Factors = Annotated[list[float], Field(min_length=1, max_length=MAX_LAYERS)]
_Values = Annotated[list[float], Field(max_length=_MAX_POSITIONS)]
_Pair = tuple[float, float]
_Number = Annotated[float | None, AfterValidator(lambda value: math.nan if value is None else value)]
_Interval = Annotated[tuple[float | None, float | None, float | None], AfterValidator(Interval.from_list)]
_Intervals = Annotated[dict[_Text, _Interval], Field(max_length=_MAX_ROWS)]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


class RecordedScores(_Checked):
    """Held-out scores of one method: accuracies, or losses; as `PositionScores` sum them up."""

    positions: Annotated[list[int], Field(max_length=_MAX_POSITIONS)]
    accuracy_by_position: _Values | None = None
    accuracy_intervals: Annotated[list[_Pair], Field(max_length=_MAX_POSITIONS)] | None = None
    average_accuracy: float | None = None
    average_accuracy_interval: _Pair | None = None
    utilized: _Number = Field(math.nan, validation_alias=AliasChoices("utilization", "utilisation"))
    average_loss: _Number = math.nan
    average_loss_interval: tuple[float | None, float | None] | None = None
    written: float | None = Field(None, alias="answers_cut_off")

    @property
    def measure(self) -> Measure:
        """Of what the scores are."""
        return "loss" if self.average_accuracy is None else "accuracy"

    def average(self) -> Interval:
        """Accuracy, or minus the loss, averaged over all positions, with its interval."""
        if self.measure == "loss":
            loss = self.average_loss
            return Interval.from_list((loss, *(self.average_loss_interval or (loss, loss)))).negated()
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

    def utilization(self) -> float:
        """Context utilisation of the accuracies."""
        return self.utilized


class RecordedRow(_Checked):
    """One method of the held-out table."""

    name: _Text
    label: _Text
    factors: _Factors = Field(alias="layer_factors")
    fitness: _Number = Field(math.nan, alias="search_fitness")
    evaluations: int
    scores: RecordedScores = Field(alias="test")
    ordinary_text: _Intervals = {}
    average_accuracy_minus: _Intervals = {}
    average_loss_minus: _Intervals = {}

    @property
    def harm(self) -> Harm | None:
        """What the factors do to ordinary text; None where that was not measured."""
        found = self.ordinary_text
        if "divergence" not in found:
            return None
        return Harm(found["divergence"], found.get("loss_rise"), kept=found.get("kept_task"))


class RecordedTask(_Checked):
    """The task's description, as far as it is needed to make it again."""

    name: _Text
    length: int | None = None
    seed: int = 0
    positions: Annotated[list[int], Field(max_length=_MAX_POSITIONS)] = []
    num_keys: int | None = None
    keys: _Text | None = None
    num_documents: int | None = None
    data: _Text | None = None  # the name of a file
    stride: int | None = None
    chat_template: bool | None = None
    chat_template_args: dict[str, Any] | None = None
    system_prompt: str | None = None
    chat_date: _Text | None = None
    max_new_tokens: int | None = None

    def specification(self) -> TaskSpecification:
        """Returns the settings of that task; raises TaskError if there is no such task."""
        own = {one.name: getattr(self, one.name) for one in fields(TaskSpecification) if hasattr(self, one.name)}
        positions = len(self.positions) if self.name != "perplexity" else 0
        return TaskSpecification(**own, num_positions=positions or None, task_seed=self.seed)


class RecordedSplit(_Checked):
    """One split's description."""

    name: _Text
    seed: int
    groups: int
    max_tokens: int


class _Settings(_Checked):
    algorithm: _Text = ""
    layers_to_transform: Annotated[list[int], Field(max_length=MAX_LAYERS)] | None = Field(
        None, validation_alias=AliasChoices("layers_to_transform", "layers")
    )
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
    control_points: Annotated[list[tuple[float, float]], Field(min_length=4, max_length=4)] | None = None
    table: Annotated[list[RecordedRow], Field(min_length=1, max_length=_MAX_ROWS)]
    evaluations: Annotated[dict[_Text, int | None], Field(max_length=_MAX_ROWS)] = {}

    @property
    def grid(self) -> FactorGrid:
        """The factors that the search could choose from."""
        return self.settings.grid.of(self.settings.algorithm)

    @property
    def test(self) -> RecordedSplit | None:
        """The split that the table is from."""
        return next((split for split in self.splits if split.name == "test"), None)

    def difference(self, name: str, baseline: str) -> Interval | None:
        """Average accuracy (or minus the loss) of row `name` minus that of `baseline`, if the file has it."""
        row = self.row(name)
        loss = row.average_loss_minus.get(baseline)
        return loss.negated() if loss is not None else row.average_accuracy_minus.get(baseline)

    def subtitle(self) -> str:
        """Says in one line what was measured."""
        if (test := self.test) is None:
            return self.task.name
        return f"{self._measured(self.task.name, test.max_tokens, test.groups)} (seed {test.seed})"


def read_record(folder: Path) -> SearchRecord:
    """Reads and checks `search.json` in an adapter's folder.

    Raises:
        SearchError: there is none, it is damaged, or its values are not what a search writes.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        raise SearchError(f"{folder} has no {REPORT_NAME}: expected the folder of an adapter that was searched.")
    try:
        values = read_json_object(path, _MAX_BYTES)
    except ValueError as error:
        raise SearchError(f"{path} {error}.") from error
    try:
        known = {name: values[name] for name in SearchRecord.model_fields if name in values}
        record = SearchRecord.model_validate_json(json.dumps(known))  # of JSON, strict checks take lists for tuples
        _check(record)
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
