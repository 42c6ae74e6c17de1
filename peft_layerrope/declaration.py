"""Settings, each declared once: a field with its type, its limits, and a text that is its option's help as well."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import field, fields, is_dataclass, replace
from functools import wraps
from typing import Any, TypeVar, dataclass_transform

import numpy as np
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from .errors import LayerRopeError, named, one_line, shown_names

T = TypeVar("T")

_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, str_min_length=1)


def option(description: str, *spellings: str, panel: str, **limits: Any) -> Any:
    """Describes a field that is an option of the command line, which has these spellings (default: the field's name)
    and stands in this panel of a command's help. `limits` are as [`pydantic.Field`] takes them; a plain `Field`
    describes a field that is no option.
    """
    return Field(description=description, json_schema_extra={"panel": panel, "spellings": spellings}, **limits)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def declared(error: type[LayerRopeError]) -> Callable[[type[T]], type[T]]:
    """Makes a frozen dataclass whose fields are checked by their annotations, such as `Annotated[int, Field(ge=1)]`.

    Whole numbers and NumPy's are numbers, truth values are none; lists are taken for tuples; an empty text, such as an
    unset variable of a shell leaves, stands for nothing. `error` is raised for an unknown name or a value that cannot
    work, in one line that names it. What fields are to each other, `__post_init__` checks, and raises what it likes of
    our errors.
    """

    def declare(cls: type[T]) -> type[T]:
        made = dataclass(cls, frozen=True, config=_CONFIG)
        checked = made.__init__

        @wraps(checked)
        def init(self: T, *args: Any, **values: Any) -> None:
            try:
                checked(self, *map(_plain, args), **{name: _plain(value) for name, value in values.items()})
            except ValidationError as wrong:
                raise converted(wrong, made, error) from None

        made.__init__ = init
        return made

    return declare


def changed(settings: T, values: Mapping[str, Any]) -> T:
    """Returns settings with the fields of these names, its own or of settings in it, replaced."""
    new = {}
    for one in fields(settings):
        value = getattr(settings, one.name)
        if is_dataclass(value):
            new[one.name] = changed(value, values)
        elif one.name in values:
            new[one.name] = values[one.name]
    return replace(settings, **new)


def spellings(kind: type, name: str) -> tuple[str, ...]:
    """Returns how an option is spelled that is made of a field."""
    given = declarations(kind)[name].json_schema_extra["spellings"]
    return given or (f"--{name.replace('_', '-')}",)


def as_options(settings: Any) -> list[tuple[str, Any]]:
    """Returns settings as options of the command line; those that have their defaults are left out."""
    found = []
    for one in fields(settings):
        name, value = spellings(type(settings), one.name)[0], getattr(settings, one.name)
        if value != one.default:
            found.append((f"--no-{name.removeprefix('--')}", True) if value is False else (name, value))
    return found


def declarations(kind: type) -> dict[str, FieldInfo]:
    """Returns the fields of a class that [`declared`] made, or of a pydantic model; of any other type none."""
    return getattr(kind, "__pydantic_fields__", {}) if isinstance(kind, type) else {}


def converted(
    wrong: ValidationError, kind: type, error: type[LayerRopeError], source: str | None = None
) -> LayerRopeError:
    """Returns our `error` for what pydantic found when `kind` was to be made, perhaps of a file, the `source`: one line
    with the setting's name, its value and what was expected. An error of a check of our own keeps its class if there is
    no source.
    """
    found = wrong.errors(include_url=False)
    first = next((one for one in found if one["type"] == "unexpected_keyword_argument"), found[0])
    own = first.get("ctx", {}).get("error")
    if isinstance(own, LayerRopeError):
        error, text = type(own) if source is None else error, str(own)
    else:
        text = _told(first, kind)
    return error(text if source is None else f"{source}: {text}")


def _told(wrong: Mapping[str, Any], kind: type) -> str:
    where, name, known = "", "", declarations(kind)
    for part in wrong["loc"]:
        where, known = name, declarations(kind) or {}
        if known and isinstance(part, int) and part < len(known):  # passed by its place
            part = list(known)[part]
        name += f"[{part}]" if isinstance(part, int) else f"{'.' * bool(name)}{shown_names([part])}"
        kind = known[part].annotation if part in known else type(None)
    if wrong["type"] == "unexpected_keyword_argument":
        near = difflib.get_close_matches(name.rpartition(".")[2], known, n=1, cutoff=0)
        return f"{name} is unknown; did you mean {where}{'.' * bool(where)}{near[0]}?"
    if wrong["type"] == "missing":
        return f"{name} is missing."
    message = one_line(wrong["msg"]).removeprefix("Value error, ")
    expected = message.removeprefix("Input should ")
    verb = " must " if expected != message else ": "
    for long, short in (("greater than or equal to", "at least"), ("less than or equal to", "at most")):
        expected = expected.replace(long, short)
    return f"{name}={named(wrong['input'])}{verb}{expected}." if name else f"{message}."


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, and lists as tuples: strict checks take no others."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple, range)) else value
