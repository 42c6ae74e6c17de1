"""What `search.json` says, checked: an adapter is a stranger's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ..declaration import converted
from ..errors import LayerRopeError, SearchError
from ..files.untrusted import UntrustedFileError, read_json_object
from ..messages import shown
from ..searcher.grid import FactorGrid
from ..tuner.config import MAX_LAYERS

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
