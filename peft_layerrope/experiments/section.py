"""A section of a report: text, tables and pictures of one experiment, and how it is kept in a folder."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ..errors import SearchError
from ..files import read_bytes, read_json_object, to_json, write_atomically, writing
from ..messages import last_component
from ..report import Table, escape_markdown, printable
from ..runs import RUN_FOLDER, locked

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class SectionFigure:
    """A picture.

    Attributes:
        name: unique within the section; letters, digits and hyphens.
        caption: what it shows, also for people who cannot see it.
        png: the picture.
    """

    name: str
    caption: str
    png: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check_name(self.name)


@dataclass(frozen=True)
class Section:
    """The result of one experiment.

    Attributes:
        name: the experiment's name on the command line.
        title: for people.
        question: what it answers, in one sentence.
        measured: what it was measured on, in one line.
        findings: short sentences, computed from the numbers, the most important first.
        tables: the numbers.
        figures: the pictures.
        data: everything as JSON values.
        command: the command line that repeats it.
    """

    name: str
    title: str
    question: str
    measured: str
    findings: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    figures: tuple[SectionFigure, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""

    def __post_init__(self) -> None:
        _check_name(self.name)

    def figure_file(self, figure: SectionFigure) -> str:
        """Returns the name of a figure's file, without a folder."""
        return f"{self.name}-{figure.name}.png"

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the pictures as JSON values; see [`from_dict`]."""
        return {
            "name": self.name,
            "title": self.title,
            "question": self.question,
            "measured": self.measured,
            "findings": list(self.findings),
            "tables": [asdict(table) for table in self.tables],
            "figures": [
                {"name": figure.name, "caption": figure.caption, "file": self.figure_file(figure)}
                for figure in self.figures
            ],
            "command": self.command,
            "data": dict(self.data),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Section:
        """The inverse of [`to_dict`].

        Args:
            values: what it returned.
            pictures: each figure's PNG, by the figure's name.

        Raises:
            SearchError: they are not such values.
        """
        try:
            return cls(
                **{name: str(values[name]) for name in ("name", "title", "question", "measured", "command")},
                findings=tuple(map(str, values["findings"])),
                tables=tuple(_table(table) for table in values["tables"]),
                figures=tuple(
                    SectionFigure(figure["name"], str(figure["caption"]), pictures[figure["name"]])
                    for figure in values["figures"]
                ),
                data=dict(values["data"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SearchError(f"these are not the values of a section: {error!r}.") from error


def _table(values: Mapping[str, Any]) -> Table:
    return Table(
        header=tuple(map(str, values["header"])),
        rows=tuple(tuple(map(str, row)) for row in values["rows"]),
        title=str(values["title"]),
        caption=str(values["caption"]),
        text_columns=tuple(map(int, values["text_columns"])),
    )


def _check_name(name: object) -> None:
    """It becomes a part of file names, and a saved section's comes from a file."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError(f"name {name!r} must be lower-case letters, digits and hyphens.")


_TEMPLATE = "report.html.j2"


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
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}sh\n{printable(text)}\n{fence}"


def to_markdown(section: Section, figures_at: str = "", level: int = 1) -> str:
    """Returns a section as Markdown.

    Args:
        section: what to write.
        figures_at: where its figures' files are, ending in a slash.
        level: of its heading.
    """
    blocks = [f"{'#' * level} {escape_markdown(section.title)}", f"*{escape_markdown(section.question)}*"]
    blocks.append("\n".join(f"- {escape_markdown(finding)}" for finding in section.findings))
    blocks.append(escape_markdown(section.measured))
    blocks += [table.to_markdown() for table in section.tables]
    for figure in section.figures:
        blocks.append(f"![{escape_markdown(figure.caption)}]({figures_at}{section.figure_file(figure)})")
    if section.command:
        blocks.append(code_markdown(section.command))
    return "\n\n".join(block for block in blocks if block) + "\n"


def to_html(
    title: str,
    facts: Sequence[tuple[str, str]],
    head: Sequence[Section],
    sections: Sequence[Section],
    skipped: Iterable[tuple[str, str]],
    footer: str,
) -> str:
    """Returns a page that needs nothing else: no other file, no request, no script.

    Args:
        title: of the page.
        facts: names and values under the title.
        head: sections that come before the experiments.
        sections: the experiments.
        skipped: names of experiments that were not run, and why.
        footer: the last line.
    """
    environment = Environment(
        loader=PackageLoader("peft_layerrope.experiments", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"picture": _data_uri, "pieces": _pieces}
    environment.finalize = _finalized
    return environment.get_template(_TEMPLATE).render(
        title=title, facts=facts, head=head, sections=sections, skipped=list(skipped), footer=footer
    )


def _data_uri(figure: SectionFigure) -> str:
    return f"data:image/png;base64,{base64.b64encode(figure.png).decode()}"


def _pieces(command: str) -> list[str]:
    """A command line, in pieces that begin with an option: a line may end between them."""
    return re.split(r" (?=--)", command)


def _finalized(value: Any) -> Any:
    """Every expression of the template goes through here before it is escaped."""
    return printable(value) if type(value) is str else value


def command_line(words: Iterable[str], options: Iterable[tuple[str, Any]]) -> str:
    """Returns `layerrope WORDS OPTIONS`, quoted for a shell.

    Args:
        words: the command and its arguments.
        options: names and values; None and False are left out, True is a flag, a list repeats its option, a mapping is
            JSON.
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
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)


_MAX_JSON, _MAX_PNG = 64 * 2**20, 16 * 2**20


def work_folder(folder: Path, name: str) -> Path:
    """Returns where a section's parts are kept, and locked; other sections may be made beside it."""
    return folder / RUN_FOLDER / name


def kept_section(
    folder: Path, name: str, asked: Mapping[str, Any], resume: bool, make: Callable[[Path], Section]
) -> Section:
    """Makes a section and saves it; keeps others from making it in the same folder meanwhile.

    Args:
        folder: for the section's files, and for the parts of an unfinished one; made if it is missing.
        name: of the section.
        asked: what it depends on.
        resume: return the section that is there, if it answers what is asked now.
        make: makes it, given a folder for its parts.

    Raises:
        BlockingIOError: another run is making this section in `folder`.
        OSError: a file cannot be written.
    """
    work = work_folder(folder, name)
    with locked(work):
        section = find_section(folder, name, asked) if resume else None
        if section is None:
            section = make(work / digest_of(asked))
            save_section(section, folder, asked)
        return section


def digest_of(asked: Mapping[str, Any]) -> str:
    """Returns a short hash of what an experiment was asked."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:12]


def save_section(section: Section, folder: Path, asked: Mapping[str, Any] | None = None) -> Path:
    """Writes a section's files; the JSON last, so that what has one is complete.

    Args:
        section: what to write.
        folder: made if it is missing.
        asked: what the section depends on, so that [`find_section`] knows whether it is still the answer.

    Returns:
        The path of the JSON file.

    Raises:
        OSError: a file cannot be written.
    """
    path = folder / f"{section.name}.json"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        for figure in section.figures:
            (folder / section.figure_file(figure)).write_bytes(figure.png)
        write_atomically(folder / f"{section.name}.md", to_markdown(section))
        content = {"asked": digest_of(asked or {}), **section.to_dict()}
        write_atomically(path, to_json(content, indent=2) + "\n")
    return path


def load_section(folder: Path, name: str) -> Section:
    """Reads a section that [`save_section`] wrote.

    Raises:
        SearchError: a file is missing or damaged.
    """
    return _load(folder, name)[0]


def find_section(folder: Path, name: str, asked: Mapping[str, Any]) -> Section | None:
    """Returns a saved section if it is whole and answers what is asked now; else None."""
    try:
        section, digest = _load(folder, name)
    except SearchError:
        return None
    return section if digest == digest_of(asked) else None


def _load(folder: Path, name: str) -> tuple[Section, str]:
    path = folder / f"{name}.json"
    try:
        values = read_json_object(path, _MAX_JSON)
        figures = values.get("figures")
        names = [f["name"] for f in figures if isinstance(f, dict)] if isinstance(figures, list) else []
        # a name from the file becomes a path only if it is one that a figure may have
        pictures = {
            figure: read_bytes(folder / f"{name}-{figure}.png", _MAX_PNG)
            for figure in names
            if isinstance(figure, str) and figure.replace("-", "").isalnum()
        }
    except (ValueError, KeyError) as error:
        raise SearchError(f"{path} cannot be read as a section: {error}.") from error
    return Section.from_dict(values, pictures), str(values.get("asked"))
