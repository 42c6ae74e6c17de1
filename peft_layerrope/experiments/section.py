"""What an experiment returns: a question, findings, tables and figures. Free of models and of any output format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import SearchError

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class SectionTable:
    """A table of text.

    Attributes:
        header: one name per column.
        rows: cells, as many in each row as in the header.
        title: what it shows.
        caption: how to read it.
        text_columns: indices of the columns that hold words, and are aligned left.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    caption: str = ""
    text_columns: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"a row has {len(row)} cells, expected {len(self.header)}: {row}.")


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
    tables: tuple[SectionTable, ...] = ()
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
            "tables": [
                {
                    "title": table.title,
                    "header": list(table.header),
                    "rows": [list(row) for row in table.rows],
                    "caption": table.caption,
                    "text_columns": list(table.text_columns),
                }
                for table in self.tables
            ],
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


def _table(values: Mapping[str, Any]) -> SectionTable:
    return SectionTable(
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
