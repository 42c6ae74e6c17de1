"""Reads files that strangers wrote: of limited size, and strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..messages import one_line, shown

MAX_BYTES = 2**20
"""Upper limit of an adapter's files: a hundred times what 100 layers take."""


class UntrustedFileError(Exception):
    """A file cannot be read as what it should be. Callers make it an error that says what the file was for."""


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
