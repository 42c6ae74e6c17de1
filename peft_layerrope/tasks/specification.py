"""A task as plain settings, which a file or a command line can hold; and the task that they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from ..errors import TaskError
from .base import Task, check_length, check_seed
from .kv_retrieval import KeyValueRetrieval
from .kv_words import KeyValueWords
from .multi_doc_qa import MultiDocumentQA
from .perplexity import Perplexity

TaskName = Literal["kv_words", "kv_retrieval", "multi_doc_qa", "perplexity"]
TASK_NAMES: tuple[TaskName, ...] = get_args(TaskName)
DEFAULT_TASK: TaskName = "kv_retrieval"
KeyStyle = Literal["uuid", "words"]

_SETTINGS: dict[TaskName, tuple[str, ...]] = {
    "kv_words": ("positions",),
    "kv_retrieval": ("positions", "data", "num_keys", "keys", "chat_template"),
    "multi_doc_qa": ("positions", "data", "num_documents", "chat_template"),
    "perplexity": ("data", "stride"),
}
"""What each task knows beside its length and seed."""


@dataclass(frozen=True)
class TaskSpecification:
    """Which task, and its settings. None, or false, leaves a setting to the task.

    Args:
        name: the task; None: `"kv_retrieval"`, for the demo model `"kv_words"`.
        length: the most tokens that a prompt with its answer may have; None: the model's window, for the demo model
            twice its window.
        positions: number of gold positions; None: 11 for kv_words, 5 for kv_retrieval, and for multi_doc_qa what
            was published for its number of documents.
        seed: seed of the examples.
        data: a file in the task's public format, or what `perplexity` is measured on; None: generated.
        num_keys: pairs of a kv_retrieval context; None: as in the file, or as many as fit.
        keys: what generated keys look like; None: `"uuid"`.
        num_documents: documents of a multi_doc_qa context; None: as in the file.
        stride: tokens that are scored of each window; None: all but the first.
        chat_template: whether prompts are put into the tokenizer's chat template.

    Raises:
        TaskError: a setting that the named task does not have, or a length that no task can have.
    """

    name: TaskName | None = None
    length: int | None = None
    positions: int | None = None
    seed: int = 0
    data: str | None = None
    num_keys: int | None = None
    keys: KeyStyle | None = None
    num_documents: int | None = None
    stride: int | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.length is not None:
            check_length(self.length)
        if self.name is None:
            return
        if self.name not in TASK_NAMES:
            raise TaskError(f"task {self.name!r} is unknown, expected one of {', '.join(TASK_NAMES)}.")
        known = ("name", "length", "seed", *_SETTINGS[self.name])
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in known and value != field.default:
                raise TaskError(
                    f"{field.name}={value!r} is no setting of {self.name}, which has {', '.join(known[1:])}."
                )


def make_task(specification: TaskSpecification, tokenizer: PreTrainedTokenizerBase, window: int | None) -> Task:
    """Makes the task that a specification describes.

    Args:
        specification: what is left open gets its default.
        tokenizer: the model's.
        window: the model's trained window, the default length.

    Raises:
        TaskError: the settings do not work, the data cannot be read, or neither length nor window is known.
    """
    length = specification.length if specification.length is not None else window
    if length is None:
        raise TaskError("the model's config names no trained window (max_position_embeddings): pass a length.")
    resolved = replace(specification, name=specification.name or DEFAULT_TASK, length=length)
    return _MAKERS[resolved.name](resolved, tokenizer)


def _kv_words(task: TaskSpecification, tokenizer: PreTrainedTokenizerBase) -> Task:
    return KeyValueWords(tokenizer, task.length, seed=task.seed, **_given(num_positions=task.positions))


def _kv_retrieval(task: TaskSpecification, tokenizer: PreTrainedTokenizerBase) -> Task:
    return KeyValueRetrieval(
        tokenizer,
        data=task.data,
        num_keys=task.num_keys,
        length=task.length,
        keys=task.keys,
        num_positions=task.positions,
        seed=task.seed,
        chat_template=task.chat_template,
    )


def _multi_doc_qa(task: TaskSpecification, tokenizer: PreTrainedTokenizerBase) -> Task:
    if task.data is None:
        raise TaskError("multi_doc_qa needs data: a file of questions with their documents (.jsonl or .jsonl.gz).")
    return MultiDocumentQA(
        tokenizer,
        task.data,
        num_documents=task.num_documents,
        num_positions=task.positions,
        seed=task.seed,
        length=task.length,
        chat_template=task.chat_template,
    )


def _perplexity(task: TaskSpecification, tokenizer: PreTrainedTokenizerBase) -> Task:
    if task.data is None:
        raise TaskError("perplexity needs data: a text, .jsonl, .json or .npy file, or datasets:NAME[:SPLIT].")
    return Perplexity.from_source(task.data, tokenizer, length=task.length, stride=task.stride, seed=task.seed)


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


_MAKERS: dict[TaskName, Callable[[TaskSpecification, PreTrainedTokenizerBase], Task]] = {
    "kv_words": _kv_words,
    "kv_retrieval": _kv_retrieval,
    "multi_doc_qa": _multi_doc_qa,
    "perplexity": _perplexity,
}
