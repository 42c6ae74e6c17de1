"""A section of a report: text, tables and pictures of one experiment, and how it is kept in a folder."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import Annotated, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import StringConstraints, TypeAdapter
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ..files import last_component, read_bytes, read_json_object, to_json, write_atomically, writing
from ..report import Table, escape_markdown, printable
from ..runs import RUN_FOLDER, locked

_MAX_JSON, _MAX_PNG = 64 * 2**20, 16 * 2**20  # bytes
_Name = Annotated[str, StringConstraints(pattern="^[a-z0-9]+(-[a-z0-9]+)*$")]  # it becomes a part of file names


@dataclass(frozen=True)
class SectionFigure:
    """A picture."""

    name: _Name  # unique within the section
    caption: str  # what it shows, also for people who cannot see it
    png: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Section:
    """The result of one experiment."""

    name: _Name  # the experiment's, on the command line
    title: str
    question: str  # what it answers, in one sentence
    measured: str  # what it was measured on, in one line
    findings: tuple[str, ...]  # short sentences, computed from the numbers, the most important first
    tables: tuple[Table, ...] = ()
    figures: tuple[SectionFigure, ...] = ()
    command: str = ""  # the command line that repeats it
    data: dict[str, Any] = field(default_factory=dict)  # everything as JSON values

    def figure_file(self, figure: SectionFigure) -> str:
        """Returns the name of a figure's file, without a folder."""
        return f"{self.name}-{figure.name}.png"

    def write_figures(self, folder: Path) -> None:
        """Writes the pictures into a folder, which is made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        for figure in self.figures:
            (folder / self.figure_file(figure)).write_bytes(figure.png)


_SECTION = TypeAdapter(Section)


def to_rich(section: Section) -> Group:
    """Returns a section for the terminal."""
    parts: list[RenderableType] = [
        Text(printable(section.title), style="bold"),
        Text(printable(section.question), style="italic"),
        Text(printable(section.measured), style="dim"),
    ]
    parts += [Padding(table.to_rich(), (1, 0, 0, 0)) for table in section.tables]
    return Group(*parts, *(Text(f"• {printable(finding)}") for finding in section.findings))


def code_markdown(text: str) -> str:
    """Returns text as a fenced block that it cannot end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}sh\n{printable(text)}\n{fence}"


def to_markdown(section: Section, figures_at: str = "", level: int = 1) -> str:
    """Returns a section as Markdown, with a heading of this level; `figures_at` comes before its figures' files."""
    blocks = [
        f"{'#' * level} {escape_markdown(section.title)}",
        f"*{escape_markdown(section.question)}*",
        "\n".join(f"- {escape_markdown(finding)}" for finding in section.findings),
        escape_markdown(section.measured),
        *(table.to_markdown() for table in section.tables),
        *(f"![{escape_markdown(f.caption)}]({figures_at}{section.figure_file(f)})" for f in section.figures),
        code_markdown(section.command) if section.command else "",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def to_html(
    title: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    skipped: Sequence[tuple[str, str]],
    footer: str,
) -> str:
    """Returns a page that needs nothing else: no other file, no request, no script. `facts` are names and values under
    the title, `skipped` names of experiments that were not run, and why.
    """
    environment = Environment(
        loader=PackageLoader("peft_layerrope.experiments", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # every expression of the template goes through this before it is escaped
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    environment.filters["pieces"] = lambda command: re.split(r" (?=--)", command)  # a line may end between options
    return environment.get_template("report.html.j2").render(
        title=title, facts=facts, sections=sections, skipped=skipped, footer=footer
    )


def command_line(words: Iterable[str], options: Iterable[tuple[str, Any]]) -> str:
    """Returns `layerrope WORDS OPTIONS`, quoted for a shell. Of the options' values, None and False are left out, True
    is a flag, a list repeats its option, a mapping is JSON.
    """
    parts = ["layerrope", *map(shareable, words)]
    for name, value in options:
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is None or one is False:
                continue
            parts.append(name)
            if one is not True:
                parts.append(shareable(_text(one)))
    return shlex.join(parts)


def shareable(text: str) -> str:
    """Returns a path without the folders of this machine: relative ones stay, of others the last part."""
    return last_component(text) if PurePath(text).is_absolute() or text.startswith("~") else text


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)


def work_folder(folder: Path, name: str) -> Path:
    """Returns where a section's parts are kept, and locked; other sections may be made beside it."""
    return folder / RUN_FOLDER / name


def kept_section(
    folder: Path, name: str, asked: Mapping[str, Any], resume: bool, make: Callable[[Path], Section]
) -> Section:
    """Makes a section, given a folder for its parts, and saves it, with what it depends on; with `resume` the section
    that is there is returned, if it answers what is asked now.

    Raises:
        BlockingIOError: another run is making this section in `folder`.
        OSError: a file cannot be written.
    """
    work = work_folder(folder, name)
    with locked(work):
        section = load_section(folder, name, asked) if resume else None
        if section is None:
            section = make(work / _digest(asked))
            save_section(section, folder, asked)
        return section


def save_section(section: Section, folder: Path, asked: Mapping[str, Any]) -> None:
    """Writes a section's files; the JSON last, so that what has one is complete. `asked` is what it depends on."""
    path = folder / f"{section.name}.json"
    values = asdict(section)
    for figure, plain in zip(section.figures, values["figures"], strict=True):
        plain["file"] = section.figure_file(figure)
        del plain["png"]
    with writing(folder):
        path.unlink(missing_ok=True)
        section.write_figures(folder)
        write_atomically(folder / f"{section.name}.md", to_markdown(section))
        write_atomically(path, to_json({"asked": _digest(asked), **values}, indent=2) + "\n")


def load_section(folder: Path, name: str, asked: Mapping[str, Any] | None = None) -> Section | None:
    """Returns a section that [`save_section`] wrote, if it is whole and answers what is asked now; None: anything."""
    try:
        values = read_json_object(folder / f"{name}.json", _MAX_JSON)
        section = _SECTION.validate_python(values)  # names first: they become paths
        pictures = [read_bytes(folder / section.figure_file(figure), _MAX_PNG) for figure in section.figures]
    except ValueError:  # pydantic's and those of files
        return None
    if asked is not None and values.get("asked") != _digest(asked):
        return None
    figures = (replace(figure, png=png) for figure, png in zip(section.figures, pictures, strict=True))
    return replace(section, figures=tuple(figures))


def _digest(asked: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:12]
