"""What the commands of all experiments share: their options, and what becomes of a section."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import SearchError
from ..evaluation import DEFAULT_BATCH_TOKENS
from ..experiments.commands import command_line
from ..experiments.measuring import Measuring
from ..experiments.rendering import to_rich
from ..experiments.section import Section
from ..experiments.storage import kept_section, lock_name
from ..fingerprint import model_fingerprint
from ..run_lock import check_free
from ..searcher.progress import RichProgress
from ..sites import trained_window
from ..tasks import Task
from ..tasks.specification import TaskSpecification
from .app import INTERRUPTED, err, out, plain_errors
from .options import (
    BatchTokensOption,
    ChatTemplateOption,
    DataOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    KeysOption,
    LengthOption,
    ModelArgument,
    NumDocumentsOption,
    NumKeysOption,
    PositionsOption,
    StrideOption,
    TaskOption,
    TaskSeedOption,
    build_task,
    load,
    resolve_task,
    task_of,
    tokenizer_of,
)
from .output import check_output

experiment_app = typer.Typer(
    name="experiment",
    help="Measure what lies behind a search's figures: the paper's experiments, on held-out examples.",
    no_args_is_help=True,
)

OutputOption = Annotated[
    Path | None, typer.Option(help="Folder for NAME.json, NAME.md and the plots.", rich_help_panel="Output")
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Go on with an interrupted run in --output.", rich_help_panel="Output"),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier result in --output.", rich_help_panel="Output")
]
AdapterOption = Annotated[str, typer.Option(help="Hub id or folder of an adapter.")]
AdaptersOption = Annotated[
    list[str], typer.Option("--adapter", help="Hub id or folder of an adapter; may be repeated.")
]
GroupsOption = Annotated[
    int, typer.Option(help="Held-out contexts; each is asked at every position.", rich_help_panel="Task")
]


@dataclass
class Run:
    """One call of an experiment's command. The model is loaded when it is first asked for."""

    name: str
    model_option: str | None
    asked_task: TaskSpecification
    batch_tokens: int
    device: str | None
    dtype: str
    output: Path | None
    resume: bool
    overwrite: bool
    command: str

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, without an adapter."""
        return load(self.model_option, self.device, self.dtype)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return tokenizer_of(self.model_option)

    @cached_property
    def window(self) -> int | None:
        """Its trained window."""
        return trained_window(self.model)

    @cached_property
    def specification(self) -> TaskSpecification:
        """The task that was asked for, nothing left open."""
        return resolve_task(self.asked_task, self.window, is_demo=self.model_option is None)

    @cached_property
    def task(self) -> Task:
        """The task that was asked for."""
        return self.make_task(self.specification)

    def make_task(self, specification: TaskSpecification) -> Task:
        """Makes another task for the model's tokenizer."""
        return build_task(specification, self.tokenizer)

    def finish(self, experiment: Callable[[Measuring], Section]) -> None:
        """Runs the experiment, prints its section, and writes it where `--output` was given.

        Args:
            experiment: measures; not called where a resumed run was finished.
        """
        try:
            section = self._made(experiment) if self.output is None else self._kept(self.output, experiment)
        except KeyboardInterrupt:
            kept = "" if self.output is None else "; go on with the same command and --resume"
            err.print(f"interrupted{kept}.")
            raise typer.Exit(INTERRUPTED) from None
        out.print(to_rich(section))
        if self.output is not None:
            err.print(f"written: {self.output / self.name}.json, .md and plots", highlight=False, soft_wrap=True)

    def _kept(self, folder: Path, experiment: Callable[[Measuring], Section]) -> Section:
        asked = {"command": self.command, "model": model_fingerprint(self.model), "dtype": self.dtype}
        return kept_section(folder, self.name, asked, self.resume, lambda work: self._made(experiment, work))

    def _made(self, experiment: Callable[[Measuring], Section], work: Path | None = None) -> Section:
        with RichProgress(err) as audience:
            section = experiment(Measuring(self.batch_tokens, work, self.resume, audience))
        return replace(section, command=self.command)

    def check_output(self) -> None:
        """Refuses an output that cannot be used, before any work.

        Raises:
            SearchError: options that exclude each other.
            TaskError: an output that is no folder, cannot be written, or holds a result already.
            FolderInUseError: another run of this experiment is at work there.
        """
        if self.output is None:
            if self.resume or self.overwrite:
                raise SearchError("--resume and --overwrite need an --output.")
            return
        check_free(self.output, lock_name(self.name))
        check_output(self.output, resume=False, overwrite=True)  # other experiments' results stay
        if self.resume and self.overwrite:
            raise SearchError("--resume keeps an earlier result and --overwrite replaces it: pass one of them.")
        if not self.resume and not self.overwrite and any(self.output.glob(f"**/{self.name}*")):
            raise SearchError(
                f"--output {self.output} holds a result of {self.name}; pass --resume to go on with it, --overwrite to "
                "replace it."
            )


def _shared(
    model: ModelArgument = None,
    task: TaskOption = None,
    data: DataOption = None,
    length: LengthOption = None,
    positions: PositionsOption = None,
    task_seed: TaskSeedOption = 0,
    num_keys: NumKeysOption = None,
    keys: KeysOption = None,
    num_documents: NumDocumentsOption = None,
    stride: StrideOption = None,
    chat_template: ChatTemplateOption = False,
    output: OutputOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    batch_tokens: BatchTokensOption = DEFAULT_BATCH_TOKENS,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    debug: DebugOption = False,
) -> None:
    """The options that every experiment has; only its signature is used."""


_TASK = (
    "task",
    "data",
    "length",
    "positions",
    "task_seed",
    "num_keys",
    "keys",
    "num_documents",
    "stride",
    "chat_template",
)
_NOT_PART_OF_THE_RESULT = ("output", "resume", "overwrite", "debug", "batch_tokens", "device")


def experiment(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command `layerrope experiment NAME` of a function whose first parameter is a [`Run`].

    The command has the function's other parameters and the shared options.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        shared = _parameters(_shared)
        own = {key: value for key, value in list(_parameters(function).items())[1:]}
        first = {"model": shared.pop("model")}
        parameters = first | own | shared

        def command(**values: Any) -> None:
            with plain_errors(values["debug"]):
                run = Run(
                    name=name,
                    model_option=values["model"],
                    asked_task=task_of(**{key: values[key] for key in _TASK}),
                    batch_tokens=values["batch_tokens"],
                    device=values["device"],
                    dtype=values["dtype"],
                    output=values["output"],
                    resume=values["resume"],
                    overwrite=values["overwrite"],
                    command=_repeated(name, parameters, values),
                )
                run.check_output()
                function(run, **{key: values[key] for key in own})

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        # typer reads a command's options from its signature
        command.__signature__ = inspect.Signature(list(parameters.values()))
        command.__annotations__ = {key: parameter.annotation for key, parameter in parameters.items()}
        experiment_app.command(name=name)(command)
        return function

    return register


def _parameters(function: Callable[..., None]) -> dict[str, inspect.Parameter]:
    """A function's parameters, by keyword, with their annotations resolved."""
    hints = get_type_hints(function, include_extras=True)
    return {
        key: parameter.replace(annotation=hints[key], kind=inspect.Parameter.KEYWORD_ONLY)
        for key, parameter in inspect.signature(function).parameters.items()
    }


def _repeated(name: str, parameters: Mapping[str, inspect.Parameter], values: Mapping[str, Any]) -> str:
    """The command line that repeats this call: what differs from the defaults."""
    options = []
    for key, parameter in parameters.items():
        if key == "model" or key in _NOT_PART_OF_THE_RESULT or values[key] in (parameter.default, None, []):
            continue
        options.append((_option_name(key, parameter), values[key]))
    return command_line(["experiment", name, *([values["model"]] if values["model"] else [])], options)


def _option_name(key: str, parameter: inspect.Parameter) -> str:
    declared = [
        text
        for part in getattr(parameter.annotation, "__metadata__", ())
        for text in ([part.default] if isinstance(part.default, str) else []) + list(part.param_decls or ())
    ]
    return next((text for text in declared if text.startswith("--")), f"--{key.replace('_', '-')}")
