"""`layerrope experiment`, with one command for each experiment, and `layerrope report`, which runs them all."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base_model import ModelSource, load_tokenizer, model_fingerprint
from ..cards import REPORT_NAME, SPECIFICATION_NAME
from ..comparison.candidates import Candidate, of_adapters, parse_baseline
from ..declaration import changed, declared, option
from ..errors import SearchError, TaskError
from ..experiments import (
    DEFAULT_GROUPS,
    Measuring,
    attention,
    by_position,
    control_points,
    default_lengths,
    factor_vector,
    transfer,
    window_and_task,
)
from ..experiments.report import ReportRequest, run_steps, write_report
from ..experiments.section import Section, command_line, kept_section, to_rich, work_folder
from ..files import DEMO_NAME, AdapterFiles
from ..loading import load_adapter_config
from ..runs import check_free, locked
from ..searcher.plan import RichProgress
from ..searcher.result import SearchRecord, read_record
from ..searcher.settings import SearchSettings, SearchSpecification, read_specification
from ..searcher.space import FactorGrid
from ..tasks.base import Task
from ..tasks.specification import TaskSpecification, parse_place, task_elsewhere, task_of_length
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
    command,
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

    def finish(self, experiment: Callable[[Measuring], Section], adapters: Sequence[str] = ()) -> None:
        """Runs the experiment, of `adapters` if it is of any, unless a resumed run had ended, prints its section, and
        writes it to `--output`.
        """
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
            asked = {
                "command": self.command,
                "model": model_fingerprint(model),
                "dtype": self.compute.source.dtype,
                # of files the command has the names alone
                "adapters": [Candidate.of_adapter(adapter).identity() for adapter in adapters],
                "data": self.specification.data_digest,
            }
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


@experiment(by_position.U_SHAPE)
def u_shape_command(run: Run) -> None:
    """Is there a dip in the middle? Accuracy by position of the unscaled model, in its window and at --length.

    Example: `layerrope experiment u-shape`

    Example: `layerrope experiment u-shape meta-llama/Llama-3.1-8B-Instruct --length 16384 --output results`
    """
    tasks = window_and_task(run.make_task, run.specification, run.window)
    run.finish(lambda measuring: by_position.run_u_shape(measuring, tasks))


@experiment(by_position.SWEEP)
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
    config, tried = LayerRopeConfig(**rope), factors or by_position.DEFAULT_FACTORS
    run.finish(lambda measuring: by_position.run_sweep(measuring, run.task, config, tried))


@experiment(by_position.HALVES)
def halves_command(run: Run, adapter: AdapterOption) -> None:
    """Apply an adapter's factors to the first half of the layers, the last half, all, and none.

    Example: `layerrope experiment halves --adapter demo-adapter`
    """
    config = load_adapter_config(adapter)
    run.finish(lambda measuring: by_position.run_halves(measuring, run.task, config), [adapter])


@experiment(control_points.NAME)
def control_points_command(
    run: Run,
    *,
    adapter: AdapterOption,
    by: Annotated[float, typer.Option(help="How far a coordinate is moved.")] = control_points.STEP,
    grid: Annotated[Typed, options_of(FactorGrid, default="the search's")],
) -> None:
    """Move each coordinate of an adapter's Bézier curve up and down: which of them matter?

    The curve is one that `layerrope search --algorithm paper` found.

    Example: `layerrope experiment control-points --adapter curve-adapter`
    """
    config, record = load_adapter_config(adapter), read_record(AdapterFiles(adapter).find(REPORT_NAME).parent)
    control_points.genes_of(record.control_points)  # before a model is loaded
    curve = record.control_points, record.settings.layers_to_transform, changed(record.grid, grid)
    run.finish(lambda measuring: control_points.run_control_points(measuring, run.task, config, *curve, by), [adapter])


@experiment(attention.NAME)
def attention_command(run: Run, adapter: AdapterOption) -> None:
    """Read where the model looks for the answer, layer by layer, with and without an adapter.

    One prompt runs at a time; its last token alone runs with eager attention.

    Example: `layerrope experiment attention --adapter demo-adapter`
    """
    config = load_adapter_config(adapter)
    run.finish(lambda measuring: attention.run_attention(measuring, run.task, config), [adapter])


@experiment(transfer.EXTRAPOLATION)
def extrapolation_command(
    run: Run,
    adapters: AdaptersOption,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Prompt lengths such as 4096,8192, as many items as fit. Default: --length, or 1, 2 and 4 windows."
        ),
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
    wanted = _lengths(lengths) or ([run.asked.length] if run.asked.length is not None else [])
    further = [parse_baseline(text) for text in baselines or []]
    tested = of_adapters(adapters)
    tasks = {length: task_of_length(run.make_task, run.specification, length) for length in wanted}
    if not wanted and run.window is not None:
        tasks, refused = default_lengths(run.make_task, run.specification, run.window)
        for length, reason in refused.items():
            err.print(f"left out {length} tokens: {reason}")
    run.finish(lambda measuring: transfer.run_extrapolation(measuring, tasks, tested, further), adapters)


@experiment(transfer.TRANSFER)
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
    candidates = of_adapters(adapters)
    asked = {cell: parse_place(cell, "--on") for cell in on or []}
    cells = {cell: task_elsewhere(run.make_task, run.specification, *place) for cell, place in asked.items()}
    if not cells:
        cells = {f"{run.specification.name}:{run.specification.length}": run.task}
    run.finish(lambda measuring: transfer.run_transfer(measuring, cells, candidates), adapters)


def _lengths(text: str | None) -> list[int]:
    if text is None:
        return []
    lengths = [int(part) for part in text.split(",") if re.fullmatch("[1-9][0-9]{0,8}", part.strip())]
    if len(set(lengths)) != text.count(",") + 1:
        raise SearchError(f"--lengths {text!r} must be distinct numbers of tokens such as 4096,8192.")
    return lengths


_NOT_FROM_A_FILE = ("device", "trust_remote_code")  # it may be a stranger's: that code may run has to be typed
_MOST_WINDOWS = 64  # times the trained window: more is a damaged or hostile file


@command("report")
def report_command(
    *,
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder of an adapter that was searched.")],
    model: Annotated[str | None, typer.Option(help="Hub id or folder. Default: as in search.json.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write. Default: FOLDER/report.html.")] = None,
    kind: Annotated[
        Literal["html", "md"], typer.Option("--format", help="html: one file; md: with a folder of plots.")
    ] = "html",
    also: Annotated[list[str] | None, typer.Option(help="A further adapter to compare with; may be repeated.")] = None,
    groups: Annotated[
        int | None, typer.Option(help="Contexts of every experiment. Default: each has its own.", min=2)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer contexts and factors.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an earlier call has finished.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure all of it anew.")] = False,
    asked: Annotated[Typed, options_of(TaskSpecification, "name", "data", "length")],
    computing: ComputeOptions,
) -> None:
    """Run every experiment that applies to a searched adapter, and write one report.

    Model, task and length are those of the search unless options say otherwise. Finished sections are kept in a folder
    beside the report.

    Example: `layerrope report demo-adapter`

    Example: `layerrope report demo-adapter --quick --format md --output demo.md`
    """
    output = output or folder / f"report.{kind}"
    record, config = read_record(folder), load_adapter_config(str(folder))
    if config.layer_factors != record.layer_factors:
        raise SearchError(f"{folder}: adapter_config.json and search.json have different layer_factors.")
    if not output.suffix or output.is_dir():
        raise SearchError(f"--output {output} must be a file such as report.html.")
    sections = output.with_suffix("")
    check_output(sections, resume, overwrite)
    searched = _searched(folder, record)
    known = {f.name: getattr(searched, f.name) for f in fields(ModelSource) if f.name not in _NOT_FROM_A_FILE}
    compute = Compute.of(model, computing, known)
    # another task has few of the settings of the one that was searched on
    task = searched.task.of_task(asked["name"]) if "name" in asked else searched.task
    if task.data is not None and "data" not in asked:  # a stranger's file does not say which of yours is read
        raise TaskError(f"{folder}: the search read {Path(task.data).name}: pass --data with that file.")
    tokenizer, loaded = load_tokenizer(compute.source), load(compute.source)
    factor_vector(loaded, config)
    window = trained_window(loaded)
    specification = resolve_task(replace(task, **asked), window, compute.source.model is None, tokenizer)
    if window is not None and specification.length > _MOST_WINDOWS * window:
        raise SearchError(
            f"{folder}: prompts of {specification.length} tokens are more than {_MOST_WINDOWS}× the model's window of "
            f"{window}; pass --length."
        )
    build_task(specification, tokenizer)  # one that cannot be made stops here
    request = ReportRequest(
        model=loaded,
        source=compute.source,
        adapter=str(folder),
        config=config,
        record=record,
        specification=specification,
        make_task=lambda wanted: build_task(wanted, tokenizer),
        others=also or [],
        num_groups=groups,
        quick=quick,
    )
    again = repeated(context, ["report", str(folder)], ("folder", "kind"))
    with resumable("the same command and --resume."), locked(sections):
        with RichProgress(err) as audience:
            ran, skipped = run_steps(request, sections, compute.batch_tokens, resume, audience)
        write_report(output, request, ran, skipped, again, markdown=kind == "md")
    for section_name, reason in skipped:
        err.print(f"not run: {section_name}: {reason}")
    out.print(f"report: {output}", soft_wrap=True)


def _searched(folder: Path, record: SearchRecord) -> SearchSpecification:
    """The search that is reported on."""
    path, known = folder / SPECIFICATION_NAME, record.task
    if path.is_file():
        found = SearchSpecification.of(read_specification(path), str(path))
        task = replace(found.task, length=found.task.length or known.length)
    else:
        found, task = SearchSpecification(), known.specification()
    return replace(found, model=None if record.model == DEMO_NAME else record.model, task=task)
