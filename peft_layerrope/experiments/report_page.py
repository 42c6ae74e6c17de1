"""A report as one file: HTML that needs nothing else, or Markdown with a folder of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from .._version import __version__
from ..files.atomic import write_atomically, writing
from ..tuner.config import LayerRopeConfig
from .rendering import escape_markdown, to_html, to_markdown
from .report_head import factors_section, facts, held_out_section
from .report_plan import Ran
from .search_record import SearchRecord
from .section import Section

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
        WriteError: a file cannot be written.
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
