"""Options that several commands have, and what they turn into."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, get_args

import typer
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..demo import demo_model_path
from ..errors import TaskError
from ..loading import load_model, load_tokenizer, model_errors
from ..tasks import SPLIT_NAMES, Task
from ..tasks.specification import DEFAULT_TASK, TASK_NAMES, KeyStyle, TaskSpecification, make_task
from .app import err

DEMO_LENGTH_FACTOR = 2  # the demo is searched beyond its window, which is what it repairs


class RopeType(StrEnum):
    """Choices of --rope-type."""

    default = "default"
    linear = "linear"
    dynamic = "dynamic"


TaskName = StrEnum("TaskName", {name: name for name in TASK_NAMES})
KeyChoice = StrEnum("KeyChoice", {name: name for name in get_args(KeyStyle)})
SplitChoice = StrEnum("SplitChoice", {name: name for name in SPLIT_NAMES})

ModelArgument = Annotated[str | None, typer.Argument(help="Hub id or folder. Default: the demo model.")]
TaskOption = Annotated[
    TaskName | None,
    typer.Option(help="Default: kv_retrieval; for the demo model kv_words.", rich_help_panel="Task"),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="A file in the task's public format (.jsonl, .jsonl.gz); for perplexity also a text, .json or .npy file, "
        "or datasets:NAME[:SPLIT]. Default: generated.",
        rich_help_panel="Task",
    ),
]
LengthOption = Annotated[
    int | None,
    typer.Option(
        help="The most tokens a prompt with its answer may have. Default: the model's window; for the demo model twice "
        "its window.",
        rich_help_panel="Task",
    ),
]
PositionsOption = Annotated[
    int | None,
    typer.Option(
        help="Gold positions, spread evenly from first to last. Default: 11 for kv_words, 5 for kv_retrieval, and 3, 5 "
        "or 7 for multi_doc_qa with 10, 20 or 30 documents.",
        rich_help_panel="Task",
    ),
]
TaskSeedOption = Annotated[int, typer.Option(help="Seed of the examples.", rich_help_panel="Task")]
NumKeysOption = Annotated[
    int | None,
    typer.Option(
        help="Pairs of a kv_retrieval context. Default: as in the file, or as many as fit.", rich_help_panel="Task"
    ),
]
KeysOption = Annotated[
    KeyChoice | None,
    typer.Option(help="Keys and values of generated kv_retrieval. Default: uuid.", rich_help_panel="Task"),
]
NumDocumentsOption = Annotated[
    int | None,
    typer.Option(
        help="Documents of a multi_doc_qa context. Default: as in the file, or 10 if that has one for each question.",
        rich_help_panel="Task",
    ),
]
StrideOption = Annotated[
    int | None,
    typer.Option(help="Tokens of each perplexity window that are scored. Default: all.", rich_help_panel="Task"),
]
ChatTemplateOption = Annotated[
    bool,
    typer.Option("--chat-template", help="Put prompts into the tokenizer's chat template.", rich_help_panel="Task"),
]
RopeTypeOption = Annotated[
    RopeType, typer.Option(help="default: plain; linear: PI; dynamic: Dynamic-NTK.", rich_help_panel="Scaling")
]
FactorOption = Annotated[float, typer.Option(help="Global factor of linear and dynamic.", rich_help_panel="Scaling")]
BatchTokensOption = Annotated[
    int, typer.Option(help="Tokens per forward pass; halved when memory runs out.", rich_help_panel="Model", min=1)
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda ... Default: a GPU if there is one.", rich_help_panel="Model")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 ...", rich_help_panel="Model")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def display_name(model: str | None) -> str:
    """What tables call a model."""
    return "demo model" if model is None else model


def load(model: str | None, device: str | None, dtype: str) -> PreTrainedModel:
    """Loads a model, or the demo model."""
    return load_model(model or demo_model_path(), device=device, dtype=dtype)


def tokenizer_of(model: str | None) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer, or the demo model's."""
    return load_tokenizer(model or demo_model_path())


def task_of(
    task: TaskName | None,
    *,
    data: str | None,
    length: int | None,
    positions: int | None,
    task_seed: int,
    num_keys: int | None,
    keys: KeyChoice | None,
    num_documents: int | None,
    stride: int | None,
    chat_template: bool,
) -> TaskSpecification:
    """Returns what the task options, under their names as parameters, say.

    Raises:
        TaskError: an option that the named task does not have.
    """
    return TaskSpecification(
        name=task.value if task is not None else None,
        length=length,
        positions=positions,
        seed=task_seed,
        data=data,
        num_keys=num_keys,
        keys=keys.value if keys is not None else None,
        num_documents=num_documents,
        stride=stride,
        chat_template=chat_template,
    )


def resolve_task(task: TaskSpecification, window: int | None, is_demo: bool) -> TaskSpecification:
    """Returns the specification with the task and its length filled in; says so if that is beyond the window.

    Args:
        task: what was asked for.
        window: the model's trained window; None if its config does not say.
        is_demo: whether the model is the demo model.

    Raises:
        TaskError: neither length nor window is known, or a setting that the resolved task does not have.
    """
    task = with_defaults(task, window, is_demo)
    if window is not None and task.length > window:
        err.print(f"prompts of {task.length} tokens are {task.length / window:g}× the model's window of {window}.")
    return task


def with_defaults(task: TaskSpecification, window: int | None, is_demo: bool) -> TaskSpecification:
    """Does [`resolve_task`]'s work without a word."""
    if window is None and task.length is None:
        raise TaskError("the model's config names no trained window (max_position_embeddings): pass --length.")
    length = task.length if task.length is not None else window * (DEMO_LENGTH_FACTOR if is_demo else 1)
    return replace(task, name=task.name or ("kv_words" if is_demo else DEFAULT_TASK), length=length)


def window_of(model: str | None) -> int | None:
    """Returns a model's trained window from its config alone; None if that does not say.

    Raises:
        LayerRopeError: the config cannot be loaded.
    """
    source = model or demo_model_path()
    with model_errors(source):
        config = AutoConfig.from_pretrained(source)
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def build_task(task: TaskSpecification, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Makes the task; its name and length must be resolved."""
    return make_task(task, tokenizer, task.length)
