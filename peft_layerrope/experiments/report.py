"""The report of a model: which experiments it has, running them, and the page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import nn

from .. import __version__
from ..base_model import ModelSource, format_model_args, model_fingerprint
from ..comparison.candidates import Candidate, of_adapters
from ..declaration import as_options
from ..errors import LayerRopeError
from ..files import last_component, write_atomically, writing
from ..plots import plot_by_position, plot_factors_by_depth
from ..report import escape_markdown, format_factors, times_window, unit_of
from ..searcher.plan import SearchProgress
from ..searcher.result import SearchRecord
from ..searcher.space import default_scaled_layers
from ..tasks.base import Task
from ..tasks.specification import MakeTask, TaskSpecification
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import trained_window
from . import (
    DEFAULT_GROUPS,
    Measuring,
    attention,
    by_position,
    control_points,
    default_lengths,
    layer_sensitivity,
    transfer,
    verdict,
    window_and_task,
)
from .section import Section, SectionFigure, command_line, kept_section, to_html, to_markdown

Pairs = list[tuple[str, str]]
"""Names, and what is said of them."""


def facts(record: SearchRecord, config: LayerRopeConfig) -> Pairs:
    """What was searched, as names and values."""
    task = record.task.name
    length = record.test.max_tokens if record.test is not None else record.task.length
    if length is not None:
        task += f", prompts of up to {length} tokens{times_window(length, record.model_window)}"
    scaling = config.rope_type if config.rope_type == "default" else f"{config.rope_type}, factor {config.factor:g}"
    found = [
        ("base model", record.model),
        ("task", task),
        ("rope type", scaling),
        ("factors by layer", format_factors(config.layer_factors or record.layer_factors)),
        ("chosen", record.label(record.chosen)),
        ("range", "{:g} to {:g}".format(*record.grid.limits)),
    ]
    tried = record.evaluations.get("all_methods")
    if tried is not None:
        found.append(("evaluated", f"{tried} distinct candidates in all"))
    if record.searcher_version is not None:
        found.append(("searched with", f"peft_layerrope {record.searcher_version}"))
    return found


def held_out_section(record: SearchRecord) -> Section:
    """The held-out table, as the search wrote it."""
    unit = unit_of(record.table[0].scores.measure)
    chosen, findings = record.label(record.chosen), []
    for name in record.against:
        gap = record.difference(record.chosen, name)
        if gap is not None:
            findings.append(verdict(f'"{chosen}"', f'"{record.label(name)}"', gap, unit))
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
        question="What did the search find, and how do its candidates do on examples it has not seen?",
        measured=record.subtitle(),
        findings=tuple(dict.fromkeys(findings)),
        tables=(record.held_out_table(),),
        figures=figures,
    )


def factors_section(record: SearchRecord) -> Section:
    """The factor of every layer, with the curve that it came from where there is one."""
    factors = record.layer_factors
    layers = record.settings.layers_to_transform or default_scaled_layers(len(factors))
    points = record.control_points if control_points.is_curve(record.control_points) else None
    if max(layers) >= len(factors):
        layers = None
    caption = f"Factor of every layer{', and the Bézier curve that they are read off' if points else ''}."
    ones = sum(factor == 1 for factor in factors)
    picture = plot_factors_by_depth(factors, control_points=points, scaled_layers=layers)
    return Section(
        name="factors",
        title="Factors by depth",
        question="",
        measured="",
        findings=(f"Factors from {min(factors):g} to {max(factors):g}; {ones} of {len(factors)} are 1.",),
        figures=(SectionFigure("depth", caption, picture),),
    )


_FOOTER = (
    "Every section is measured on examples that did not choose the factors, unless it says otherwise. Written by "
    f"peft_layerrope {__version__}."
)


def write_report(
    path: Path, request: ReportRequest, experiments: Sequence[Section], skipped: Pairs, command: str, *, markdown: bool
) -> None:
    """Writes the report as HTML, or as Markdown with its pictures in a folder that is named as the file without its
    ending. `command` repeats it.
    """
    record, config = request.record, request.config
    sections = [held_out_section(record), factors_section(record), *experiments]
    title = f"Report on {last_component(request.adapter)}: per-layer RoPE scaling for {record.model}"
    known = [*facts(record, config), ("this report", command)]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not markdown:
            write_atomically(path, to_html(title, known, sections, skipped, _FOOTER))  # opens with the first findings
            return
        folder = path.with_suffix("")
        verdict = [escape_markdown(finding) + "\n" for finding in sections[0].findings]
        blocks = [f"# {escape_markdown(title)}\n", *verdict, _list(known)]
        for section in sections:
            section.write_figures(folder)
            blocks.append(to_markdown(section, f"{quote(folder.name)}/", level=2))
        if skipped:
            blocks.append("## Not run\n\n" + _list(skipped))
        write_atomically(path, "\n".join([*blocks, escape_markdown(_FOOTER), ""]))


def _list(pairs: Pairs) -> str:
    return "\n".join(f"- {escape_markdown(name)}: {escape_markdown(value)}" for name, value in pairs) + "\n"


QUICK_GROUPS = 12
_QUICK_SWEEP = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)


@dataclass(frozen=True)
class ReportRequest:
    """What a report is about."""

    model: nn.Module  # without an adapter
    source: ModelSource  # as which it was loaded
    adapter: str  # its folder, as it was named
    config: LayerRopeConfig
    record: SearchRecord
    specification: TaskSpecification  # of the task that it was searched on, nothing left open
    make_task: MakeTask
    others: Sequence[str]  # further adapters
    num_groups: int | None  # contexts of every experiment; None: each has its own default
    quick: bool  # fewer contexts and factors

    def groups(self, name: str) -> int:
        """Contexts of an experiment."""
        default = DEFAULT_GROUPS[name]
        return self.num_groups or (min(QUICK_GROUPS, default) if self.quick else default)

    def command(self, step: Step) -> str:
        """The command line that repeats an experiment."""
        is_own = step.name == layer_sensitivity.NAME  # a command that is older than the experiments
        words = [step.name] if is_own else ["experiment", step.name]
        words += [self.source.model] if self.source.model is not None else []
        own = [("--model-args", format_model_args(self.source)), *step.options]
        return command_line(words, [*own, *as_options(self.specification), ("--groups", self.groups(step.name))])

    def asked(self, step: Step) -> dict[str, Any]:
        """What a step's section depends on."""
        candidates = [Candidate.of_config("", self.config), *map(Candidate.of_adapter, self.others)]
        return {
            "command": self.command(step),
            "model": model_fingerprint(self.model),
            "adapters": [candidate.identity() for candidate in candidates],
            "data": self.specification.data_digest,
            "control_points": self.record.control_points,
            "layers_to_transform": self.record.settings.layers_to_transform,
            "grid": list(self.record.grid.values),
        }


@dataclass(frozen=True)
class Step:
    """One experiment of a report."""

    name: str  # of its section
    run: Callable[[Measuring], Section]  # raises a LayerRopeError if it does not apply
    options: tuple[tuple[str, Any], ...] = ()  # beside model, task and contexts, for the command that repeats it


def report_steps(request: ReportRequest) -> tuple[list[Step], Pairs]:
    """Returns the experiments that may apply, and those that do not from the start, with the reason."""
    config, make, specification, skipped = request.config, request.make_task, request.specification, []
    window, task, record = trained_window(request.model), make(specification), request.record
    curve = record.control_points, record.settings.layers_to_transform, record.grid
    adapter = (("--adapter", request.adapter),)
    rope = (("--rope-type", config.rope_type), ("--factor", config.factor)) if config.rope_type != "default" else ()
    factors = _QUICK_SWEEP if request.quick else by_position.DEFAULT_FACTORS
    tried = (*rope, ("--try", list(factors) if request.quick else None))
    steps = [
        Step(by_position.U_SHAPE, lambda m: by_position.run_u_shape(m, window_and_task(make, specification, window))),
        Step(by_position.SWEEP, lambda m: by_position.run_sweep(m, task, config, factors), tried),
        Step(layer_sensitivity.NAME, lambda m: layer_sensitivity.run_sensitivity(m, task, config), rope),
        Step(by_position.HALVES, lambda m: by_position.run_halves(m, task, config), adapter),
        Step(control_points.NAME, lambda m: control_points.run_control_points(m, task, config, *curve), adapter),
        Step(attention.NAME, lambda m: attention.run_attention(m, task, config), adapter),
    ]
    tasks: dict[int, Task] = {}
    if window is None:
        skipped.append((transfer.EXTRAPOLATION, "the model's config names no trained window to extrapolate from."))
    else:
        tasks, refused = default_lengths(make, specification, window)
        skipped += [(f"{transfer.EXTRAPOLATION} at {length} tokens", reason) for length, reason in refused.items()]
    adapters = [request.adapter, *request.others]
    candidates = of_adapters(adapters)
    if tasks:
        options = ("--adapter", adapters), ("--lengths", ",".join(map(str, tasks)))
        steps.append(
            Step(
                transfer.EXTRAPOLATION,
                lambda m: transfer.run_extrapolation(m, tasks, candidates),
                options,
            )
        )
    if not request.others:
        skipped.append((transfer.TRANSFER, "it compares adapters: pass another one beside this."))
    elif tasks:
        cells = {f"{specification.name}:{length}": task for length, task in tasks.items()}
        options = ("--adapter", adapters), ("--on", list(cells))
        steps.append(Step(transfer.TRANSFER, lambda m: transfer.run_transfer(m, cells, candidates), options))
    return steps, skipped


def run_steps(
    request: ReportRequest, folder: Path, batch_tokens: int, resume: bool, audience: SearchProgress
) -> tuple[list[Section], Pairs]:
    """Runs the experiments of a report, each kept in `folder` as soon as it is there.

    Returns:
        The sections, and the names of experiments that do not apply, with the reason.
    """
    steps, skipped = report_steps(request)
    sections = []
    measuring = Measuring(request.model, 0, batch_tokens, resume=resume, audience=audience)
    for step in steps:

        def make(work: Path, step: Step = step) -> Section:
            measuring.num_groups, measuring.folder = request.groups(step.name), work
            return replace(step.run(measuring), command=request.command(step))

        asked = request.asked(step)  # an adapter that cannot be read concerns all of them
        try:
            sections.append(kept_section(folder, step.name, asked, resume, make))
        except LayerRopeError as error:
            skipped.append((step.name, str(error)))
    return sections, skipped
