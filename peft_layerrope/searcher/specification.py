"""`search.yaml`: everything a search was told, so that it can be repeated exactly. Checked by pydantic."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from .._version import __version__
from ..errors import LayerRopeError, SearchError
from ..files.atomic import write_atomically
from ..files.plain_yaml import parse_yaml
from ..messages import one_line, shown, shown_names
from ..tasks.specification import TaskSpecification
from .settings import SearchSettings

_MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class SearchSpecification:
    """A search, as a file can hold it.

    Args:
        model: Hub id or folder; None: the demo model.
        device: where it runs; None: a GPU if there is one.
        dtype: `"auto"` or a floating-point type of torch.
        task: where the examples come from.
        search: the settings.
    """

    model: str | None = None
    device: str | None = None
    dtype: str = "auto"
    task: TaskSpecification = field(default_factory=TaskSpecification)
    search: SearchSettings = field(default_factory=SearchSettings)

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str) -> SearchSpecification:
        """Makes a specification from plain values; what is missing has its default.

        Args:
            values: nested as this class is.
            source: where they come from, for messages.

        Raises:
            SearchError: an unknown name, with the nearest known one; a value of the wrong type or out of its range.
        """
        _check_names(values, cls, source)
        try:
            return _ADAPTER.validate_python(values)
        except ValidationError as error:
            raise SearchError(_message(error, source)) from error

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


def merge(values: Mapping[str, Any], changes: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Returns a copy of nested `values` with `changes`, by path, put in."""
    merged = dict(values)
    for path, value in changes.items():
        level = merged
        for name in path[:-1]:
            inner = level.get(name)
            level[name] = dict(inner) if isinstance(inner, Mapping) else {}
            level = level[name]
        level[path[-1]] = value
    return merged


def _check_names(values: Mapping[str, Any], kind: type, source: str, prefix: str = "") -> None:
    """Raises SearchError at the first name that the dataclass `kind` does not have."""
    known = {f.name: f for f in fields(kind)}
    for name, value in values.items():
        if name not in known:
            wrong = shown_names([name])
            near = difflib.get_close_matches(wrong, known, n=1, cutoff=0)
            raise SearchError(f"{source}: {prefix}{wrong} is unknown; did you mean {prefix}{near[0]}?")
        default = known[name].default_factory
        if isinstance(default, type) and is_dataclass(default) and isinstance(value, Mapping):
            _check_names(value, default, source, f"{prefix}{name}.")


def _message(error: ValidationError, source: str) -> str:
    first = error.errors(include_url=False)[0]
    own = first.get("ctx", {}).get("error")
    if isinstance(own, LayerRopeError):  # of the settings' own checks, which name the setting
        return str(own)
    name = shown_names([".".join(map(str, first["loc"]))])
    return f"{source}: {name}={shown(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}."
