"""The report page: what it says before any experiment, from the search's own record, and how it is put together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from .._version import __version__
from ..errors import SearchError
from ..files import write_atomically, writing
from ..plots import plot_by_position, plot_factors_by_depth
from ..report import escape_markdown, format_factors, times_window, unit_of
from ..searcher.result import NONE, SearchRecord
from ..tuner.config import LayerRopeConfig
from .control_points import genes_of
from .measuring import verdict
from .report_plan import Ran
from .section import Section, SectionFigure, to_html, to_markdown


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
    caption = "Factor of every layer" + (", and the Bézier curve before refinement." if points is not None else ".")
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
