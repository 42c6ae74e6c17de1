"""Loss on running text, for searching and comparing where there is nothing to answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import TaskError, one_line, whole_number
from .base import FRACTIONS, SPLIT_NAMES, Example, Split, SplitName, check_enough, check_request
from .prompts import Record, read_records

DATASETS_PREFIX = "datasets:"
_SEAM = "\n\n"  # between the texts of a source, as is usual for WikiText
_KINDS = {".npy": "a NumPy array of token ids", ".json": "a JSON list of token ids"}


class _Line(Record):
    text: str


def read_source(source: str | Path) -> list[str] | np.ndarray:
    """Returns the texts or token ids of a source; raises TaskError if it cannot be read or is not what its name says.

    It is a text file; a `.jsonl` or `.jsonl.gz` with `"text"` in every record; a `.json` or `.npy` list of token ids;
    or `datasets:NAME[@CONFIG][:SPLIT]`, whose column `text` is read (split `test` unless named).
    """
    path = Path(source)
    if str(source).startswith(DATASETS_PREFIX):
        return _from_datasets(str(source))
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return [line.text for line in read_records(path, _Line)]
    try:
        if path.suffix == ".npy":
            content = np.load(path, allow_pickle=False)
        else:
            content = path.read_text(encoding="utf-8-sig")
            content = json.loads(content) if path.suffix == ".json" else [content]
    except (OSError, ValueError, EOFError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise TaskError(f"{path} cannot be read as {_KINDS.get(path.suffix, 'UTF-8 text')}: {reason}.") from error
    return token_ids(content, str(path)) if path.suffix in _KINDS else content


def token_ids(values: Any, source: str) -> np.ndarray:
    """Returns token ids as a vector; raises TaskError if they are not a flat list of whole numbers from 0."""
    try:
        ids = np.asarray(values)
    except (ValueError, OverflowError):  # a ragged list
        ids = np.empty(0, dtype=object)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu" or ids.min() < 0:
        raise TaskError(f"{source} must hold a flat list of token ids, whole numbers of at least 0.")
    return ids.astype(np.int64)


def tokenized(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, source: str) -> np.ndarray:
    """Returns the texts as one stream, an empty line between them, without special tokens; raises TaskError if there is
    no text in them, or something else.
    """
    if not all(isinstance(text, str) for text in texts) or not any(map(str.strip, texts)):
        raise TaskError(f"{source} must hold text, and nothing but text.")
    return token_ids(tokenizer(_SEAM.join(texts), add_special_tokens=False, verbose=False)["input_ids"], source)


def _from_datasets(source: str) -> list[str]:
    name, _, split = source.removeprefix(DATASETS_PREFIX).partition(":")
    name, _, config = name.partition("@")
    try:
        from datasets import load_dataset  # an optional extra

        return list(load_dataset(name, config or None, split=split or "test")["text"])
    except ImportError as error:
        raise TaskError(f"{source} needs the datasets package: pip install 'peft-layerrope[datasets]'.") from error
    except Exception as error:  # network, file formats, names: its errors have no common base
        raise TaskError(f"{source} cannot be loaded as rows with a column 'text': {one_line(error)}.") from error


class Perplexity:
    """Windows of running text, scored by the loss on their tokens.

    The text is one stream, cut into three stretches of 0.4, 0.2 and 0.4 for search, validation and test, which no
    window crosses; the seed decides in which order they follow each other along the text. A split's windows
    begin at its stretch's beginning, so a larger split begins with the smaller. Each window is a group of its own.

    A tokenizer that begins every text with a token of its own (BOS) has it before every window, where it counts as one
    of the window's tokens and is not scored.

    Args:
        text: token ids, one text, or several, which are joined by an empty line.
        tokenizer: needed for text.
        length: tokens of a window.
        stride: how far each window is behind the one before; of all windows but the first only so many tokens, the
            last ones, are scored, with all others as their context. Default: windows do not overlap, and every token
            but a window's first is scored.
        seed: order of the stretches.
        source: where the text comes from, for reports.

    Raises:
        TaskError: no text, text without a tokenizer, or a length or stride that cannot work.
    """

    name = "perplexity"
    positions = (0,)

    def __init__(
        self,
        text: str | Sequence[str] | Sequence[int] | np.ndarray,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        length: int,
        stride: int | None = None,
        seed: int = 0,
        source: str = "text",
    ) -> None:
        self.length = whole_number("length", length, 2)  # a token is predicted from those before it
        self.stride = whole_number("stride", stride, 1, length - 1) if stride is not None else None
        self.seed, self.source, self.tokenizer = seed, source, tokenizer
        texts = [text] if isinstance(text, str) else text
        if not (len(texts) and isinstance(texts[0], str)):
            self._ids = token_ids(texts, source)
        elif tokenizer is None:
            raise TaskError("text needs a tokenizer; without one pass token ids.")
        else:
            self._ids = tokenized(texts, tokenizer, source)
        self._beginning = beginning(tokenizer)
        self._body = length - len(self._beginning)
        self._step = self.stride or self._body

    @classmethod
    def from_source(
        cls, source: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any
    ) -> Perplexity:
        """Reads the text from a file or the `datasets` package; see [`read_source`], and the class for its settings."""
        name = str(source) if str(source).startswith(DATASETS_PREFIX) else Path(source).name
        return cls(read_source(source), tokenizer=tokenizer, source=name, **settings)

    def available(self, name: SplitName, most: int) -> int:
        """Returns how many windows a split has, but no more than `most`."""
        spare = len(self._stretch(name)) - self._body
        return min(most, 1 + spare // self._step if spare >= 0 else 0)

    def split(self, name: SplitName, num_groups: int) -> Split:
        """Returns the first `num_groups` windows of the named split.

        Raises:
            TaskError: the split is unknown or has fewer windows.
        """
        check_request(name, num_groups)
        stretch, found = self._stretch(name), self.available(name, num_groups)
        told = f"{self.source}, split {name!r}: its {len(stretch)} tokens hold {found} windows of {self.length}"
        check_enough(found, num_groups, told)
        examples = tuple(self._window(stretch, group) for group in range(num_groups))
        return Split(name, self.seed, self.positions, examples, "loss")

    def _stretch(self, name: SplitName) -> np.ndarray:
        order = np.random.default_rng(self.seed).permutation(len(SPLIT_NAMES)).tolist()
        place = order.index(SPLIT_NAMES.index(name))
        ends = np.floor(np.cumsum([0, *(FRACTIONS[i] for i in order)]) * len(self._ids) + 1e-9).astype(int)
        return self._ids[ends[place] : ends[place + 1]]

    def _window(self, stretch: np.ndarray, group: int) -> Example:
        start = group * self._step
        tokens = (*self._beginning, *stretch[start : start + self._body].tolist())
        num_scored = len(tokens) - 1 if group == 0 or self.stride is None else self._step
        scored = len(tokens) - num_scored
        return Example(tokens[: scored - 1], tokens[scored - 1 : scored], tokens[scored:], 0, group)

    def describe(self) -> dict[str, Any]:
        """Returns the task's settings, for a report."""
        return {
            "name": self.name,
            "data": self.source,
            "tokens": len(self._ids),
            "length": self.length,
            "stride": self.stride,
            "seed": self.seed,
        }


def beginning(tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Returns the BOS token, if the tokenizer puts it before a text by itself."""
    if tokenizer is None or tokenizer.bos_token_id is None:
        return ()
    ids = tokenizer("a")["input_ids"]
    return (tokenizer.bos_token_id,) if ids[:1] == [tokenizer.bos_token_id] else ()
