"""`search.yaml`: everything a search was told, so that it can be repeated exactly. Checked by pydantic."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from .._version import __version__
from ..base_model import ModelSource
from ..declaration import converted, declared
from ..errors import SearchError
from ..files.atomic import write_atomically
from ..files.plain_yaml import parse_yaml
from ..messages import one_line
from ..tasks.specification import TaskSpecification
from .settings import SearchSettings

_MAX_BYTES = 1_000_000


@declared(SearchError)
class SearchSpecification(ModelSource):
    """A search, as a file can hold it: which model and how it is loaded, the task, and the settings."""

    task: Annotated[TaskSpecification, Field(description="Where the examples come from.")] = field(
        default_factory=TaskSpecification
    )
    search: Annotated[SearchSettings, Field(description="The settings.")] = field(default_factory=SearchSettings)

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str) -> SearchSpecification:
        """Makes a specification from plain values; what is missing has its default.

        Args:
            values: nested as this class is.
            source: where they come from, for messages.

        Raises:
            LayerRopeError: an unknown name, with the nearest known one; a value of the wrong type or out of its range.
        """
        try:
            # of JSON, strict checks take lists for tuples and mappings for what they are to make
            return _ADAPTER.validate_json(json.dumps(values, default=str))
        except ValidationError as error:
            raise converted(error, cls, SearchError, source) from None
        except TypeError as error:  # YAML has mappings with lists for names
            raise SearchError(f"{source}: {one_line(error)}.") from error

    def save(self, path: str | Path) -> None:
        """Writes `search.yaml`, every value spelled out."""
        head = f"# layerrope search --config {Path(path).name} --output FOLDER repeats this search (v{__version__}).\n"
        plain = TypeAdapter(dict[str, Any]).dump_python(asdict(self), mode="json")
        write_atomically(Path(path), head + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


_ADAPTER = TypeAdapter(SearchSpecification)


def read_specification(path: str | Path) -> dict[str, Any]:
    """Reads a `search.yaml` as plain values, for [`SearchSpecification.of`].

    Raises:
        SearchError: it cannot be read, is not YAML, or holds no mapping.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise SearchError(f"{path} has {path.stat().st_size} bytes; a search.yaml has at most {_MAX_BYTES}.")
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SearchError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SearchError(f"{path} is not YAML: {one_line(' '.join(str(error).split()))}.") from error
    if not isinstance(values, dict):
        raise SearchError(f"{path} must hold names and values, such as 'task:', got {type(values).__name__}.")
    return values
