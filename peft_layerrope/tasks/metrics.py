"""How a written answer is judged: the public metrics of the tasks, on plain text."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import regex  # its word boundary, unlike re's, does not tear a combining accent off its letter
from transformers import PreTrainedTokenizerBase

from ..errors import TaskError, named, whole_number

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = regex.compile(r"\b(a|an|the)\b")
_QUOTED = regex.compile(r'"([^"]*)"(?=([^"]*))')  # what stands in quotes, and what stands between them and the next
_NAMES = (":", " is")  # what ends so, on the same line, says that a value follows


class Metric(NamedTuple):
    """A public metric: whether an answer is right, which it stays whatever is written next; whether a wrong one can no
    longer become right; and, where there is such a look, whether the right one comes before any other.
    """

    is_right: Callable[[str, Sequence[str]], bool]
    is_over: Callable[[str], bool]
    is_strictly_right: Callable[[str, Sequence[str], str], bool] | None = None


def normalized(text: str) -> str:
    """Returns `text` in lower case, without ASCII punctuation and English articles, white space squeezed."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def best_subspan_em(prediction: str, answers: Sequence[str]) -> bool:
    """Whether what was written before the first newline contains an accepted answer, both [`normalized`].

    An accepted answer of which normalisation leaves nothing ("The", "?") would be found in everything; it is found in
    nothing instead.

    Raises:
        TaskError: the answers are a single text, of which each letter would be an answer.
    """
    written = normalized(prediction.split("\n", 1)[0])
    return any(answer in written for answer in map(normalized, _several(answers)) if answer)


def contains_value(prediction: str, answers: Sequence[str]) -> bool:
    """Whether what was written contains an accepted value, both in lower case; an empty one is found in nothing.
    TaskError as for [`best_subspan_em`].
    """
    return _first_value(prediction, answers) is not None


def first_value(prediction: str, answers: Sequence[str], key: str) -> bool:
    """Whether an accepted value is written before any other: [`contains_value`] is also satisfied by a model that
    recites the whole object.

    Another value is any text in double quotes that is no key: neither `key`, which was asked for, nor one that a colon
    or "is" leads on from, such as the same key with a letter wrong. TaskError as for [`best_subspan_em`].
    """
    start = _first_value(prediction, answers)
    if start is None:
        return False
    return all(
        quoted == key.lower() or ("\n" not in after and after.rstrip().endswith(_NAMES))
        for quoted, after in _QUOTED.findall(prediction.lower()[:start])
    )


def _first_value(prediction: str, answers: Sequence[str]) -> int | None:
    """Where the first accepted value begins in the lower-case text."""
    written = prediction.lower()
    found = [written.find(answer.lower()) for answer in _several(answers) if answer]
    return min((start for start in found if start >= 0), default=None)


def _several(answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str):
        raise TaskError(f"answers={named(answers)} must be a list of texts.")
    return answers


METRICS: dict[str, Metric] = {
    "best_subspan_em": Metric(best_subspan_em, lambda text: "\n" in text),
    "contains_value": Metric(contains_value, lambda text: False, first_value),
}
"""By name. Of best_subspan_em only the first line counts."""

MAX_NEW_TOKENS = 100
"""Tokens that an answer may have, as in the public protocol of "Lost in the Middle"."""


@dataclass(frozen=True, eq=False)
class Judge:
    """How the written answers of a split are judged: by one of `METRICS`, on what the tokenizer decodes."""

    metric: str
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise TaskError(f"metric={self.metric!r} is unknown, expected one of {', '.join(METRICS)}.")
        whole_number("max_new_tokens", self.max_new_tokens, 1, 2**20)

    def text(self, ids: Sequence[int]) -> str:
        """Returns what was written, as text."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def is_right(self, text: str, answers: Sequence[str]) -> bool:
        """Whether a text is right; see [`Metric`]."""
        return METRICS[self.metric].is_right(text, answers)

    def is_settled(self, text: str, answers: Sequence[str]) -> bool:
        """Whether what is written after a text can no longer change the metric."""
        return METRICS[self.metric].is_over(text) or self.is_right(text, answers)

    def is_strictly_right(self, text: str, answers: Sequence[str], question: str) -> bool | None:
        """Whether the answer comes before any other; None where the metric has no such look."""
        strict = METRICS[self.metric].is_strictly_right
        return strict(text, answers, question) if strict is not None else None

    def describe(self) -> dict[str, Any]:
        """Returns plain values for a report."""
        return {"by": "generate()", "metric": self.metric, "max_new_tokens": self.max_new_tokens}
