"""A section as rich tables, as Markdown, and as HTML. One renderer each; all text is escaped."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .section import Section, SectionFigure, SectionTable

_MARKDOWN_SPECIAL = re.compile(r"[\\`*_\[\]|~$]|^(?:[#>+=-]|\d+(?=[.)]))")
_TEMPLATE = "report.html.j2"
_WIDEST_WORD = 20  # in a terminal; longer ones are broken


def printable(text: str) -> str:
    """Returns text without control characters, which could move a terminal's cursor or turn the direction of text."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def to_rich(section: Section) -> Group:
    """Returns a section for the terminal."""
    parts: list[RenderableType] = [
        Text(printable(section.title), style="bold"),
        Text(printable(section.question), style="italic"),
        Text(printable(section.measured), style="dim"),
    ]
    parts += [_rich_table(table) for table in section.tables]
    parts += [Text(f"• {printable(finding)}") for finding in section.findings]
    return Group(*(Padding(part, (1, 0, 0, 0)) if isinstance(part, Table) else part for part in parts))


def _rich_table(table: SectionTable) -> Table:
    rendered = Table(
        title=Text(printable(table.title)) if table.title else None,
        caption=Text(printable(table.caption)) if table.caption else None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for index, name in enumerate(table.header):
        words = [word for cell in (name, *(row[index] for row in table.rows)) for word in cell.split()]
        rendered.add_column(
            Text(printable(name)),
            justify="left" if index in table.text_columns else "right",
            overflow="fold",
            min_width=min(max(map(len, words), default=1), _WIDEST_WORD),  # cells break between words alone
        )
    for row in table.rows:
        rendered.add_row(*(Text(printable(cell)) for cell in row))
    return rendered


def escape_markdown(text: str) -> str:
    """Returns text that Markdown shows as it is: in one line, and free of markup and HTML."""
    text = printable(" ".join(text.split()))
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return _MARKDOWN_SPECIAL.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}"


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
    blocks += [table_markdown(table) for table in section.tables]
    for figure in section.figures:
        blocks.append(f"![{escape_markdown(figure.caption)}]({figures_at}{section.figure_file(figure)})")
    if section.command:
        blocks.append(code_markdown(section.command))
    return "\n\n".join(block for block in blocks if block) + "\n"


def table_markdown(table: SectionTable) -> str:
    """Returns a table as Markdown, with its title before and its caption after."""
    lines = [table.header, ["---" if i in table.text_columns else "---:" for i in range(len(table.header))]]
    cells = [[escape_markdown(cell) for cell in table.header], lines[1]]
    cells += [[escape_markdown(cell) for cell in row] for row in table.rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in cells)
    parts = [f"**{escape_markdown(table.title)}**" if table.title else "", body, escape_markdown(table.caption)]
    return "\n\n".join(part for part in parts if part)


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
