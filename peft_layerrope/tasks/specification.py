"""A task as plain settings, which a file or a command line can hold; and the task that they make."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator
from transformers import PreTrainedTokenizerBase

from ..declaration import declared, option
from ..errors import TaskError
from ..files import digest
from .base import MAX_LENGTH, Task
from .kv import KeyStyle, KeyValueMix, KeyValueRetrieval, KeyValueWords
from .multi_doc_qa import MultiDocumentQA
from .perplexity import Perplexity
from .prompts import ChatSettings, PromptEncoder

TaskName = Literal["kv_words", "kv_retrieval", "kv_mix", "multi_doc_qa", "perplexity"]
TASK_NAMES: tuple[TaskName, ...] = get_args(TaskName)
DEFAULT_TASK: TaskName = "kv_retrieval"

_CHAT = tuple(ChatSettings.__annotations__)
_WRITTEN = (*_CHAT, "max_new_tokens")
_SETTINGS: dict[TaskName, tuple[str, ...]] = {
    "kv_words": ("num_positions",),
    "kv_retrieval": ("num_positions", "data", "num_keys", "keys", "difficulty", *_WRITTEN),
    "kv_mix": ("num_positions", "keys", *_WRITTEN),
    "multi_doc_qa": ("num_positions", "data", "num_documents", "difficulty", *_WRITTEN),
    "perplexity": ("data", "stride"),
}
"""What each task knows beside its length and seed."""
_MAKERS: dict[TaskName, Callable[..., Task]] = {
    "kv_words": KeyValueWords,
    "kv_retrieval": KeyValueRetrieval,
    "kv_mix": KeyValueMix,
    "multi_doc_qa": MultiDocumentQA,
    "perplexity": lambda data, **settings: Perplexity.from_source(data, **settings),
}
_NEEDS_DATA = ("multi_doc_qa", "perplexity")

_task = partial(option, panel="Task")


def _from_json(value: Any) -> Any:
    """A value as a command line has it, and a file may."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"Input should be JSON: {error}") from error


@declared(TaskError)
class TaskSpecification:
    """Which task, and its settings. None, or false, leaves a setting to the task. Raises TaskError if a value cannot
    work or the named task has no such setting.
    """

    name: Annotated[
        TaskName | None,
        _task(
            "Default: kv_retrieval; for the demo model kv_words. kv_mix is kv_retrieval of three lengths and kinds of "
            "keys, by turns.",
            "--task",
        ),
    ] = None
    length: Annotated[
        int | None,
        _task(
            "The most tokens a prompt with its answer may have. Default: the model's window; for the demo model twice "
            "its window; for search and evaluate without any size at most 4096.",
            ge=1,
            le=MAX_LENGTH,
        ),
    ] = None
    num_positions: Annotated[
        int | None,
        _task(
            "Gold positions, spread evenly from first to last. Default: 11 for kv_words, 5 for kv_retrieval and "
            "kv_mix, and 3, 5 or 7 for multi_doc_qa with 10, 20 or 30 documents.",
            "--num-positions",
            "--positions",
            ge=3,
        ),
    ] = None
    task_seed: Annotated[int, _task("Seed of the examples.", ge=0)] = 0
    data: Annotated[
        str | None,
        _task(
            "A file in the task's public format (.jsonl, .jsonl.gz); for perplexity also a text, .json or .npy file, "
            "or datasets:NAME[:SPLIT]. Default: generated."
        ),
    ] = None
    num_keys: Annotated[
        int | None,
        _task(
            "Pairs of a kv_retrieval context. Default: as in the file, or as many as fit; for search and "
            "evaluate without any size as with --difficulty auto.",
            ge=2,
        ),
    ] = None
    keys: Annotated[
        KeyStyle | None,
        _task(
            "Keys and values of generated contexts. Default: uuid; for search and evaluate without any size "
            "syllables; in kv_mix all by turns."
        ),
    ] = None
    num_documents: Annotated[
        int | None,
        _task(
            "Documents of a multi_doc_qa context. Default: as in the file, or 10 if that has one for each question.",
            ge=1,
        ),
    ] = None
    difficulty: Annotated[
        Literal["auto"] | None,
        _task("auto: as many pairs or documents as leave the unscaled model between 40 and 90 % right answers."),
    ] = None
    stride: Annotated[int | None, _task("Tokens of each perplexity window that are scored. Default: all.", ge=1)] = None
    chat_template: Annotated[
        bool | None, _task("Put prompts into the tokenizer's chat template. Default: where it has one.")
    ] = None
    chat_template_args: Annotated[
        dict[str, Any] | None,
        BeforeValidator(_from_json),
        _task("Variables of the chat template, as JSON: '{\"enable_thinking\": false}' turns Qwen3's thinking off."),
    ] = None
    system_prompt: Annotated[str | None, _task("A message of the system before each prompt.")] = None
    chat_date: Annotated[
        str | None,
        _task("YYYY-MM-DD, for a chat template that writes the date. Default: today, and kept with the results."),
    ] = None
    max_new_tokens: Annotated[
        int | None, _task("Tokens that a written answer may have. Default: 100.", ge=1, le=MAX_LENGTH)
    ] = None

    def __post_init__(self) -> None:
        if self.name is None:
            return
        known = ("name", "length", "task_seed", *_SETTINGS[self.name])
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in known and value is not False and value != field.default:
                raise TaskError(
                    f"{field.name}={value!r} is no setting of {self.name}, which has {', '.join(known[1:])}."
                )
        size = self.num_keys if self.name == "kv_retrieval" else self.num_documents
        if self.difficulty is not None and size is not None:
            raise TaskError(
                "difficulty='auto' finds the number of pairs or documents: leave num_keys, num_documents out."
            )

    @property
    def data_digest(self) -> str | None:
        """SHA-256 of the file that is read; None if there is none."""
        return digest(Path(self.data)) if self.data is not None and Path(self.data).is_file() else None

    def of_task(self, name: TaskName) -> TaskSpecification:
        """Returns the specification; where it is of another task than `name`, of that one, with the length, the seed,
        and what is said of the chat template where that one has written prompts.
        """
        if name == self.name:
            return self
        chat = {setting: getattr(self, setting) for setting in _CHAT if setting in _SETTINGS[name]}
        return TaskSpecification(name, self.length, task_seed=self.task_seed, **chat)


def make_task(specification: TaskSpecification, tokenizer: PreTrainedTokenizerBase, window: int | None) -> Task:
    """Makes the task that a specification describes, for a model with this tokenizer and trained window, which is the
    default length; raises TaskError if the settings do not work, the data cannot be read, or there is no length.
    """
    if specification.difficulty is not None:
        raise TaskError(
            f"difficulty={specification.difficulty!r} is found by running the model, as search and evaluate do: here "
            "pass num_keys or num_documents."
        )
    length = specification.length if specification.length is not None else window
    if length is None:
        raise TaskError("the model's config names no trained window (max_position_embeddings): pass a length.")
    name = specification.name or DEFAULT_TASK
    if name in _NEEDS_DATA and specification.data is None:
        raise TaskError(
            f"{name} needs data: a file of its kind, of which docs/evaluate.md names some, or for perplexity also "
            "datasets:NAME[:SPLIT]."
        )
    resolved = replace(specification, name=name, length=length)  # checks what belongs to the task
    settings = {setting: value for setting in _SETTINGS[name] if (value := getattr(resolved, setting)) is not None}
    return _MAKERS[name](tokenizer=tokenizer, length=length, seed=resolved.task_seed, **settings)


def with_chat(task: TaskSpecification, tokenizer: PreTrainedTokenizerBase) -> TaskSpecification:
    """Returns the specification with everything about the chat template filled in for a tokenizer, the date too: it
    gives the same prompts on any day. Of a task without written prompts it is returned as it is. Raises TaskError if
    the chat template is missing or fails, or its arguments cannot work.
    """
    if "chat_template" not in _SETTINGS[task.name or DEFAULT_TASK]:
        return task
    chat = {name: getattr(task, name) for name in _CHAT}
    return replace(task, **PromptEncoder(tokenizer, **chat).settings())


MakeTask = Callable[[TaskSpecification], Task]


def parse_place(text: str, option: str) -> tuple[TaskName, int | None]:
    """Reads which task is meant, and how many tokens its prompts may have if that is said, such as `"kv_words:512"`.
    Raises TaskError, which names the `option`, if it says neither.
    """
    name, _, length = text.partition(":")
    if name not in TASK_NAMES or (text != name and not re.fullmatch("[1-9][0-9]{0,8}", length)):
        expected = f"one of {', '.join(TASK_NAMES)}, with a length if need be, such as {TASK_NAMES[0]}:512"
        raise TaskError(f"{option} {text!r}: expected {expected}.")
    return name, int(length) if length else None


def task_elsewhere(make: MakeTask, specification: TaskSpecification, name: TaskName, length: int | None) -> Task:
    """Returns the task of this name, with what a specification says that is not of its task alone; with `length` in
    tokens as [`task_of_length`] makes it. Raises TaskError if it cannot be made.
    """
    specification = specification.of_task(name)
    return make(specification) if length is None else task_of_length(make, specification, length)


def task_of_length(make: MakeTask, specification: TaskSpecification, length: int) -> Task:
    """Returns the task with prompts of up to `length` tokens: with as many items as fit. Raises TaskError if it cannot
    be made that long, or that short.
    """
    task = make(replace(specification, length=length, num_keys=None, num_documents=None))
    try:
        probe = task.split("search", 1)
    except TaskError:  # the contexts of its file are too long
        if not hasattr(task, "shortened"):
            raise
        task = task.shortened(length)
        probe = task.split("search", 1)
    if probe.max_tokens < 0.7 * length:  # prompts that are much shorter than asked for are not what the length says
        raise TaskError(f"task {task.name} cannot fill {length} tokens: its prompts have {probe.max_tokens}.")
    return task
