"""What the commands of all experiments share: their options, and what becomes of a section."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base_model import load_tokenizer
from ..declaration import declared, option
from ..errors import SearchError
from ..experiments.commands import command_line
from ..experiments.measuring import Measuring
from ..experiments.rendering import to_rich
from ..experiments.section import Section
from ..experiments.storage import kept_section, work_folder
from ..fingerprint import model_fingerprint
from ..runs import check_free
from ..searcher.progress import RichProgress
from ..tasks import Task
from ..tasks.specification import TaskSpecification
from ..tuner.sites import trained_window
from .app import INTERRUPTED, err, out, plain_errors
from .inputs import build_task, load, resolve_task
from .kept_date import keep_date, with_kept_date
from .options import (
    Compute,
    ComputeOptions,
    DebugOption,
    ModelArgument,
    TaskOptions,
    Typed,
    options_of,
    parameters_of,
    task_option,
    with_parameters,
)
from .output import check_output

experiment_app = typer.Typer(
    name="experiment",
    help="Measure what lies behind a search's figures: the paper's experiments, on held-out examples.",
    no_args_is_help=True,
)

AdapterOption = Annotated[str, typer.Option(help="Hub id or folder of an adapter.")]
AdaptersOption = Annotated[
    list[str], typer.Option("--adapter", help="Hub id or folder of an adapter; may be repeated.")
]
GroupsOption = Annotated[int, task_option(help="Held-out contexts; each is asked at every position.")]
_NOT_PART_OF_THE_RESULT = ("output", "resume", "overwrite", "debug", "batch_tokens", "device")


_output = partial(option, panel="Output")


@declared(SearchError)
class Kept:
    """Where a result is kept."""

    output: Annotated[Path | None, _output("Folder for NAME.json, NAME.md and the plots.")] = None
    resume: Annotated[bool, _output("Go on with an interrupted run in --output.", "--resume")] = False
    overwrite: Annotated[bool, _output("Replace an earlier result in --output.", "--overwrite")] = False

    def check(self, name: str) -> None:
        """Refuses an output that cannot be used, before any work.

        Args:
            name: the experiment's.

        Raises:
            SearchError: options that exclude each other.
            TaskError: an output that is no folder, cannot be written, or holds a result already.
            FolderInUseError: another run of this experiment is at work there.
        """
        if self.output is None:
            if self.resume or self.overwrite:
                raise SearchError("--resume and --overwrite need an --output.")
            return
        work = work_folder(self.output, name)
        check_free(work)
        check_output(self.output, resume=False, overwrite=True)  # other experiments' results stay
        if self.resume and self.overwrite:
            raise SearchError("--resume keeps an earlier result and --overwrite replaces it: pass one of them.")
        found = (path for path in (*self.output.glob(f"{name}*"), *work.rglob("*")) if path.is_file())
        if not self.resume and not self.overwrite and any(found):
            raise SearchError(
                f"--output {self.output} holds a result of {name}; pass --resume to go on with it, --overwrite to "
                "replace it."
            )


@dataclass
class Run:
    """One call of an experiment's command. The model is loaded when it is first asked for."""

    name: str
    asked: TaskSpecification
    kept: Kept
    compute: Compute
    command: str

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, without an adapter."""
        return load(self.compute.source)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return load_tokenizer(self.compute.source)

    @cached_property
    def window(self) -> int | None:
        """Its trained window."""
        return trained_window(self.model)

    @cached_property
    def specification(self) -> TaskSpecification:
        """The task that was asked for, nothing left open."""
        asked = with_kept_date(self.asked, self.kept.output, self.kept.resume)
        return resolve_task(asked, self.window, self.compute.source.model is None, self.tokenizer)

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
            section = self._made(experiment) if self.kept.output is None else self._kept(self.kept.output, experiment)
        except KeyboardInterrupt:
            kept = "" if self.kept.output is None else "; go on with the same command and --resume"
            err.print(f"interrupted{kept}.")
            raise typer.Exit(INTERRUPTED) from None
        out.print(to_rich(section))
        if self.kept.output is not None:
            err.print(f"written: {self.kept.output / self.name}.json, .md and plots", highlight=False, soft_wrap=True)

    def _kept(self, folder: Path, experiment: Callable[[Measuring], Section]) -> Section:
        asked = {"command": self.command, "model": model_fingerprint(self.model), "dtype": self.compute.source.dtype}
        keep_date(self.specification, folder)
        return kept_section(folder, self.name, asked, self.kept.resume, lambda work: self._made(experiment, work))

    def _made(self, experiment: Callable[[Measuring], Section], work: Path | None = None) -> Section:
        with RichProgress(err) as audience:
            section = experiment(Measuring(self.compute.batch_tokens, work, self.kept.resume, audience))
        return replace(section, command=self.command)


def experiment(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command `layerrope experiment NAME` of a function whose parameter `run` is a [`Run`].

    The command has the function's other parameters and the options of all experiments.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def command(
            *,
            context: typer.Context,
            model: ModelArgument = None,
            asked: TaskOptions,
            keeping: Annotated[Typed, options_of(Kept)],
            computing: ComputeOptions,
            debug: DebugOption = False,
            **own: Any,
        ) -> None:
            with plain_errors(debug):
                specification, kept = TaskSpecification(**asked), Kept(**keeping)
                kept.check(name)
                run = Run(name, specification, kept, Compute.of(model, computing), _repeated(name, context))
                function(run=run, **own)

        own = parameters_of(function)
        del own["run"]
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        experiment_app.command(name=name)(with_parameters(command, own | parameters_of(command)))
        return function

    return register


def _repeated(name: str, context: typer.Context) -> str:
    """The command line that repeats this call: what differs from the defaults."""
    model = context.params["model"]
    options = [
        # of a switch that is off by default the other spelling turns it off
        (option.secondary_opts[0], True)
        if context.params[option.name] is False and option.secondary_opts
        else (option.opts[0], context.params[option.name])
        for option in context.command.params
        if option.name not in ("model", *_NOT_PART_OF_THE_RESULT) and context.params[option.name] != option.default
    ]
    return command_line(["experiment", name, *([model] if model else [])], options)
