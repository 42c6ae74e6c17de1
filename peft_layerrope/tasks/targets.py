"""Targets: the tokens by which a model itself writes an answer, and what it writes before them.

A text that the model would never write, such as an answer without the quote that it always opens with, has a likelihood
that says little. So the answer's tokens and its *opening* are taken from what the unscaled model wrote.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, zip_longest
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from .base import Example, Split, SplitName
from .metrics import Judge

MIN_SAMPLES = 3
"""Right answers that an opening is learnt from, at least."""
MIN_SHARE = 0.5
"""Share of the right answers that must begin with one of the openings and be written by its tokens."""
MAX_BARE_SHARE = 1 / 3
"""How probable an opening has to be to be taken before an answer without one. Where the two are near each other the
rounding of the model's numbers decides what is written, and what is given is less sensitive to it."""
MIN_REPEATS = 2
"""Right answers that must begin with an opening."""

_QUESTION = "{question}"
_ANCHOR = 8  # last tokens of the prompt, after which an opening is tokenised


class Target(NamedTuple):
    """Token ids before an answer, and those of the answer."""

    opening_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


def target_of(written: Sequence[int], answers: Sequence[str], judge: Judge) -> Target | None:
    """Returns the target in what a model wrote: nothing after the answer, and everything before it as its opening.

    Args:
        written: token ids that the model wrote.
        answers: the accepted answers.
        judge: tells where one of them stands.

    Returns:
        The target, whose answer is the shortest that the judge finds right; None if the answer is wrong.
    """
    stops = range(1, len(written) + 1)
    stop = next((stop for stop in stops if judge.is_right(judge.text(written[:stop]), answers)), None)
    if stop is None:
        return None
    starts = range(stop - 1, -1, -1)
    start = next((start for start in starts if judge.is_right(judge.text(written[start:stop]), answers)), 0)
    return Target(tuple(written[:start]), tuple(written[start:stop]))


@dataclass(frozen=True)
class Targets:
    """What is known of how a model answers.

    Attributes:
        openings: texts that stand before the answers, the most common first, `{question}` in them for what is asked;
            none where each question has an opening of its own.
        own: by question, its target.
        chosen: by split, for each of its examples which of the openings the unscaled model begins with there; the
            first one where nothing is chosen.
        num_samples: right answers that the openings were learnt from, or questions that were tried.
        num_agreeing: how many of them one of the openings fits, or have a target.
    """

    openings: tuple[str, ...] = ()
    own: Mapping[str, Target] = field(default_factory=dict)
    chosen: Mapping[SplitName, tuple[int, ...]] = field(default_factory=dict)
    num_samples: int = 0
    num_agreeing: int = 0

    def applied(self, split: Split, tokenizer: PreTrainedTokenizerBase) -> Split:
        """Returns the split with its targets. A common opening is given and not scored; a question's own is scored with
        its answer. An example whose question has none keeps its answer, after the common opening if there is one.
        """
        chosen = self.chosen.get(split.name, ())
        examples = tuple(
            self._applied(example, number, tokenizer)
            for example, number in zip_longest(split.examples, chosen[: len(split.examples)], fillvalue=0)
        )
        return replace(split, examples=examples, targets=self.describe())

    def _applied(self, example: Example, number: int, tokenizer: PreTrainedTokenizerBase) -> Example:
        if example.question in self.own:
            opening_ids, answer_ids = self.own[example.question]
            # Scored together they rank factors a little more as written answers do: benchmarks/real_measurement.py.
            return replace(example, answer_ids=opening_ids + answer_ids)
        if self.openings:
            return replace(example, **rendered(self.openings[number], example, tokenizer)._asdict())
        return example

    def beginnings(self, split: Split, tokenizer: PreTrainedTokenizerBase) -> Split | None:
        """Returns a split whose answers are the openings, each asked for at every example: a position for each example
        of a context and each opening. None where there is nothing to choose from.
        """
        if len(self.openings) < 2:
            return None
        count = len(self.openings)
        examples = []
        for example in split.examples:
            openings = [rendered(opening, example, tokenizer).opening_ids for opening in self.openings]
            told = 1 + max(_common(one, other) for one, other in combinations(openings, 2))
            for number, ids in enumerate(openings):
                # one without tokens has no likelihood: any token stands for it, and is not looked at
                asked = replace(example, opening_ids=(), answer_ids=ids[:told] or example.answer_ids[:1])
                examples.append(replace(asked, position=example.position * count + number))
        return replace(
            split, positions=tuple(range(len(split.positions) * count)), examples=tuple(examples), judge=None
        )

    def choosing(self, split: Split, log_prob: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Targets:
        """Returns these targets with the openings that the unscaled model begins a split's answers with.

        Args:
            split: what was asked.
            log_prob: of the examples of [`beginnings`], in nats, shape `(groups, positions)`.
            tokenizer: the model's.
        """
        shares = np.exp(log_prob).reshape(len(split.examples), len(self.openings))
        for row, example in enumerate(split.examples):
            for number, opening in enumerate(self.openings):
                if not rendered(opening, example, tokenizer).opening_ids:
                    # bare; or a tokenizer joins what is opened with to the answer, and no token tells it
                    shares[row, number] = 0.0 if opening else MAX_BARE_SHARE
        return replace(self, chosen={**self.chosen, split.name: tuple(shares.argmax(1).tolist())})

    def describe(self) -> dict[str, Any]:
        """Returns openings, counts and a hash, for a report; no texts of questions or answers."""
        digest = hashlib.sha256(repr((self.openings, sorted(self.own.items()), sorted(self.chosen.items()))).encode())
        return {
            "openings": list(self.openings) or "each question's own, scored with the answer",
            "samples": self.num_samples,
            "agreeing": self.num_agreeing,
            "hash": digest.hexdigest()[:16],
        }

    def to_plain(self) -> dict[str, Any]:
        """Returns everything as JSON values; see [`from_plain`]."""
        own = {question: [list(part) for part in target] for question, target in self.own.items()}
        counts = {"samples": self.num_samples, "agreeing": self.num_agreeing}
        return {"openings": list(self.openings), "own": own, "chosen": dict(self.chosen), **counts}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Targets:
        """The inverse of [`to_plain`]."""
        own = {question: Target(tuple(o), tuple(a)) for question, (o, a) in plain["own"].items()}
        chosen = {name: tuple(numbers) for name, numbers in plain["chosen"].items()}
        return cls(tuple(plain["openings"]), own, chosen, plain["samples"], plain["agreeing"])


def common_openings(
    examples: Sequence[Example], targets: Sequence[Target | None], tokenizer: PreTrainedTokenizerBase
) -> Targets | None:
    """Learns from a few answers what a model writes before one.

    Args:
        examples: what was asked.
        targets: what [`target_of`] found in each answer.
        tokenizer: the model's.

    Returns:
        The most common openings, or None: there are fewer than `MIN_SAMPLES` right answers, or in less than `MIN_SHARE`
        of them opening and answer are written by just the tokens that [`rendered`] gives.
    """
    right = [(example, target) for example, target in zip(examples, targets, strict=True) if target is not None]
    if len(right) < MIN_SAMPLES:
        return None
    patterns = Counter(_pattern(tokenizer.decode(t.opening_ids), example.question) for example, t in right)
    fitting = Counter(
        pattern for example, target in right for pattern in patterns if rendered(pattern, example, tokenizer) == target
    )
    openings = tuple(pattern for pattern, count in fitting.most_common() if count >= MIN_REPEATS)
    agreeing = sum(fitting[opening] for opening in openings)
    if agreeing < MIN_SHARE * len(right):
        return None
    return Targets(openings, num_samples=len(right), num_agreeing=agreeing)


def rendered(opening: str, example: Example, tokenizer: PreTrainedTokenizerBase) -> Target:
    """Returns the tokens of an opening and of the example's first answer after it, as they follow its prompt."""
    before = tokenizer.decode(example.prompt_ids[-_ANCHOR:])
    text = opening.replace(_QUESTION, example.question)
    prompt, opened, answered = (
        tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in (before, before + text, before + text + example.answers[0])
    )
    start = _common(prompt, answered)
    stop = max(start, min(_common(opened, answered), len(answered) - 1))
    return Target(tuple(answered[start:stop]), tuple(answered[stop:]))


def _pattern(opening: str, question: str) -> str:
    return opening.replace(question, _QUESTION) if question else opening


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens at the beginning two texts share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
