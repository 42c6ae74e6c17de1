"""Multi-document question answering in the public format: one document holds the answer, the others distract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..checks import whole_number
from ..errors import TaskError
from .base import SPLIT_NAMES, SplitName, check_seed
from .metrics import normalised
from .prompts import PromptTask
from .records import cut_into_splits, data_path, read_records

PUBLISHED_NUM_POSITIONS = {10: 3, 20: 5, 30: 7}
"""By number of documents; spread evenly they are 0, 4, 9 of 10, and so on."""
DEFAULT_NUM_DOCUMENTS = 10
DRAWN, AS_IN_FILE = "drawn from other questions' passages", "as in the file"

_BEFORE = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant).\n\n"
)
_FIELDS = ("question", "answers", "ctxs")


@dataclass(frozen=True)
class Passage:
    """A document."""

    title: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, the passage that answers it, and the others that the file gives it."""

    question: str
    answers: tuple[str, ...]
    gold: Passage
    others: tuple[Passage, ...]
    number: int


class MultiDocumentQA(PromptTask[Question]):
    """The multi-document question answering of "Lost in the Middle", from a public file.

    A record is `{"question", "answers", "ctxs": [{"title", "text", "isgold", ...}, ...]}`. The gold document is put at
    each gold position, and the documents are numbered in the order in which they then stand.

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
        chat_template: put prompts into the tokenizer's chat template.

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
        chat_template: bool = False,
    ) -> None:
        if positions is not None and num_positions is not None:
            raise TaskError("pass either num_positions or positions, got both.")
        check_seed(seed)
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
            tokenizer,
            num_items=num_documents,
            num_positions=num_positions,
            positions=positions,
            seed=seed,
            length=length,
            chat_template=chat_template,
            splits={name: [questions[i] for i in numbers] for name, numbers in splits.items()},
        )
        self._drawn = _Distractors(questions, seed) if in_file == 1 and num_documents > 1 else None

    def _sources(self, name: SplitName, num_groups: int) -> Sequence[Question]:
        if self._drawn is None:
            return super()._sources(name, num_groups)
        members = self._splits[name]
        usable = (question for question in members if self._drawn.of(question, self.num_items - 1))
        found = list(islice(usable, num_groups))
        if len(found) < num_groups:
            raise TaskError(
                f"{self.name}, split {name!r}: of its {len(members)} questions only {len(found)} leave "
                f"{self.num_items - 1} passages without their answers, {num_groups} were asked for."
            )
        return found

    def _written(self, source: Question, position: int) -> tuple[str, tuple[str, ...], tuple[int, int]]:
        wanted = self.num_items - 1
        documents = list(source.others[:wanted] if self._drawn is None else self._drawn.of(source, wanted))
        documents.insert(position, source.gold)
        lines = [f"Document [{i}](Title: {d.title}) {d.text}" for i, d in enumerate(documents, start=1)]
        text = _BEFORE + "\n".join(lines) + f"\n\nQuestion: {source.question}\nAnswer:"
        start = len(_BEFORE) + sum(len(line) + 1 for line in lines[:position])
        return text, source.answers, (start, start + len(lines[position]))

    def _resized(self, num_items: int, length: int) -> MultiDocumentQA:
        return MultiDocumentQA(
            self.tokenizer,
            self.data,
            num_documents=num_items,
            num_positions=len(self.positions) if len(self.positions) >= 3 else None,
            seed=self.seed,
            length=length,
            chat_template=self.chat_template,
        )

    def describe(self) -> dict[str, Any]:
        """Returns the task's settings, for a report: of the file its name alone, and where distractors come from."""
        distractors = DRAWN if self._drawn is not None else AS_IN_FILE
        return super().describe() | {"data": self.data.name, "distractors": distractors}


class _Distractors:
    """Draws other questions' passages, each question from a stream of its own."""

    def __init__(self, questions: Sequence[Question], seed: int) -> None:
        self._passages = list(dict.fromkeys(question.gold for question in questions))
        self._seed = seed

    @cached_property
    def _normalised(self) -> list[str]:
        return [normalised(f"{passage.title} {passage.text}") for passage in self._passages]

    def of(self, question: Question, count: int) -> list[Passage]:
        """Returns `count` distinct passages, the same beginning for every count; none if there are not so many."""
        answers = [answer for answer in map(normalised, question.answers) if answer]
        stream = np.random.SeedSequence([self._seed, len(SPLIT_NAMES), question.number])
        found: list[Passage] = []
        for index in np.random.default_rng(stream).permutation(len(self._passages)).tolist():
            if len(found) == count:
                break
            passage = self._passages[index]
            if passage != question.gold and not any(answer in self._normalised[index] for answer in answers):
                found.append(passage)
        return found if len(found) == count else []


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
