"""Reads running text as one stream of token ids: from a file, a list of ids, or the `datasets` package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import TaskError
from ..messages import named
from .records import read_records

DATASETS_PREFIX = "datasets:"
_SEAM = "\n\n"  # between the texts of a source, as is usual for WikiText
_COLUMN = "text"
_KINDS = {".npy": "a NumPy array of token ids", ".json": "a JSON list of token ids"}


def read_source(source: str | Path) -> list[str] | np.ndarray:
    """Reads what a source names.

    Args:
        source: a text file; a `.jsonl` or `.jsonl.gz` with `"text"` in every record; a `.json` or `.npy` list of token
            ids; or `datasets:NAME[@CONFIG][:SPLIT]`, whose column `text` is read (split `test` unless named).

    Returns:
        Texts, or token ids.

    Raises:
        TaskError: it cannot be read, or is not what its name says.
    """
    source = str(source)
    if source.startswith(DATASETS_PREFIX):
        return _from_datasets(source)
    path = Path(source)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return [_text(record[_COLUMN], where) for where, record in read_records(path, (_COLUMN,))]
    try:
        if path.suffix == ".npy":
            return token_ids(np.load(path, allow_pickle=False), source)
        text = path.read_text(encoding="utf-8")
        return token_ids(json.loads(text), source) if path.suffix == ".json" else [text]
    except OSError as error:
        raise TaskError(f"{source} cannot be read: {error.strerror}.") from error
    except (ValueError, EOFError, RecursionError) as error:  # of which TaskError and UnicodeDecodeError are some
        if isinstance(error, TaskError):
            raise
        kind = {".npy": "a NumPy array of token ids", ".json": "a JSON list of token ids"}.get(
            path.suffix, "UTF-8 text"
        )
        raise TaskError(f"{source} is not {kind}: {' '.join(str(error).split())}.") from error


def token_ids(values: Any, source: str) -> np.ndarray:
    """Returns token ids as a vector.

    Raises:
        TaskError: they are not a flat list of whole numbers from 0.
    """
    try:
        ids = np.asarray(values)
    except (ValueError, OverflowError):  # a ragged list
        ids = np.empty(0, dtype=object)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu" or ids.min() < 0:
        raise TaskError(f"{source} must hold a flat list of token ids, whole numbers of at least 0.")
    return ids.astype(np.int64)


def tokenised(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, source: str) -> np.ndarray:
    """Returns the texts as one stream, an empty line between them, without special tokens.

    Raises:
        TaskError: there is no text in them.
    """
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise TaskError(f"{source} must hold texts alone or token ids alone, got {named(wrong[0])} among texts.")
    joined = _SEAM.join(texts)
    if not joined.strip():
        raise TaskError(f"{source} holds no text.")
    return token_ids(tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"], source)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise TaskError(f"{where}: {_COLUMN} must be text, got {type(value).__name__}.")
    return value


def _from_datasets(source: str) -> list[str]:
    name, _, split = source.removeprefix(DATASETS_PREFIX).partition(":")
    name, _, config = name.partition("@")
    if not name:
        raise TaskError(f"{source!r} names no data set, expected {DATASETS_PREFIX}NAME[@CONFIG][:SPLIT].")
    try:
        from datasets import load_dataset  # an optional extra
    except ImportError as error:
        raise TaskError(f"{source} needs the datasets package: pip install 'peft-layerrope[datasets]'.") from error
    try:
        rows = load_dataset(name, config or None, split=split or "test")
    except Exception as error:  # network, file formats, names: its errors have no common base
        raise TaskError(f"{source} cannot be loaded: {' '.join(str(error).split())}") from error
    if _COLUMN not in rows.column_names:
        raise TaskError(f"{source} has columns {', '.join(rows.column_names)}, expected {_COLUMN!r}.")
    return [_text(value, source) for value in rows[_COLUMN]]
