"""`layerrope experiment`: one command for each experiment, and what they have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base_model import load_tokenizer, model_fingerprint
from ..cards import REPORT_NAME
from ..comparison.candidates import Candidate, parse_baseline
from ..declaration import changed, declared, option
from ..errors import SearchError, TaskError
from ..experiments import attention, control_points, extrapolation, sweep, transfer, u_shape
from ..experiments.measuring import DEFAULT_GROUPS, Measuring, default_lengths, task_of_length, window_and_task
from ..experiments.section import Section, command_line, kept_section, to_rich, work_folder
from ..loading import load_adapter_config
from ..runs import check_free
from ..searcher.plan import RichProgress
from ..searcher.result import read_record
from ..searcher.settings import SearchSettings
from ..searcher.space import FactorGrid
from ..tasks.base import Task
from ..tasks.specification import TASK_NAMES, TaskName, TaskSpecification
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import trained_window
from . import SUMMARIES, app, err, out, resumable
from .options import (
    TELLING,
    Compute,
    ComputeOptions,
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
    help=SUMMARIES["experiment"],
    no_args_is_help=True,
)
app.add_typer(experiment_app)

AdapterOption = Annotated[str, typer.Option(help="Hub id or folder of an adapter.")]
AdaptersOption = Annotated[
    list[str], typer.Option("--adapter", help="Hub id or folder of an adapter; may be repeated.")
]
GroupsOption = Annotated[int, task_option(help="Held-out contexts; each is asked at every position.", min=2)]

_output = partial(option, panel="Output")


@declared(SearchError)
class Kept:
    """Where a result is kept."""

    output: Annotated[Path | None, _output("Folder for NAME.json, NAME.md and the plots.")] = None
    resume: Annotated[bool, _output("Go on with an interrupted run in --output.", "--resume")] = False
    overwrite: Annotated[bool, _output("Replace an earlier result in --output.", "--overwrite")] = False

    def check(self, name: str) -> None:
        """Refuses an output that the experiment of this name cannot use, before any work."""
        anew = not self.resume and not self.overwrite
        if self.output is None:
            check_output(None, self.resume, self.overwrite)
            return
        work = work_folder(self.output, name)
        check_free(work)
        check_output(self.output, self.resume, self.overwrite or anew)  # other experiments' results stay
        found = (path for path in (*self.output.glob(f"{name}*"), *work.rglob("*")) if path.is_file())
        if anew and any(found):
            raise SearchError(
                f"--output {self.output} holds a result of {name}; pass --resume to go on with it, --overwrite to "
                "replace it."
            )


@dataclass
class Run:
    """One call of an experiment's command. The model is loaded when it is first asked for."""

    name: str
    asked: TaskSpecification
    groups: int
    kept: Kept
    compute: Compute
    command: str

    @cached_property
    def model(self) -> PreTrainedModel:
        return load(self.compute.source)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.compute.source)

    @property
    def window(self) -> int | None:
        return trained_window(self.model)

    @cached_property
    def specification(self) -> TaskSpecification:
        """The task that was asked for, nothing left open."""
        asked = with_kept_date(self.asked, self.kept.output, self.kept.resume)
        return resolve_task(asked, self.window, self.compute.source.model is None, self.tokenizer)

    @cached_property
    def task(self) -> Task:
        return self.make_task(self.specification)

    def make_task(self, specification: TaskSpecification) -> Task:
        return build_task(specification, self.tokenizer)

    def finish(self, experiment: Callable[[Measuring], Section]) -> None:
        """Runs the experiment unless a resumed run had ended, prints its section, and writes it to `--output`."""
        model, folder, resume = self.model, self.kept.output, self.kept.resume

        def made(work: Path | None = None) -> Section:
            with RichProgress(err) as audience:
                measuring = Measuring(model, self.groups, self.compute.batch_tokens, work, resume, audience)
                return replace(experiment(measuring), command=self.command)

        if folder is None:
            out.print(to_rich(made()))
            return
        with resumable("the same command and --resume."):
            keep_date(self.specification, folder)
            dtype = self.compute.source.dtype
            asked = {"command": self.command, "model": model_fingerprint(model), "dtype": dtype}
            section = kept_section(folder, self.name, asked, resume, made)
        out.print(to_rich(section))
        err.print(f"written: {folder / self.name}.json, .md and plots", soft_wrap=True)


def experiment(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command `layerrope experiment NAME` of a function whose parameter `run` is a [`Run`]: with its other
    parameters, and the options of all experiments.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def command(
            *,
            context: typer.Context,
            model: ModelArgument = None,
            groups: GroupsOption = DEFAULT_GROUPS[name],
            asked: TaskOptions,
            keeping: Annotated[Typed, options_of(Kept)],
            computing: ComputeOptions,
            **own: Any,
        ) -> None:
            specification, kept = TaskSpecification(**asked), Kept(**keeping)
            kept.check(name)
            again = repeated(context, ["experiment", name, *([model] if model else [])], ("model",))
            function(run=Run(name, specification, groups, kept, Compute.of(model, computing), again), **own)

        own = parameters_of(function)
        del own["run"]
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        experiment_app.command(name=name)(with_parameters(command, own | parameters_of(command)))
        return function

    return register


_NOT_PART_OF_THE_RESULT = ("output", "resume", "overwrite", *TELLING, "batch_tokens", "device")


def repeated(context: typer.Context, words: Sequence[str], left_out: Sequence[str]) -> str:
    """Returns the command line that repeats a call: `words`, and the options that differ from the defaults; without
    those that are `left_out` or make no difference to the result.
    """
    options = []
    for one in context.command.params:
        value = context.params[one.name]
        if one.name in (*left_out, *_NOT_PART_OF_THE_RESULT) or value == one.default:
            continue
        # of a switch that is on by default the other spelling turns it off
        turned_off = value is False and one.secondary_opts
        options.append((one.secondary_opts[0], True) if turned_off else (one.opts[0], value))
    return command_line(words, options)


@experiment(u_shape.NAME)
def u_shape_command(run: Run) -> None:
    """Is there a dip in the middle? Accuracy by position of the unscaled model, in its window and at --length.

    Example: `layerrope experiment u-shape`

    Example: `layerrope experiment u-shape meta-llama/Llama-3.1-8B-Instruct --length 16384 --output results`
    """
    tasks = window_and_task(run.make_task, run.specification, run.window)
    run.finish(lambda measuring: u_shape.run_u_shape(measuring, tasks))


@experiment(sweep.SWEEP)
def sweep_command(
    run: Run,
    *,
    factors: Annotated[
        list[float] | None, typer.Option("--try", help="A factor; may be repeated. Default: 1, 1.1 ... 2.")
    ] = None,
    rope: Annotated[Typed, options_of(SearchSettings, "rope_type", "factor")],
) -> None:
    """Scale all layers by one factor at a time: what is won in the middle, and what is lost in the tail?

    Example: `layerrope experiment sweep`

    Example: `layerrope experiment sweep --try 1.25 --try 1.5 --try 3`
    """
    config, tried = LayerRopeConfig(**rope), factors or sweep.DEFAULT_FACTORS
    run.finish(lambda measuring: sweep.run_sweep(measuring, run.task, config, tried))


@experiment(sweep.HALVES)
def halves_command(run: Run, adapter: AdapterOption) -> None:
    """Apply an adapter's factors to the first half of the layers, the last half, all, and none.

    Example: `layerrope experiment halves --adapter demo-adapter`
    """
    config = load_adapter_config(adapter)
    run.finish(lambda measuring: sweep.run_halves(measuring, run.task, config))


@experiment(control_points.NAME)
def control_points_command(
    run: Run,
    *,
    adapter: AdapterOption,
    by: Annotated[float, typer.Option(help="How far a coordinate is moved.")] = control_points.STEP,
    grid: Annotated[Typed, options_of(FactorGrid, default="the search's")],
) -> None:
    """Move each coordinate of an adapter's Bézier curve up and down: which of them matter?

    Example: `layerrope experiment control-points --adapter demo-adapter`
    """
    config = load_adapter_config(adapter)
    control_points.genes_of(config)  # before a model is loaded
    folder = Path(adapter)
    searched = changed(read_record(folder).grid if (folder / REPORT_NAME).is_file() else FactorGrid(), grid)
    run.finish(lambda measuring: control_points.run_control_points(measuring, run.task, config, searched, by))


@experiment(attention.NAME)
def attention_command(run: Run, adapter: AdapterOption) -> None:
    """Read where the model looks for the answer, layer by layer, with and without an adapter.

    One prompt runs at a time; its last token alone runs with eager attention.

    Example: `layerrope experiment attention --adapter demo-adapter`
    """
    config = load_adapter_config(adapter)
    run.finish(lambda measuring: attention.run_attention(measuring, run.task, config))


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
) -> None:
    """Compare adapters with PI and Dynamic-NTK, matched to the length, as prompts grow beyond the window.

    Example: `layerrope experiment extrapolation --adapter demo-adapter`

    Example: `layerrope experiment extrapolation --adapter demo-adapter --task perplexity --data book.txt --baseline
    yarn:2`
    """
    wanted = _lengths(lengths)
    further = [parse_baseline(text) for text in baselines or []]
    tested = [Candidate.of_adapter(adapter) for adapter in adapters]
    tasks = {length: task_of_length(run.make_task, run.specification, length) for length in wanted}
    if not wanted and run.window is not None:
        tasks, refused = default_lengths(run.make_task, run.specification, run.window)
        for length, reason in refused.items():
            err.print(f"left out {length} tokens: {reason}")
    run.finish(lambda measuring: extrapolation.run_extrapolation(measuring, tasks, tested, further))


@experiment(transfer.NAME)
def transfer_command(
    run: Run,
    adapters: AdaptersOption,
    on: Annotated[
        list[str] | None,
        typer.Option("--on", help="A task, with a length if need be: kv_words:512; may be repeated. Default: --task."),
    ] = None,
) -> None:
    """Measure every adapter on every task and length: do factors hold where they were not searched?

    Example: `layerrope experiment transfer --adapter demo-adapter --on kv_words:256 --on kv_words:512`
    """
    candidates = [Candidate.of_adapter(adapter) for adapter in adapters]
    asked = {cell: _parse_cell(cell) for cell in on or []}
    cells = {cell: _cell_task(run, *parts) for cell, parts in asked.items()}
    if not cells:
        cells = {f"{run.specification.name}:{run.specification.length}": run.task}
    run.finish(lambda measuring: transfer.run_transfer(measuring, cells, candidates))


def _lengths(text: str | None) -> list[int]:
    if text is None:
        return []
    lengths = [int(part) for part in text.split(",") if re.fullmatch("[1-9][0-9]{0,8}", part.strip())]
    if len(set(lengths)) != text.count(",") + 1:
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
