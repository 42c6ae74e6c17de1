"""Reads files that strangers wrote: of limited size, strictly, and with messages that stay short."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_BYTES = 2**20
"""Upper limit of an adapter's files: a hundred times what 100 layers take."""

_LONGEST = 200  # characters of a value, or of another library's message, in one of ours

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxdict, _repr.maxlist, _repr.maxtuple, _repr.maxset = 3, 4, 6, 6, 6
_repr.maxstring = _repr.maxother = 80


class UntrustedFileError(Exception):
    """A file cannot be read as what it should be. Callers make it an error that says what the file was for."""


def shown(value: Any) -> str:
    """Returns a value for a message: its `repr`, cut short, without control characters, at a cost that is bounded."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to print very long ones
        return f"an integer of {value.bit_length()} bits"
    return _cut(_repr.repr(value))


def shown_names(names: Sequence[Any], limit: int = 5) -> str:
    """Returns the first of several names, for a message; "nothing" for none."""
    listed = ", ".join(shown(name).strip("'\"") if isinstance(name, str) else shown(name) for name in names[:limit])
    return (listed + (", ..." if len(names) > limit else "")) or "nothing"


def one_line(error: Exception | str) -> str:
    """Returns the first line of another library's message, cut short; the error's kind if it has none."""
    text = str(error).strip()[: 10 * _LONGEST]
    line = (text.splitlines() or [type(error).__name__])[0]
    return _cut("".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line))


def read_bytes(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """Reads a file of at most `limit` bytes.

    Raises:
        UntrustedFileError: it is no file, cannot be read, or is larger.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UntrustedFileError("there is no such file")
        with path.open("rb") as file:
            content = file.read(limit + 1)  # and not as many as `stat` says: some files say 0
    except (OSError, ValueError) as error:
        raise UntrustedFileError(f"cannot be read: {one_line(error)}") from error
    if len(content) > limit:
        raise UntrustedFileError(f"is larger than {limit} bytes")
    return content


def read_json_object(path: str | Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Reads a JSON object in which no name occurs twice.

    Raises:
        UntrustedFileError: it cannot be read, is not JSON, or is something else than an object.
    """
    content = read_bytes(path, limit)
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise UntrustedFileError("is nested too deep") from error
    except ValueError as error:
        raise UntrustedFileError(f"is not JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UntrustedFileError(f"must hold a JSON object, got {type(values).__name__}")
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise UntrustedFileError(f"has {shown(name)} twice")
        values[name] = value
    return values


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
