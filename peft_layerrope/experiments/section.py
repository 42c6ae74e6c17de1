"""What an experiment returns: a question, findings, tables and figures. Free of models and of any output format."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ..errors import SearchError
from ..report import Table, Unit, escape_markdown, printable, unit_of
from ..scoring.scores import Interval, PositionScores

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


GREY = "0.5"
COLOURS = (GREY, "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The first is for the model as it is. The others, Okabe and Ito's, can be told apart with any colour vision."""

_DASHES = ("-", "-", "--", ":")
_DPI = 150
_WIDTH = 7.2
_LONGEST = 120  # characters of a label or a title


def new_figure(height: float = 4.2, panels: int = 1, **settings: object) -> tuple[Figure, list[Axes]]:
    """Returns a figure with panels side by side, outside of matplotlib's global state."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, **settings)[0]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def plain(text: str) -> str:
    """Returns text, cut short, that matplotlib draws as it is: between dollar signs it would look for formulas."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return (text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…").replace("$", r"\$")


def to_png(figure: Figure, title: str, measured: str) -> bytes:
    """Puts a title over a figure and returns it as PNG; the same figure gives the same bytes."""
    figure.suptitle(f"{plain(title)}\n{plain(measured)}", x=0.01, ha="left", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def legend_below(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """A legend that no line can run through."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False, fontsize=8
    )


def percent_axis(axes: Axes, unit: Unit) -> None:
    """Labels the y axis; an accuracy has all of 0 to 100 %."""
    axes.set_ylabel(f"{unit.name} ({unit.symbol})")
    if unit.scale > 0:
        axes.set_ylim(-3, 103)


def relative_positions(positions: Sequence[int]) -> np.ndarray:
    """Positions from 0, the first, to 1, the last."""
    values = np.asarray(positions, dtype=np.float64)
    return (values - values[0]) / (values[-1] - values[0])


def draw_positions(axes: Axes, curves: Mapping[str, PositionScores], band: bool = True) -> None:
    """Draws scores over the relative position of the answer, one line per label, with 95 % bands."""
    styles = zip(cycle(COLOURS), cycle(_DASHES), strict=False)
    for (label, scores), (colour, dash) in zip(curves.items(), styles, strict=False):
        unit, x = unit_of(scores.measure), relative_positions(scores.positions)
        if band:
            intervals = scores.intervals()
            edges = np.array([unit.shown([getattr(i, end) for i in intervals]) for end in ("low", "high")])
            axes.fill_between(x, *np.where(np.isfinite(edges), edges, np.nan), color=colour, alpha=0.15, linewidth=0)
        y = unit.shown(scores.value_by_position)
        width = 2.6 if dash == "-" else 1.6  # so that lines that coincide can be told
        axes.plot(x, y, marker="o", linestyle=dash, linewidth=width, color=colour, label=plain(label), markersize=4)
    axes.set_xlabel("place of the answer in the prompt (0: first, 1: last)")
    percent_axis(axes, unit)


def draw_line(
    axes: Axes, x: Sequence[float], intervals: Sequence[Interval], unit: Unit, label: str, colour: str, shift: float = 0
) -> None:
    """Draws means with their intervals as bars."""
    middle = unit.shown([i.value for i in intervals])
    ends = np.sort([unit.shown([i.low for i in intervals]), unit.shown([i.high for i in intervals])], axis=0)
    ends = np.where(np.isfinite(ends), ends, middle)  # an infinite interval has no bar
    axes.errorbar(
        np.asarray(x) + shift,
        middle,
        yerr=[middle - ends[0], ends[1] - middle],
        fmt="o-",
        color=colour,
        label=plain(label),
        markersize=4,
        elinewidth=1,
        capsize=2,
    )


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
