"""Options that several commands have."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import typer

from ..scoring.scorer import DEFAULT_BATCH_TOKENS
from ..tasks import SPLIT_NAMES
from ..tasks.specification import TASK_NAMES, KeyStyle, TaskSpecification


class RopeType(StrEnum):
    """Choices of --rope-type."""

    default = "default"
    linear = "linear"
    dynamic = "dynamic"


TaskName = StrEnum("TaskName", {name: name for name in TASK_NAMES})
KeyChoice = StrEnum("KeyChoice", {name: name for name in get_args(KeyStyle)})
SplitChoice = StrEnum("SplitChoice", {name: name for name in SPLIT_NAMES})

task_option = partial(typer.Option, rich_help_panel="Task")
scaling_option = partial(typer.Option, rich_help_panel="Scaling")
model_option = partial(typer.Option, rich_help_panel="Model")

ModelArgument = Annotated[str | None, typer.Argument(help="Hub id or folder. Default: the demo model.")]
DeviceOption = Annotated[str | None, model_option(help="cpu, cuda ... Default: a GPU if there is one.")]
DtypeOption = Annotated[str, model_option(help="auto, float32, bfloat16 ...")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True)
class TaskChoice:
    """The task, without its settings."""

    task: Annotated[TaskName | None, task_option(help="Default: kv_retrieval; for the demo model kv_words.")] = None
    data: Annotated[
        str | None,
        task_option(
            help="A file in the task's public format (.jsonl, .jsonl.gz); for perplexity also a text, .json or .npy "
            "file, or datasets:NAME[:SPLIT]. Default: generated."
        ),
    ] = None
    length: Annotated[
        int | None,
        task_option(
            help="The most tokens a prompt with its answer may have. Default: the model's window; for the demo model "
            "twice its window."
        ),
    ] = None


@dataclass(frozen=True)
class TaskOptions(TaskChoice):
    """The task with its settings."""

    positions: Annotated[
        int | None,
        task_option(
            help="Gold positions, spread evenly from first to last. Default: 11 for kv_words, 5 for kv_retrieval, and "
            "3, 5 or 7 for multi_doc_qa with 10, 20 or 30 documents."
        ),
    ] = None
    task_seed: Annotated[int, task_option(help="Seed of the examples.")] = 0
    num_keys: Annotated[
        int | None,
        task_option(help="Pairs of a kv_retrieval context. Default: as in the file, or as many as fit."),
    ] = None
    keys: Annotated[KeyChoice | None, task_option(help="Keys and values of generated kv_retrieval. Default: uuid.")] = (
        None
    )
    num_documents: Annotated[
        int | None,
        task_option(
            help="Documents of a multi_doc_qa context. Default: as in the file, or 10 if that has one for each "
            "question."
        ),
    ] = None
    stride: Annotated[
        int | None, task_option(help="Tokens of each perplexity window that are scored. Default: all.")
    ] = None
    chat_template: Annotated[
        bool, task_option("--chat-template", help="Put prompts into the tokenizer's chat template.")
    ] = False

    def specification(self) -> TaskSpecification:
        """Returns what the options say.

        Raises:
            TaskError: an option that the named task does not have.
        """
        return TaskSpecification(
            name=self.task.value if self.task is not None else None,
            length=self.length,
            positions=self.positions,
            seed=self.task_seed,
            data=self.data,
            num_keys=self.num_keys,
            keys=self.keys.value if self.keys is not None else None,
            num_documents=self.num_documents,
            stride=self.stride,
            chat_template=self.chat_template,
        )


@dataclass(frozen=True)
class RopeOptions:
    """What the factors of the layers are put upon."""

    rope_type: Annotated[RopeType, scaling_option(help="default: plain; linear: PI; dynamic: Dynamic-NTK.")] = (
        RopeType.default
    )
    factor: Annotated[float, scaling_option(help="Global factor of linear and dynamic.")] = 1.0


@dataclass(frozen=True)
class ComputeOptions:
    """How a model is loaded and run."""

    batch_tokens: Annotated[int, model_option(help="Tokens per forward pass; halved when memory runs out.", min=1)] = (
        DEFAULT_BATCH_TOKENS
    )
    device: DeviceOption = None
    dtype: DtypeOption = "auto"
