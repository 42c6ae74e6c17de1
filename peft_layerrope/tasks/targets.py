"""Targets: the tokens by which a model itself writes an answer, and what it writes before them.

A text that the model would never write, such as an answer without the quote that it always opens with, has a likelihood
that says little. So the answer's tokens and its *opening* are taken from what the unscaled model wrote.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .base import Example, Split, common_prefix
from .metrics import Judge

MIN_SAMPLES = 3
"""Right answers that an opening is learnt from, at least."""
MIN_SHARE = 0.5
"""Share of the right answers that must begin with it and be written by its tokens."""

_QUESTION = "{question}"
_ANCHOR = 8  # last tokens of the prompt, after which an opening is tokenised


class Target(NamedTuple):
    """Token ids before an answer, and those of the answer."""

    opening_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


def target_of(written: Sequence[int], answers: Sequence[str], judge: Judge) -> Target | None:
    """Returns the target in the token ids that a model wrote: the shortest answer that the judge finds right, and
    everything before it as its opening. None if the answer is wrong.
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
    """What is known of how a model answers: the text that stands before every answer, `{question}` in it for what is
    asked, or where there is none each question's own target.
    """

    opening: str | None = None
    own: Mapping[str, Target] = field(default_factory=dict)  # by question
    num_samples: int = 0  # right answers that the opening was learnt from, or questions that were tried
    num_agreeing: int = 0  # how many of them the opening fits, or have a target
    others: tuple[str, ...] = ()  # further openings that some right answers had

    def applied(self, split: Split, tokenizer: PreTrainedTokenizerBase) -> Split:
        """Returns the split with its targets. A common opening is given and not scored; a question's own is scored with
        its answer. An example whose question has none keeps its answer, after the common opening if there is one.
        """
        examples = tuple(self._applied(example, tokenizer) for example in split.examples)
        return replace(split, examples=examples, targets=self.describe())

    def _applied(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> Example:
        if example.question in self.own:
            opening_ids, answer_ids = self.own[example.question]
            # Scored together they rank factors a little more as written answers do: benchmarks/real_measurement.py.
            return replace(example, answer_ids=opening_ids + answer_ids)
        if self.opening is not None:
            target, *others = (rendered(opening, example, tokenizer) for opening in (self.opening, *self.others))
            return replace(example, **target._asdict(), other_targets=tuple(others))
        return example

    def describe(self) -> dict[str, Any]:
        """Returns opening, counts and a hash, for a report; no texts of questions or answers."""
        digest = hashlib.sha256(repr((self.opening, self.others, sorted(self.own.items()))).encode())
        return {
            "opening": self.opening if self.opening is not None else "each question's own, scored with the answer",
            "samples": self.num_samples,
            "agreeing": self.num_agreeing,
            "hash": digest.hexdigest()[:16],
        }

    def to_plain(self) -> dict[str, Any]:
        """Returns everything as JSON values; see [`from_plain`]."""
        counts = {"samples": self.num_samples, "agreeing": self.num_agreeing}
        return {"opening": self.opening, "others": list(self.others), "own": dict(self.own), **counts}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Targets:
        """The inverse of [`to_plain`]."""
        own = {question: Target(tuple(o), tuple(a)) for question, (o, a) in plain["own"].items()}
        return cls(plain["opening"], own, plain["samples"], plain["agreeing"], tuple(plain["others"]))


def common_opening(
    examples: Sequence[Example], targets: Sequence[Target | None], tokenizer: PreTrainedTokenizerBase
) -> Targets | None:
    """Learns the most common opening, and the others, from what [`target_of`] found in a few answers: those where
    opening and answer are written by just the tokens that [`rendered`] gives. None: there are fewer than `MIN_SAMPLES`
    right answers, or less than `MIN_SHARE` of them are so written with the most common one.
    """
    right = [(example, target) for example, target in zip(examples, targets, strict=True) if target is not None]
    if len(right) < MIN_SAMPLES:
        return None
    openings = Counter(_pattern(tokenizer.decode(t.opening_ids), example.question) for example, t in right)
    opening, *others = (opening for opening, _ in openings.most_common())
    agreeing = {o: sum(rendered(o, example, tokenizer) == target for example, target in right) for o in openings}
    if agreeing[opening] < MIN_SHARE * len(right):
        return None
    others = [other for other in others if agreeing[other]]
    return Targets(opening, num_samples=len(right), num_agreeing=agreeing[opening], others=tuple(others))


def rendered(opening: str, example: Example, tokenizer: PreTrainedTokenizerBase) -> Target:
    """Returns the tokens of an opening and of the example's first answer after it, as they follow its prompt."""
    before = tokenizer.decode(example.prompt_ids[-_ANCHOR:])
    text = opening.replace(_QUESTION, example.question)
    prompt, opened, answered = (
        tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in (before, before + text, before + text + example.answers[0])
    )
    start = common_prefix(prompt, answered)
    stop = max(start, min(common_prefix(opened, answered), len(answered) - 1))
    return Target(tuple(answered[start:stop]), tuple(answered[stop:]))


def _pattern(opening: str, question: str) -> str:
    return opening.replace(question, _QUESTION) if question else opening
