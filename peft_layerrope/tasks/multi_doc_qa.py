"""Multi-document question answering in the public format: one document holds the answer, the others distract."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import TaskError
from ..messages import whole_number
from .base import SPLIT_NAMES, Split, SplitName, check_request, check_seed
from .metrics import normalised
from .prompts import (
    ASKED_EVERYWHERE,
    GOLD_MOVES,
    Prompt,
    PromptEncoder,
    PromptTask,
    check_positions,
    cut_into_splits,
    data_path,
    read_records,
)

PUBLISHED_NUM_POSITIONS = {10: 3, 20: 5, 30: 7}
"""By number of documents; spread evenly they are 0, 4, 9 of 10, and so on."""
DEFAULT_NUM_DOCUMENTS = 10
DRAWN, AS_IN_FILE = "drawn from other questions' passages", "as in the file"

_BEFORE = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant).\n\n"
)
_CLOSED_BOOK = "Question: {}\nAnswer:"
_FIELDS = ("question", "answers", "ctxs")


@dataclass(frozen=True)
class Passage:
    """A document."""

    title: str
    text: str


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


@dataclass(frozen=True)
class Context:
    """Documents in their order, and which question is answered by the document at a gold position."""

    documents: tuple[Passage, ...]
    questions: Mapping[int, Question]


class MultiDocumentQA(PromptTask[Question | Context]):
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
        positions: the gold positions themselves, instead.
        seed: base seed.
        length: the most tokens that a prompt with its answer may have; None: no limit.
        chat_template: put prompts into the tokenizer's chat template; None: where it has one.
        chat_template_args: variables of the template, such as `{"enable_thinking": False}`.
        system_prompt: a message of the system before the prompt.
        chat_date: `YYYY-MM-DD`, what the template writes as today's date; None: today.
        max_new_tokens: tokens that a written answer may have; default: 100.

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
        positions: Sequence[int] | None = None,
        seed: int = 0,
        length: int | None = None,
        chat_template: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        chat_date: str | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        if positions is not None and num_positions is not None:
            raise TaskError("pass either num_positions or positions, got both.")
        check_seed(seed)
        encoder = PromptEncoder(tokenizer, chat_template, chat_template_args, system_prompt, chat_date)
        self.data = data_path(data)
        questions = read_questions(self.data)
        in_file = 1 + len(questions[0].others)
        if num_documents is None:
            num_documents = in_file if in_file > 1 else DEFAULT_NUM_DOCUMENTS
        whole_number("num_documents", num_documents, 1)
        if 1 < in_file < num_documents:
            raise TaskError(f"num_documents={num_documents}, but the records of {self.data} have {in_file} documents.")
        if positions is None and num_positions is None:
            num_positions = PUBLISHED_NUM_POSITIONS.get(num_documents, min(5, num_documents))
            if num_positions < 3:
                positions = range(num_documents)
        splits = cut_into_splits([question.gold for question in questions], seed, str(self.data))
        super().__init__(
            encoder,
            num_items=num_documents,
            num_positions=num_positions,
            positions=positions,
            seed=seed,
            length=length,
            max_new_tokens=max_new_tokens,
            splits={name: [questions[i] for i in numbers] for name, numbers in splits.items()},
        )
        self._passages = _Passages(questions, seed)
        self._drawn = in_file == 1 and num_documents > 1
        self._answerable: frozenset[int] | None = None

    def protocol(self, split_name: SplitName) -> str:
        """See [`PromptTask`]: held-out figures keep the public protocol."""
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
        members = self._splits[split_name]
        if split_name == "search" and self._answerable is not None:
            return [question for question in members if question.number in self._answerable]
        return list(members)

    def available(self, split_name: SplitName, most: int) -> int:
        """See [`PromptTask`]."""
        if self.protocol(split_name) == GOLD_MOVES:
            return min(most, len(self.questions(split_name)))
        return sum(1 for _ in islice(self._contexts(split_name), most))

    def prompts(self, split_name: SplitName, num_groups: int, positions: Sequence[int] | None = None) -> list[Prompt]:
        """See [`PromptTask`]; at positions other than the task's the gold document moves."""
        check_request(split_name, num_groups)
        if positions is None or self.protocol(split_name) == GOLD_MOVES:
            return super().prompts(split_name, num_groups, positions)
        check_positions(positions, self.num_items, self.item)
        sources = self._single(split_name, num_groups)
        return [self._written(source, p, group) for group, source in enumerate(sources) for p in positions]

    def _sources(self, name: SplitName, num_groups: int) -> Sequence[Question | Context]:
        if self.protocol(name) == GOLD_MOVES:
            return self._single(name, num_groups)
        found = list(islice(self._contexts(name), num_groups))
        if len(found) < num_groups:
            raise TaskError(
                f"{self.name}, split {name!r}: its {len(self.questions(name))} questions make {len(found)} contexts of "
                f"{len(self.positions)} questions each, {num_groups} were asked for."
            )
        return found

    def _single(self, name: SplitName, num_groups: int) -> Sequence[Question]:
        """Questions that have enough other documents."""
        members = self.questions(name)
        wanted = self.num_items - 1
        usable = (question for question in members if not self._drawn or self._passages.drawn_for(question, wanted))
        found = list(islice(usable, num_groups))
        if len(found) < num_groups:
            reason = f"leave {wanted} passages without their answers" if self._drawn else "are there"
            raise TaskError(
                f"{self.name}, split {name!r}: of its {len(members)} questions only {len(found)} {reason}, "
                f"{num_groups} were asked for."
            )
        return found

    def _contexts(self, name: SplitName) -> Iterator[Context]:
        """Contexts of several questions, which rotate over the gold positions."""
        count = len(self.positions)
        for asked in self._passages.compatible(self.questions(name), count):
            for turn in range(count):
                at = {position: asked[(i + turn) % count] for i, position in enumerate(self.positions)}
                others = self._passages.around(asked, self.num_items - count, turn, drawn=self._drawn)
                if others is not None:
                    rest = iter(others)
                    places = range(self.num_items)
                    yield Context(tuple(at[i].gold if i in at else next(rest) for i in places), at)

    def _written(self, source: Question | Context, position: int, group: int) -> Prompt:
        if isinstance(source, Context):
            return _prompt(source.documents, source.questions[position], position, group)
        wanted = self.num_items - 1
        documents = list(self._passages.drawn_for(source, wanted) if self._drawn else source.others[:wanted])
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

    def resized(self, num_items: int, length: int | None = None) -> MultiDocumentQA:
        """See [`PromptTask`]."""
        task = MultiDocumentQA(
            self.tokenizer,
            self.data,
            num_documents=num_items,
            num_positions=len(self.positions) if len(self.positions) >= 3 else None,
            seed=self.seed,
            length=length,
            **self.encoder.settings(),
            max_new_tokens=self.judge.max_new_tokens,
        )
        task._answerable = self._answerable
        return task

    def describe(self) -> dict[str, Any]:
        """Returns the task's settings, for a report: of the file its name alone, and where distractors come from."""
        distractors = DRAWN if self._drawn else AS_IN_FILE
        described = super().describe() | {"data": self.data.name, "distractors": distractors}
        if self._answerable is not None:
            described["answerable_search_questions"] = len(self._answerable)
        return described


def _prompt(documents: Sequence[Passage], question: Question, position: int, group: int) -> Prompt:
    lines = [f"Document [{i}](Title: {d.title}) {d.text}" for i, d in enumerate(documents, start=1)]
    text = _BEFORE + "\n".join(lines) + f"\n\nQuestion: {question.question}\nAnswer:"
    start = len(_BEFORE) + sum(len(line) + 1 for line in lines[:position])
    gold = start, start + len(lines[position])
    return Prompt(text, question.answers, position, group, gold, question.question)


class _Passages:
    """Which documents may stand beside which questions; every choice from a stream of its own."""

    def __init__(self, questions: Sequence[Question], seed: int) -> None:
        self._gold = list(dict.fromkeys(question.gold for question in questions))
        self._seed = seed

    @cached_property
    def _normalised(self) -> list[str]:
        return [_normalised(passage) for passage in self._gold]

    def drawn_for(self, question: Question, count: int) -> list[Passage]:
        """Returns `count` distinct gold passages of other questions that do not hold the question's answers, the same
        beginning for every count; none if there are not so many.
        """
        stream = np.random.SeedSequence([self._seed, len(SPLIT_NAMES), question.number])
        found = list(islice(self._draw([question], np.random.default_rng(stream)), count))
        return found if len(found) == count else []

    def around(self, asked: Sequence[Question], count: int, turn: int, drawn: bool) -> list[Passage] | None:
        """Returns `count` documents that answer none of several questions; None if there are not so many.

        Args:
            asked: the questions.
            count: how many.
            turn: number of the context that asks them; another one draws others.
            drawn: draw them from all questions' gold passages; otherwise they are those that the file gives to these
                questions, in turn.
        """
        if drawn:
            stream = np.random.SeedSequence([self._seed, len(SPLIT_NAMES) + 1, asked[0].number, turn])
            usable = self._draw(asked, np.random.default_rng(stream))
        else:
            answers = _answers(asked)
            own = dict.fromkeys(p for rank in zip(*(q.others for q in asked), strict=True) for p in rank)
            golden = {question.gold for question in asked}
            usable = (p for p in own if p not in golden and not _holds(_normalised(p), answers))
        found = list(islice(usable, count))
        return found if len(found) == count else None

    def compatible(self, questions: Sequence[Question], count: int) -> Iterator[list[Question]]:
        """Yields sets of `count` questions, in their order, in which no gold passage answers another question."""
        waiting: list[list[Question]] = []
        for question in questions:
            own, text = _answers([question]), _normalised(question.gold)
            fits = (
                members
                for members in waiting
                if not any(
                    question.gold == m.gold or _holds(text, _answers([m])) or _holds(_normalised(m.gold), own)
                    for m in members
                )
            )
            members = next(fits, None)
            if members is None:
                waiting.append(members := [])
            members.append(question)
            if len(members) == count:
                waiting = [others for others in waiting if others is not members]
                yield members

    def _draw(self, asked: Sequence[Question], rng: np.random.Generator) -> Iterator[Passage]:
        answers, golden = _answers(asked), {question.gold for question in asked}
        for index in rng.permutation(len(self._gold)).tolist():
            if self._gold[index] not in golden and not _holds(self._normalised[index], answers):
                yield self._gold[index]


def _normalised(passage: Passage) -> str:
    return normalised(f"{passage.title} {passage.text}")


def _answers(questions: Sequence[Question]) -> list[str]:
    return [answer for question in questions for answer in map(normalised, question.answers) if answer]


def _holds(text: str, answers: Sequence[str]) -> bool:
    return any(answer in text for answer in answers)


def read_questions(path: str | Path) -> list[Question]:
    """Reads a file in the public format.

    Raises:
        TaskError: naming file, line and what was expected.
    """
    questions: list[Question] = []
    for where, content in read_records(path, _FIELDS):
        questions.append(_checked(content, where, len(questions)))
        found, expected = 1 + len(questions[-1].others), 1 + len(questions[0].others)
        if found != expected:
            raise TaskError(f"{where}: {found} documents, expected {expected} as in the first record.")
    return questions


def _checked(content: Mapping[str, Any], where: str, number: int) -> Question:
    question, answers, documents = (content[field] for field in _FIELDS)
    if not isinstance(question, str) or not question:
        raise TaskError(f"{where}: question must be text, got {question!r}.")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a for a in answers):
        raise TaskError(f"{where}: answers must be a list of at least one text, got {answers!r}.")
    if not any(map(normalised, answers)):
        raise TaskError(f"{where}: of its answers {answers!r} nothing is left without punctuation and articles.")
    if not isinstance(documents, list) or not all(
        isinstance(d, dict) and isinstance(d.get("title"), str) and isinstance(d.get("text"), str) for d in documents
    ):
        raise TaskError(f"{where}: ctxs must be a list of objects with title and text.")
    gold = [i for i, document in enumerate(documents) if document.get("isgold") is True]
    if len(gold) != 1:
        raise TaskError(f"{where}: {len(gold)} of its {len(documents)} documents are gold (isgold), expected 1.")
    passages = [Passage(document["title"], document["text"]) for document in documents]
    golden = passages.pop(gold[0])
    return Question(question, tuple(answers), golden, tuple(passages), number)
