"""The report of a model: which experiments it has, running them, and the page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import nn

from .. import __version__
from ..base_model import model_fingerprint
from ..comparison.contenders import Contender
from ..declaration import as_options
from ..errors import LayerRopeError, SearchError
from ..files import write_atomically, writing
from ..plots import plot_by_position, plot_factors_by_depth
from ..report import escape_markdown, format_factors, times_window, unit_of
from ..searcher.result import NONE, SearchRecord
from ..searcher.space import FactorGrid
from ..tasks import Task
from ..tasks.specification import TaskSpecification
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import trained_window
from . import attention, control_points, extrapolation, halves, layer_sensitivity, sweep, transfer, u_shape
from .control_points import genes_of
from .measuring import MakeTask, Measuring, default_lengths, verdict, window_and_task
from .section import Section, SectionFigure, command_line, kept_section, to_html, to_markdown


def facts(record: SearchRecord, config: LayerRopeConfig) -> list[tuple[str, str]]:
    """What was searched, as names and values."""
    chosen = record.row(record.chosen)
    scaling = config.rope_type if config.rope_type == "default" else f"{config.rope_type}, factor {config.factor:g}"
    tried = record.evaluations.get("all_methods")
    found = [
        ("base model", record.model),
        ("task", f"{record.task.name}{_length(record)}"),
        ("rope type", scaling),
        ("factors by layer", format_factors(config.layer_factors or record.layer_factors)),
        ("chosen", chosen.label if chosen is not None else record.chosen),
        ("range", f"{record.grid.min_factor:g} to {record.grid.max_factor:g} in steps of {record.grid.step:g}"),
    ]
    if tried is not None:
        found.append(("evaluated", f"{tried} distinct factor vectors, all methods together"))
    if record.searcher_version is not None:
        found.append(("searched with", f"peft_layerrope {record.searcher_version}"))
    return found


def held_out_section(record: SearchRecord) -> Section:
    """The held-out table, as the search wrote it."""
    unit = unit_of(record.table[0].scores.measure)
    gaps = {name: record.difference(record.chosen, name) for name in dict.fromkeys([NONE, *record.against])}
    chosen = record.row(record.chosen).label
    curves = {
        label: scores
        for label, scores in record.curves_to_plot().items()
        if scores.accuracy_by_position is not None and len(set(scores.positions)) > 1
    }
    figures = ()
    if curves:
        caption = "Accuracy by position on the held-out split; bands: 95 % Wilson intervals."
        figures = (SectionFigure("positions", caption, plot_by_position(curves, record.subtitle())),)
    return Section(
        name="held-out",
        title="Held-out comparison of the search",
        question="What did each method find on the search split, and how does it do on examples it has not seen?",
        measured=record.subtitle(),
        findings=tuple(
            verdict(f'"{chosen}"', f'"{record.row(name).label}"', gap, unit)
            for name, gap in gaps.items()
            if gap is not None and record.row(name) is not None
        ),
        tables=(record.held_out_table(),),
        figures=figures,
    )


def factors_section(config: LayerRopeConfig) -> Section:
    """The factor of every layer, with the curve that it came from where there is one."""
    factors = config.layer_factors or []
    points, layers = config.control_points, config.scaled_layers
    try:
        genes_of(config)
    except SearchError:
        points = None
    if not layers or max(layers) >= len(factors):
        layers = None
    picture = plot_factors_by_depth(factors, control_points=points, scaled_layers=layers)
    caption = "Factor of every layer" + (
        ", and the Bézier curve that they are read off." if points is not None else "."
    )
    lowest, highest = min(factors), max(factors)
    finding = (
        f"Factors from {lowest:g} to {highest:g}; {sum(factor == 1 for factor in factors)} of {len(factors)} are 1."
    )
    return Section(
        name="factors",
        title="Factors by depth",
        question="",
        measured="",
        findings=(finding,),
        figures=(SectionFigure("depth", caption, picture),),
    )


def _length(record: SearchRecord) -> str:
    if record.task.length is None:
        return ""
    return f", prompts of up to {record.task.length} tokens{times_window(record.task.length, record.model_window)}"


_FOOTER = (
    "Every section is measured on examples that did not choose the factors, unless it says otherwise. Written by "
    f"peft_layerrope {__version__}."
)


def write_report(
    path: Path, record: SearchRecord, config: LayerRopeConfig, name: str, ran: Ran, command: str, *, markdown: bool
) -> None:
    """Writes the report.

    Args:
        path: the file; Markdown has its pictures in a folder beside it, named as the file without its ending.
        record: the search.
        config: the adapter.
        name: the adapter's name.
        ran: the experiments.
        command: the command line that repeats the report.
        markdown: Markdown instead of HTML.

    Raises:
        OSError: a file cannot be written.
    """
    head = [held_out_section(record), factors_section(config)]
    title = f"Report on {name}: per-layer RoPE scaling for {record.model}"
    known = [*facts(record, config), ("this report", command)]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if markdown:
            text = _markdown(path.with_suffix(""), title, known, [*head, *ran.sections], ran.skipped)
        else:
            text = to_html(title, known, head, ran.sections, ran.skipped, _FOOTER)
        write_atomically(path, text)


def _markdown(
    folder: Path,
    title: str,
    known: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    skipped: Sequence[tuple[str, str]],
) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [f"# {escape_markdown(title)}\n", _list(known)]
    for section in sections:
        for figure in section.figures:
            (folder / section.figure_file(figure)).write_bytes(figure.png)
        blocks.append(to_markdown(section, f"{quote(folder.name)}/", level=2))
    if skipped:
        blocks.append("## Not run\n\n" + _list(skipped))
    return "\n".join([*blocks, escape_markdown(_FOOTER), ""])


def _list(pairs: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- {escape_markdown(name)}: {escape_markdown(value)}" for name, value in pairs) + "\n"


QUICK_GROUPS = 12
_QUICK_SWEEP = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)


@dataclass(frozen=True)
class ReportRequest:
    """What a report is about.

    Attributes:
        model: without an adapter.
        model_option: the model as it was named on the command line; None: the demo model.
        model_args: how it is loaded, as `--model-args` takes it; None: as usual.
        adapter: its folder, as it was named.
        config: its configuration.
        grid: the factors that its search could choose from.
        specification: the task that it was searched on, resolved.
        make_task: makes tasks.
        others: further adapters.
        num_groups: contexts of every experiment; None: each has its own default.
        quick: fewer contexts and factors.
    """

    model: nn.Module
    model_option: str | None
    adapter: str
    config: LayerRopeConfig
    grid: FactorGrid
    specification: TaskSpecification
    make_task: MakeTask
    others: Sequence[str] = ()
    num_groups: int | None = None
    quick: bool = False
    model_args: str | None = None

    def groups(self, default: int) -> int:
        """Contexts of an experiment."""
        if self.num_groups is not None:
            return self.num_groups
        return min(QUICK_GROUPS, default) if self.quick else default

    def task(self) -> Task:
        """The task that was searched on."""
        return self.make_task(self.specification)


@dataclass(frozen=True)
class Step:
    """One experiment of a report.

    Attributes:
        name: of its section.
        run: measures; raises a LayerRopeError if it does not apply.
        options: beside model and task, for the command line that repeats it.
        groups: its contexts.
    """

    name: str
    run: Callable[[Measuring], Section]
    groups: int
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Ran:
    """What became of the steps."""

    sections: tuple[Section, ...]
    skipped: tuple[tuple[str, str], ...]


def report_steps(request: ReportRequest) -> tuple[list[Step], list[tuple[str, str]]]:
    """Returns the experiments that may apply, and those that do not from the start, with the reason."""
    model, config, skipped = request.model, request.config, []
    window = trained_window(model)
    adapter = (("--adapter", request.adapter),)
    factors = _QUICK_SWEEP if request.quick else sweep.DEFAULT_FACTORS
    groups = {name: request.groups(default) for name, default in _DEFAULT_GROUPS.items()}

    def scaled(module: Any, **settings: Any) -> Callable[[Measuring], Section]:
        run = getattr(module, "run_" + module.NAME.replace("-", "_"))
        return lambda measuring: run(
            model, request.task(), config, num_groups=groups[module.NAME], measuring=measuring, **settings
        )

    def u_shaped(measuring: Measuring) -> Section:
        return u_shape.run_u_shape(
            model,
            window_and_task(request.make_task, request.specification, window),
            num_groups=groups[u_shape.NAME],
            measuring=measuring,
        )

    steps = [
        Step(u_shape.NAME, u_shaped, groups[u_shape.NAME]),
        Step(
            sweep.NAME,
            scaled(sweep, factors=factors),
            groups[sweep.NAME],
            (*_rope(config), ("--try", list(factors) if request.quick else None)),
        ),
        Step(layer_sensitivity.NAME, scaled(layer_sensitivity), groups[layer_sensitivity.NAME], _rope(config)),
        Step(halves.NAME, scaled(halves), groups[halves.NAME], adapter),
        Step(control_points.NAME, scaled(control_points, grid=request.grid), groups[control_points.NAME], adapter),
        Step(attention.NAME, scaled(attention), groups[attention.NAME], adapter),
    ]
    everyone = [request.adapter, *request.others]
    contenders = [Contender.of_adapter(one) for one in everyone]
    if window is None:
        skipped.append((extrapolation.NAME, "the model's config names no trained window to extrapolate from."))
    else:
        tasks, refused = default_lengths(request.make_task, request.specification, window)
        skipped += [(f"{extrapolation.NAME} at {length} tokens", reason) for length, reason in refused.items()]
        if tasks:
            lines = [*extrapolation.matched_baselines(), *map(extrapolation.Line.fixed, contenders)]
            steps.append(
                Step(
                    extrapolation.NAME,
                    lambda measuring: extrapolation.run_extrapolation(
                        model, tasks, lines, num_groups=groups[extrapolation.NAME], measuring=measuring
                    ),
                    groups[extrapolation.NAME],
                    (("--adapter", everyone), ("--lengths", ",".join(map(str, tasks)))),
                )
            )
            if request.others:
                name = request.specification.name
                cells = {f"{name}:{length}": task for length, task in tasks.items()}
                steps.append(
                    Step(
                        transfer.NAME,
                        lambda measuring: transfer.run_transfer(
                            model, cells, contenders, num_groups=groups[transfer.NAME], measuring=measuring
                        ),
                        groups[transfer.NAME],
                        (("--adapter", everyone), ("--on", list(cells))),
                    )
                )
    if not request.others:
        skipped.append((transfer.NAME, "it compares adapters: pass another one with --also."))
    return steps, skipped


def run_steps(
    request: ReportRequest,
    folder: Path,
    *,
    batch_tokens: int,
    resume: bool,
    audience: Any,
) -> Ran:
    """Runs the experiments of a report, each kept in `folder` as soon as it is there.

    Args:
        request: what the report is about.
        folder: for finished sections and the parts of unfinished ones.
        batch_tokens: tokens per forward pass.
        resume: keep sections and parts in `folder` that answer the same request.
        audience: whom to tell how far it is.

    Raises:
        BlockingIOError: another run is at work in `folder`.
        OSError: a file cannot be written.
    """
    steps, skipped = report_steps(request)
    sections = []
    for step in steps:

        def make(work: Path, step: Step = step) -> Section:
            section = step.run(Measuring(batch_tokens, work, resume, audience))
            return replace(section, command=_command(request, step))

        asked = _asked(request, step)  # an adapter that cannot be read concerns all of them
        try:
            sections.append(kept_section(folder, step.name, asked, resume, make))
        except LayerRopeError as error:
            skipped.append((step.name, str(error)))
    return Ran(tuple(sections), tuple(skipped))


_DEFAULT_GROUPS = {
    u_shape.NAME: u_shape.DEFAULT_GROUPS,
    sweep.NAME: sweep.DEFAULT_GROUPS,
    layer_sensitivity.NAME: layer_sensitivity.DEFAULT_GROUPS,
    halves.NAME: halves.DEFAULT_GROUPS,
    control_points.NAME: control_points.DEFAULT_GROUPS,
    attention.NAME: attention.DEFAULT_GROUPS,
    extrapolation.NAME: extrapolation.DEFAULT_GROUPS,
    transfer.NAME: transfer.DEFAULT_GROUPS,
}


def _rope(config: LayerRopeConfig) -> tuple[tuple[str, Any], ...]:
    if config.rope_type == "default":
        return ()
    return (("--rope-type", config.rope_type), ("--factor", config.factor))


def _command(request: ReportRequest, step: Step) -> str:
    is_own = step.name == layer_sensitivity.NAME  # a command that is older than the experiments
    words = [step.name] if is_own else ["experiment", step.name]
    words += [request.model_option] if request.model_option is not None else []
    own = [("--model-args", request.model_args), *step.options]
    return command_line(words, [*own, *as_options(request.specification), ("--groups", step.groups)])


def _asked(request: ReportRequest, step: Step) -> dict[str, Any]:
    """What a step's section depends on."""
    return {
        "command": _command(request, step),
        "model": model_fingerprint(request.model),
        "adapters": [Contender.of_config("", request.config).identity()]
        + [Contender.of_adapter(other).identity() for other in request.others],
        "control_points": request.config.control_points,
        "scaled_layers": request.config.scaled_layers,
        "grid": list(request.grid.values),
    }
