"""`layerrope experiment`: one command for each experiment, and what they have in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base_model import load_tokenizer, model_fingerprint
from ..cards import REPORT_NAME
from ..comparison.contenders import Contender, parse_baseline
from ..declaration import changed, declared, option
from ..errors import SearchError, TaskError
from ..experiments import attention, control_points, extrapolation, halves, sweep, transfer, u_shape
from ..experiments.measuring import Measuring, default_lengths, task_of_length, window_and_task
from ..experiments.section import Section, command_line, kept_section, to_rich, work_folder
from ..loading import load_adapter_config
from ..runs import check_free
from ..searcher import FactorGrid, SearchSettings
from ..searcher.plan import RichProgress
from ..searcher.result import read_record
from ..tasks import Task
from ..tasks.specification import TASK_NAMES, TaskName, TaskSpecification
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import trained_window
from .app import INTERRUPTED, app, err, out, plain_errors
from .options import (
    Compute,
    ComputeOptions,
    DebugOption,
    ModelArgument,
    TaskOptions,
    Typed,
    build_task,
    check_output,
    keep_date,
    load,
    options_of,
    parameters_of,
    resolve_task,
    task_option,
    with_kept_date,
    with_parameters,
)

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
            BlockingIOError: another run of this experiment is at work there.
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


app.add_typer(experiment_app)


@experiment(u_shape.NAME)
def u_shape_command(run: Run, groups: GroupsOption = u_shape.DEFAULT_GROUPS) -> None:
    """Is there a dip in the middle? Accuracy by position of the unscaled model, in its window and at --length.

    Example: `layerrope experiment u-shape`

    Example: `layerrope experiment u-shape meta-llama/Llama-3.1-8B-Instruct --length 16384 --output results`
    """
    tasks = window_and_task(run.make_task, run.specification, run.window)
    run.finish(lambda measuring: u_shape.run_u_shape(run.model, tasks, num_groups=groups, measuring=measuring))


@experiment(sweep.NAME)
def sweep_command(
    run: Run,
    *,
    factors: Annotated[
        list[float] | None, typer.Option("--try", help="A factor; may be repeated. Default: 1, 1.1 ... 2.")
    ] = None,
    rope: Annotated[Typed, options_of(SearchSettings, "rope_type", "factor")],
    groups: GroupsOption = sweep.DEFAULT_GROUPS,
) -> None:
    """Scale all layers by one factor at a time: what is won in the middle, and what is lost in the tail?

    Example: `layerrope experiment sweep`

    Example: `layerrope experiment sweep --try 1.25 --try 1.5 --try 3`
    """
    config = LayerRopeConfig(**rope)
    tried = tuple(factors or sweep.DEFAULT_FACTORS)
    run.finish(
        lambda measuring: sweep.run_sweep(
            run.model, run.task, config, factors=tried, num_groups=groups, measuring=measuring
        )
    )


@experiment(halves.NAME)
def halves_command(run: Run, adapter: AdapterOption, groups: GroupsOption = halves.DEFAULT_GROUPS) -> None:
    """Apply an adapter's factors to the first half of the layers, the last half, all, and none.

    Example: `layerrope experiment halves --adapter demo-adapter`
    """
    config = load_adapter_config(adapter)
    run.finish(lambda measuring: halves.run_halves(run.model, run.task, config, num_groups=groups, measuring=measuring))


@experiment(control_points.NAME)
def control_points_command(
    run: Run,
    *,
    adapter: AdapterOption,
    by: Annotated[float, typer.Option(help="How far a coordinate is moved.")] = control_points.STEP,
    grid: Annotated[Typed, options_of(FactorGrid, default="the search's")],
    groups: GroupsOption = control_points.DEFAULT_GROUPS,
) -> None:
    """Move each coordinate of an adapter's Bézier curve up and down: which of them matter?

    Example: `layerrope experiment control-points --adapter demo-adapter`
    """
    config = load_adapter_config(adapter)
    control_points.genes_of(config)  # before a model is loaded
    searched = changed(_grid_of(adapter), grid)
    run.finish(
        lambda measuring: control_points.run_control_points(
            run.model, run.task, config, grid=searched, step=by, num_groups=groups, measuring=measuring
        )
    )


@experiment(attention.NAME)
def attention_command(run: Run, adapter: AdapterOption, groups: GroupsOption = attention.DEFAULT_GROUPS) -> None:
    """Read where the model looks for the answer, layer by layer, with and without an adapter.

    One prompt runs at a time; its last token alone runs with eager attention.

    Example: `layerrope experiment attention --adapter demo-adapter`
    """
    config = load_adapter_config(adapter)
    run.finish(
        lambda measuring: attention.run_attention(run.model, run.task, config, num_groups=groups, measuring=measuring)
    )


@experiment(extrapolation.NAME)
def extrapolation_command(
    run: Run,
    adapters: AdaptersOption,
    lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths such as 4096,8192. Default: 1, 2 and 4 times the window.")
    ] = None,
    baselines: Annotated[
        list[str] | None,
        typer.Option("--baseline", help="A further baseline such as uniform:1.5 or yarn:2; may be repeated."),
    ] = None,
    groups: GroupsOption = extrapolation.DEFAULT_GROUPS,
) -> None:
    """Compare adapters with PI and Dynamic-NTK, matched to the length, as prompts grow beyond the window.

    Example: `layerrope experiment extrapolation --adapter demo-adapter`

    Example: `layerrope experiment extrapolation --adapter demo-adapter --task perplexity --data book.txt --baseline
    yarn:2`
    """
    wanted = _lengths(lengths)
    further = [extrapolation.Line.fixed(parse_baseline(text), is_baseline=True) for text in baselines or []]
    tested = [extrapolation.Line.fixed(Contender.of_adapter(adapter)) for adapter in adapters]
    if run.window is None and wanted is None:
        raise TaskError("the model's config names no trained window (max_position_embeddings): pass --lengths.")
    if wanted is not None:
        tasks = {length: task_of_length(run.make_task, run.specification, length) for length in wanted}
    else:
        tasks, refused = default_lengths(run.make_task, run.specification, run.window)
        for length, reason in refused.items():
            err.print(f"left out {length} tokens: {reason}", highlight=False, markup=False)
    lines = [*extrapolation.matched_baselines(), *further, *tested]
    run.finish(
        lambda measuring: extrapolation.run_extrapolation(
            run.model, tasks, lines, num_groups=groups, measuring=measuring
        )
    )


@experiment(transfer.NAME)
def transfer_command(
    run: Run,
    adapters: AdaptersOption,
    on: Annotated[
        list[str] | None,
        typer.Option("--on", help="A task, with a length if need be: kv_words:512; may be repeated. Default: --task."),
    ] = None,
    groups: GroupsOption = transfer.DEFAULT_GROUPS,
) -> None:
    """Measure every adapter on every task and length: do factors hold where they were not searched?

    Example: `layerrope experiment transfer --adapter demo-adapter --on kv_words:256 --on kv_words:512`
    """
    contenders = [Contender.of_adapter(adapter) for adapter in adapters]
    asked = {cell: _parse_cell(cell) for cell in on or []}
    cells = {cell: _cell_task(run, *parts) for cell, parts in asked.items()}
    if not cells:
        cells = {f"{run.specification.name}:{run.specification.length}": run.task}
    run.finish(
        lambda measuring: transfer.run_transfer(run.model, cells, contenders, num_groups=groups, measuring=measuring)
    )


def _grid_of(adapter: str) -> FactorGrid:
    """The grid that the adapter was searched on, if its folder says so."""
    folder = Path(adapter)
    return read_record(folder).grid if (folder / REPORT_NAME).is_file() else FactorGrid()


def _lengths(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1 or len(set(lengths)) != len(lengths):
        raise SearchError(f"--lengths {text!r} must be distinct numbers of tokens such as 4096,8192.")
    return lengths


def _parse_cell(text: str) -> tuple[TaskName, int | None]:
    name, _, length = text.partition(":")
    if name not in TASK_NAMES or (text != name and not re.fullmatch("[1-9][0-9]{0,8}", length)):
        expected = f"one of {', '.join(TASK_NAMES)}, with a length if need be, such as {TASK_NAMES[0]}:512"
        raise TaskError(f"--on {text!r}: expected {expected}.")
    return name, int(length) if length else None


def _cell_task(run: Run, name: TaskName, length: int | None) -> Task:
    specification = run.specification.of_task(name)
    return run.make_task(specification) if length is None else task_of_length(run.make_task, specification, length)
