"""Options that several commands have, and what they turn into."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..demo import demo_model_path
from ..errors import TaskError
from ..loading import load_model, load_tokenizer
from ..searcher.specification import TaskSpecification
from ..sites import trained_window
from ..tasks import SPLIT_NAMES, KeyValueWords, Task
from .app import err

DEMO_LENGTH_FACTOR = 2  # the demo is searched beyond its window, which is what it repairs


class TaskName(StrEnum):
    """Choices of --task."""

    kv_words = "kv_words"


class RopeType(StrEnum):
    """Choices of --rope-type."""

    default = "default"
    linear = "linear"
    dynamic = "dynamic"


SplitChoice = StrEnum("SplitChoice", {name: name for name in SPLIT_NAMES})

ModelArgument = Annotated[str | None, typer.Argument(help="Hub id or folder. Default: the demo model.")]
TaskOption = Annotated[TaskName, typer.Option(help="Word-level key-value retrieval.", rich_help_panel="Task")]
LengthOption = Annotated[
    int | None,
    typer.Option(
        help="Prompt length in tokens. Default: the model's window; for the demo model twice its window.",
        rich_help_panel="Task",
    ),
]
PositionsOption = Annotated[
    int, typer.Option(help="Gold positions, spread evenly from first to last.", rich_help_panel="Task")
]
TaskSeedOption = Annotated[int, typer.Option(help="Seed of the examples.", rich_help_panel="Task")]
RopeTypeOption = Annotated[
    RopeType, typer.Option(help="default: plain; linear: PI; dynamic: Dynamic-NTK.", rich_help_panel="Scaling")
]
FactorOption = Annotated[float, typer.Option(help="Global factor of linear and dynamic.", rich_help_panel="Scaling")]
BatchTokensOption = Annotated[
    int, typer.Option(help="Tokens per forward pass; halved when memory runs out.", rich_help_panel="Model")
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


def resolve_length(length: int | None, model: PreTrainedModel, is_demo: bool) -> int:
    """Returns the prompt length that was asked for, or the default; says so if it is beyond the window."""
    window = trained_window(model)
    if window is None and length is None:
        raise TaskError("the model's config names no trained window (max_position_embeddings): pass --length.")
    if length is None:
        length = window * (DEMO_LENGTH_FACTOR if is_demo else 1)
    if window is not None and length > window:
        err.print(f"prompts of {length} tokens are {length / window:g}× the model's window of {window}.")
    return length


def build_task(task: TaskSpecification, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Makes the task; its length must be resolved."""
    return KeyValueWords(tokenizer, task.length, num_positions=task.positions, seed=task.seed)
