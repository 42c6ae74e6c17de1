"""Reads data files in JSON lines, plain or gzipped, and cuts their records into splits."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TaskError
from ..messages import named
from .base import SPLIT_NAMES, SplitName

_GZIP = b"\x1f\x8b"
FRACTIONS = (0.4, 0.2, 0.4)
"""Shares of the records for search, validation and test."""


def data_path(data: str | Path) -> Path:
    """Returns the path of a data file.

    Raises:
        TaskError: it is no path.
    """
    if not isinstance(data, (str, os.PathLike)):
        raise TaskError(f"data={named(data)} must be the path of a file.")
    return Path(data)


def read_records(path: str | Path, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the records of a file, one JSON object a line; empty lines are skipped.

    Args:
        path: plain or gzipped, which is told from its content.
        fields: names that every record must have.

    Yields:
        Where the record stands, for messages, and the record.

    Raises:
        TaskError: the file cannot be read, or a line is no such record; it names the file, the line and what was
            expected.
    """
    path = Path(path)
    found = False
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == _GZIP
        if path.suffix == ".gz" and not zipped:
            raise TaskError(f"{path} is not a gzip file, expected gzipped JSON lines.")
        with gzip.open(path, "rb") if zipped else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    found = True
                    yield f"{path}, line {number}", _record(line, f"{path}, line {number}", fields)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TaskError(f"{path} is damaged gzip ({error}), expected gzipped JSON lines.") from error
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}.") from error
    if not found:
        raise TaskError(f"{path} is empty, expected one JSON object a line with {', '.join(fields)}.")


def _record(line: bytes, where: str, fields: Sequence[str]) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
        json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is valid JSON and no text
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: not JSON ({error}), expected an object with {', '.join(fields)}.") from error
    if not isinstance(record, dict):
        raise TaskError(f"{where}: a JSON {type(record).__name__}, expected an object with {', '.join(fields)}.")
    missing = [name for name in fields if name not in record]
    if missing:
        raise TaskError(f"{where}: {', '.join(missing)} missing, expected an object with {', '.join(fields)}.")
    return record


def cut_into_splits(shared: Sequence[Hashable], seed: int, source: str) -> dict[SplitName, list[int]]:
    """Shuffles records by the seed and cuts them into splits of 0.4, 0.2 and 0.4.

    Args:
        shared: for each record what no two splits may share; records that agree in it go to one split together.
        seed: of the shuffling.
        source: where the records come from, for messages.

    Returns:
        The records' numbers, by split.

    Raises:
        TaskError: a split would be empty.
    """
    units: dict[Hashable, list[int]] = {}
    for number, unit in enumerate(shared):
        units.setdefault(unit, []).append(number)
    members = list(units.values())
    limits = np.floor(np.cumsum(FRACTIONS) * len(shared) + 1e-9).astype(int).tolist()
    splits: dict[SplitName, list[int]] = {name: [] for name in SPLIT_NAMES}
    taken = 0
    for index in np.random.default_rng(seed).permutation(len(members)).tolist():
        taken += len(members[index])
        name = next((n for n, limit in zip(SPLIT_NAMES, limits, strict=True) if taken <= limit), SPLIT_NAMES[-1])
        splits[name] += members[index]
    for name, numbers in splits.items():
        if not numbers:
            raise TaskError(
                f"{source} has {len(shared)} records, {len(members)} of them independent: too few, split {name!r} "
                "would be empty."
            )
    return splits
