"""What an experiment returns: a question, findings, tables and figures. Free of models and of any output format."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ..errors import SearchError
from ..report import Table, escape_markdown, printable

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
