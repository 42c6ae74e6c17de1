"""Multi-document question answering in the public format: one document holds the answer, the others distract."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Self, Unpack

import numpy as np
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from transformers import PreTrainedTokenizerBase

from ..errors import TaskError, shown, whole_number
from .base import SPLIT_NAMES, Split, SplitName, check_enough, cut_into_splits, spread_positions
from .metrics import normalized
from .prompts import ASKED_EVERYWHERE, GOLD_MOVES, Prompt, PromptSettings, PromptTask, Record, Text, read_records

PUBLISHED_NUM_POSITIONS = {10: 3, 20: 5, 30: 7}
"""By number of documents; spread evenly they are 0, 4, 9 of 10, and so on."""
DEFAULT_NUM_DOCUMENTS = 10
DRAWN, AS_IN_FILE = "drawn from other questions' passages", "as in the file"

_BEFORE = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant).\n\n"
)
_CLOSED_BOOK = "Question: {}\nAnswer:"


@pydantic_dataclass(frozen=True, config=ConfigDict(strict=True))
class Passage:
    """A document. Whether it is gold belongs to the question beside it, and makes no other passage of it."""

    title: str
    text: str
    isgold: bool = field(default=False, compare=False)

    @cached_property
    def _plain(self) -> str:
        return normalized(f"{self.title} {self.text}")

    def answers(self, questions: Sequence[Question]) -> bool:
        """Whether it holds an accepted answer of one of the questions."""
        return any(answer in self._plain for question in questions for answer in question.plain_answers)


class _Line(Record):
    """A record of the public format."""

    items_field = "ctxs"
    question: Text
    answers: Annotated[tuple[Text, ...], Field(min_length=1)]
    ctxs: tuple[Passage, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        golden = sum(document.isgold for document in self.ctxs)
        if golden != 1:
            raise TaskError(f"{golden} of its {len(self.ctxs)} documents are gold (isgold), expected 1.")
        if not any(map(normalized, self.answers)):
            raise TaskError(f"of answers={shown(self.answers)} nothing is left without punctuation and articles.")
        return self


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, the passage that answers it, and the others that the file gives it.

    `number` is its line in the file, from 0.
    """

    question: str
    answers: tuple[str, ...]
    gold: Passage
    others: tuple[Passage, ...]
    number: int

    @cached_property
    def plain_answers(self) -> tuple[str, ...]:
        """Its answers as the metric compares them, without those of which nothing is left."""
        return tuple(filter(None, map(normalized, self.answers)))


def _question(line: _Line, number: int) -> Question:
    (gold,) = (passage for passage in line.ctxs if passage.isgold)
    others = tuple(passage for passage in line.ctxs if not passage.isgold)
    return Question(line.question, line.answers, gold, others, number)


@dataclass(frozen=True)
class Context:
    """Documents in their order, and which question is answered by the document at a gold position."""

    documents: tuple[Passage, ...]
    questions: Mapping[int, Question]


class MultiDocumentQA(PromptTask):
    """The multi-document question answering of "Lost in the Middle", from a public file.

    A record is `{"question", "answers", "ctxs": [{"title", "text", "isgold", ...}, ...]}`. The gold document is put at
    each gold position, and the documents are numbered in the order in which they then stand.

    That is the test split. A search sees contexts that hold the gold documents of several questions, one at each gold
    position, and is asked all of them: no document answers another of these questions, no two of them share a passage,
    and from context to context the questions rotate over the positions, so that a hard question is no hard position.

    From a file with one passage a question (the oracle file) the other documents are drawn, by the seed, from other
    questions' passages that contain none of the question's answers. Outputs say so: `describe()["distractors"]`.
    A question that leaves too few passages, since an answer such as "S" stands in nearly all, is passed over.

    Questions are shuffled by the seed and cut 0.4/0.2/0.4 into search, validation and test split; those with the same
    gold passage stay together, so that no gold passage of one split is gold in another. Splits do share distractors:
    a passage may distract in one split and be gold, or distract, in another. A factor per layer can hardly learn a
    passage, but figures that must not share any text need a file for each split.

    Args:
        tokenizer: any transformers tokenizer.
        data: JSON lines, plain or gzipped.
        num_documents: documents of a context. Default: as in the file, or 10 where that has one for each question. A
            smaller number than the file's keeps the gold document and the first others.
        num_positions: gold positions, spread evenly from the first document to the last. Default: as published for
            10, 20 and 30 documents (3, 5 and 7), else up to 5.
        settings: `seed`, `length`, `max_new_tokens` and those of the chat template, as for [`PromptSettings`].

    Raises:
        TaskError: the file holds something else, more documents than it gives, or positions that a context does not
            have.
    """

    name = "multi_doc_qa"
    metric = "best_subspan_em"
    item = "document"
    size_setting = "num_documents"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: str | Path,
        *,
        num_documents: int | None = None,
        num_positions: int | None = None,
        **settings: Unpack[PromptSettings],
    ) -> None:
        super().__init__(tokenizer, data, **settings)
        self._questions = [_question(line, number) for number, line in enumerate(read_records(data, _Line))]
        self._golden = list(dict.fromkeys(question.gold for question in self._questions))
        self._splits = cut_into_splits([question.gold for question in self._questions], self.seed, str(data))
        self._answerable: frozenset[int] | None = None
        in_file = 1 + len(self._questions[0].others)
        self._most_items = in_file if in_file > 1 else None
        if num_documents is None:
            num_documents = self._most_items or DEFAULT_NUM_DOCUMENTS
        self._arrange(whole_number("num_documents", num_documents, 1), num_positions)

    def _usual_positions(self) -> tuple[int, ...]:
        count = PUBLISHED_NUM_POSITIONS.get(self.num_items, min(5, self.num_items))
        return spread_positions(self.num_items, count) if count >= 3 else tuple(range(self.num_items))

    @property
    def _drawn(self) -> bool:
        return self._most_items is None and self.num_items > 1

    def protocol(self, split_name: SplitName) -> str:
        # held-out figures keep the public protocol
        enough = len(self.positions) > 1 and self.num_items > 1
        return ASKED_EVERYWHERE if split_name != "test" and enough else GOLD_MOVES

    def with_answerable(self, numbers: Collection[int]) -> MultiDocumentQA:
        """Returns the task with a search split of these questions alone, by their lines in the file from 0: those that
        the model can answer at all. Validation and test split stay as they are.
        """
        task = copy.copy(self)
        task._answerable = frozenset(numbers)
        return task

    def questions(self, split_name: SplitName) -> list[Question]:
        """Returns the questions of a split, in their order."""
        members = [self._questions[number] for number in self._splits[split_name]]
        if split_name == "search" and self._answerable is not None:
            return [question for question in members if question.number in self._answerable]
        return members

    def available(self, split_name: SplitName, most: int) -> int:
        if self.protocol(split_name) == GOLD_MOVES:
            return min(most, len(self.questions(split_name)))
        return sum(1 for _ in islice(self._contexts(split_name), most))

    def _sources(self, name: SplitName, num_groups: int, elsewhere: bool) -> Sequence[Question | Context]:
        members = self.questions(name)
        told = f"{self.name}, split {name!r}: "
        if self.protocol(name) == GOLD_MOVES or elsewhere:
            wanted = self.num_items - 1
            found = list(islice((q for q in members if len(self._others(q)) == wanted), num_groups))
            reason = f"leave {wanted} passages without their answers" if self._drawn else "are there"
            told += f"of its {len(members)} questions only {len(found)} {reason}"
        else:
            found = list(islice(self._contexts(name), num_groups))
            told += f"its {len(members)} questions make {len(found)} contexts of {len(self.positions)} questions each"
        check_enough(len(found), num_groups, told)
        return found

    def _contexts(self, name: SplitName) -> Iterator[Context]:
        """Contexts of several questions, which rotate over the gold positions."""
        count = len(self.positions)
        for asked in _compatible(self.questions(name), count):
            for turn in range(count):
                at = {position: asked[(i + turn) % count] for i, position in enumerate(self.positions)}
                others = list(islice(self._around(asked, turn), self.num_items - count))
                if len(others) == self.num_items - count:
                    rest = iter(others)
                    documents = (at[i].gold if i in at else next(rest) for i in range(self.num_items))
                    yield Context(tuple(documents), at)

    def _around(self, asked: Sequence[Question], turn: int) -> Iterator[Passage]:
        """Documents that answer none of several questions: others for each turn, or those of the file in turn."""
        if self._drawn:
            return self._draw(asked, len(SPLIT_NAMES) + 1, asked[0].number, turn)
        golden = {question.gold for question in asked}
        own = dict.fromkeys(p for rank in zip(*(q.others for q in asked), strict=True) for p in rank)
        return (passage for passage in own if passage not in golden and not passage.answers(asked))

    def _others(self, question: Question) -> list[Passage]:
        """The documents beside a single question's own: the same beginning for every number of them."""
        usable = self._draw([question], len(SPLIT_NAMES), question.number) if self._drawn else question.others
        return list(islice(usable, self.num_items - 1))

    def _draw(self, asked: Sequence[Question], *stream: int) -> Iterator[Passage]:
        """Gold passages of other questions in the order of a stream of their own, without those that answer these."""
        rng = np.random.default_rng([self.seed, *stream])
        golden = {question.gold for question in asked}
        for index in rng.permutation(len(self._golden)).tolist():
            if self._golden[index] not in golden and not self._golden[index].answers(asked):
                yield self._golden[index]

    def _written(self, source: Question | Context, position: int, group: int) -> Prompt:
        if isinstance(source, Context):
            return _prompt(source.documents, source.questions[position], position, group)
        documents = self._others(source)
        documents.insert(position, source.gold)
        return _prompt(documents, source, position, group)

    def without_distractors(self, split_name: SplitName, start: int, stop: int, gold: bool) -> Split | None:
        """See [`PromptTask`]; an example's group is its question's line in the file, from 0."""
        asked = self.questions(split_name)[start:stop]
        if not asked:
            return None
        if gold:
            prompts = [_prompt([question.gold], question, 0, question.number) for question in asked]
        else:
            prompts = [Prompt(_CLOSED_BOOK.format(q.question), q.answers, 0, q.number, None, q.question) for q in asked]
        return self._encoded(split_name, (0,), prompts, "")

    def describe(self) -> dict[str, Any]:
        described = super().describe() | {"distractors": DRAWN if self._drawn else AS_IN_FILE}
        if self._answerable is not None:
            described["answerable_search_questions"] = len(self._answerable)
        return described


def _prompt(documents: Sequence[Passage], question: Question, position: int, group: int) -> Prompt:
    lines = [f"Document [{i}](Title: {d.title}) {d.text}" for i, d in enumerate(documents, start=1)]
    text = _BEFORE + "\n".join(lines) + f"\n\nQuestion: {question.question}\nAnswer:"
    start = len(_BEFORE) + sum(len(line) + 1 for line in lines[:position])
    gold = start, start + len(lines[position])
    return Prompt(text, question.answers, position, group, gold, question.question)


def _compatible(questions: Sequence[Question], count: int) -> Iterator[list[Question]]:
    """Sets of `count` questions, in their order, in which no gold passage answers another question."""
    waiting: list[list[Question]] = []
    for question in questions:
        fits = (members for members in waiting if not any(_collide(question, member) for member in members))
        members = next(fits, None)
        if members is None:
            waiting.append(members := [])
        members.append(question)
        if len(members) == count:
            waiting = [others for others in waiting if others is not members]
            yield members


def _collide(one: Question, other: Question) -> bool:
    return one.gold == other.gold or one.gold.answers([other]) or other.gold.answers([one])
