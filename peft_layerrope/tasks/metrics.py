"""How a written answer is judged: the public metrics of the tasks, on plain text."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

import regex  # its word boundary, unlike re's, does not tear a combining accent off its letter

from ..errors import TaskError
from ..messages import named

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = regex.compile(r"\b(a|an|the)\b")

Metric = Callable[[str, Sequence[str]], bool]


def normalised(text: str) -> str:
    """Returns `text` in lower case, without ASCII punctuation and English articles, white space squeezed."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def best_subspan_em(prediction: str, answers: Sequence[str]) -> bool:
    """Whether what was written before the first newline contains an accepted answer, both [`normalised`].

    An accepted answer of which normalisation leaves nothing ("The", "?") would be found in everything; it is found in
    nothing instead.

    Args:
        prediction: what the model wrote.
        answers: the accepted answers.

    Raises:
        TaskError: one of them is no text.
    """
    _check_texts(prediction, answers)
    written = normalised(prediction.split("\n", 1)[0])
    return any(answer in written for answer in map(normalised, answers) if answer)


def contains_value(prediction: str, answers: Sequence[str]) -> bool:
    """Whether what was written contains an accepted value, both in lower case; an empty one is found in nothing.

    Args:
        prediction: what the model wrote.
        answers: the accepted values.

    Raises:
        TaskError: one of them is no text.
    """
    _check_texts(prediction, answers)
    written = prediction.lower()
    return any(answer.lower() in written for answer in answers if answer)


def _check_texts(prediction: str, answers: Sequence[str]) -> None:
    if not isinstance(prediction, str):
        raise TaskError(f"prediction={named(prediction)} must be the text that was written.")
    # of a single text, each letter would be an answer
    if isinstance(answers, str) or not isinstance(answers, Sequence) or not all(isinstance(a, str) for a in answers):
        raise TaskError(f"answers={named(answers)} must be a list of texts.")


METRICS: dict[str, Metric] = {"best_subspan_em": best_subspan_em, "contains_value": contains_value}
