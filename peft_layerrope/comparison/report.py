"""Tables of a [`Comparison`], for terminals and as Markdown; and what a report calls a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from ..plots import plot_by_position
from ..report import (
    difference,
    fitness_remark,
    markdown,
    percent,
    rich_table,
    value_with_interval,
    written_columns,
    written_legend,
)
from ..scoring.scores import PositionScores, perplexity
from .compare import Comparison

_ROOM, _GAP = 70, 2  # of 80 columns beside the positions; between two columns
_MIDDLE_NEEDS = 3  # positions

ACCURACY_LEGEND = (
    "accuracy: {what} in %, mean over all gold positions; middle: mean of the inner ones; U: context utilisation of "
    "the accuracies. Brackets and ±: 95 % intervals over contexts; differences are paired, + is better."
)
LOSS_LEGEND = (
    "loss: mean over the scored tokens, in nats; first, last: of the first and the last bucket. Brackets and ±: 95 % "
    "intervals over windows; differences are paired, in nats of loss saved: + is better."
)
POSITION_LEGEND = "Accuracy in % by gold position, with 95 % Wilson intervals."
BUCKET_LEGEND = "Loss in nats of the tokens from each position to the next, with 95 % intervals over windows."


def describe_task(task: Mapping[str, Any]) -> str:
    """Writes a task's description in one line: its name and every setting that is on."""
    settings = [f"{name.replace('_', ' ')}: {_shown(v)}" for name, v in task.items() if name != "name" and _is_on(v)]
    return f"{task.get('name', 'task')} ({'; '.join(settings)})" if settings else str(task.get("name", "task"))


def describe_setting(comparison: Comparison) -> str:
    """Writes what was measured in one line: task, split, how it was judged, and what a scaling's name does not say."""
    split, unit = comparison.split, "windows" if comparison.measure == "loss" else "contexts"
    held = f"{split['name']} split, {split['groups']} {unit}, up to {split['max_tokens']} tokens"
    if "protocol" in split:
        held += f", {split['protocol']}"
    scalings = [f"{label}: {what['scaling']}" for label, what in comparison.contenders.items() if what.get("scaling")]
    return "; ".join([describe_task(comparison.task), held, describe_judge(comparison.judged), *scalings])


def describe_judge(judged: Mapping[str, Any]) -> str:
    """Writes how answers were judged."""
    if judged["by"] == "loss":
        return "loss of the next token"
    if judged["by"] != "generate()":
        return "teacher-forced exact match"
    return f"generate(), judged by {judged['metric']}, up to {judged['max_new_tokens']} new tokens"


def summary_table(comparison: Comparison, title: str) -> Table:
    """Returns a line for each contender as a rich table of at most 80 columns: average, ends, U, and the paired
    difference to the first.
    """
    return rich_table(title, _legend(comparison), *_summary_cells(comparison), left=(0,))


def written_table(comparison: Comparison) -> Table | None:
    """Returns a line for each contender with what is known of its written answers beside the metric; None where none
    were written.
    """
    header, cells = _written_cells(comparison)
    legend = " ".join(written_legend(comparison.scores[comparison.baseline])[:-1])
    return rich_table("Written answers and likelihood", legend, header, cells, left=(0,)) if cells else None


def _written_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    first = comparison.scores[comparison.baseline]
    if first.written is None:
        return [], []
    header = ["", "accuracy", *written_columns(first), "log-prob", "tokens", "cut off %"]
    cells = []
    for label, scores in comparison.scores.items():
        more = [percent(values.mean()) for values in written_columns(scores).values()]
        lengths = [f"{scores.written.num_tokens.mean():.1f}", percent(scores.written.cut_off.mean())]
        log_prob = f"{scores.log_prob.mean():.3f}"
        cells.append([label, percent(scores.average().value), *more, log_prob, *lengths])
    return header, cells


def forced_by_position_tables(comparison: Comparison, title: str) -> list[Table]:
    """Returns, where answers were written, the same by position for the teacher-forced pass; see
    [`by_position_tables`].
    """
    forced = {
        label: replace(scores, correct=scores.written.forced)
        for label, scores in comparison.scores.items()
        if scores.written is not None and scores.written.forced is not None
    }
    return by_position_tables(replace(comparison, scores=forced), title) if forced else []


def by_position_tables(comparison: Comparison, title: str) -> list[Table]:
    """Returns scores by position with their intervals, a column for each contender; several tables of at most 80
    columns where one would be wider.
    """
    caption = BUCKET_LEGEND if comparison.measure == "loss" else POSITION_LEGEND
    (name, *labels), cells = _position_cells(comparison.scores)
    widths = [max(len(row[i]) for row in cells) for i in range(1, len(labels) + 1)]
    tables: list[Table] = []
    for columns in _fitting(widths):
        header = [name, *(labels[i] for i in columns)]
        lines = [[row[0], *(row[i + 1] for i in columns)] for row in cells]
        table = rich_table("" if tables else title, None, header, lines, left=(), folded=range(1, len(header)))
        for column, i in zip(table.columns[1:], columns, strict=True):
            column.width = widths[i]  # a long label is folded above its cells, which stay whole
        tables.append(table)
    tables[0].caption = caption
    return tables


def _fitting(widths: Sequence[int]) -> list[list[int]]:
    """Groups columns of such widths, in order, so that each group fits beside the positions."""
    groups: list[list[int]] = [[]]
    for i, width in enumerate(widths):
        taken = sum(widths[k] + _GAP for k in groups[-1])
        if groups[-1] and taken + width + _GAP > _ROOM:
            groups.append([])
        groups[-1].append(i)
    return groups


def comparison_markdown(comparison: Comparison) -> str:
    """Returns both tables in Markdown, with what was measured and what the columns mean."""
    parts = [describe_setting(comparison) + "."]
    positions = _position_cells(comparison.scores)
    legends = _legend(comparison), BUCKET_LEGEND if comparison.measure == "loss" else POSITION_LEGEND
    for (header, cells), legend in zip((_summary_cells(comparison), positions), legends, strict=True):
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
        parts += [markdown([[_escaped(cell) for cell in line] for line in lines]), legend]
    header, cells = _written_cells(comparison)
    if cells:
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
        legend = " ".join(written_legend(comparison.scores[comparison.baseline])[:-1])
        parts += [markdown([[_escaped(cell) for cell in line] for line in lines]), legend]
    return "\n\n".join([*parts, *fitness_remark(comparison.scores)]) + "\n"


def plot_comparison(comparison: Comparison, path: str | Path) -> None:
    """Draws every contender's scores over the position, with 95 % bands, as PNG."""
    plot_by_position(comparison.scores, path, describe_setting(comparison))


def _legend(comparison: Comparison) -> str:
    if comparison.measure == "loss":
        return LOSS_LEGEND
    generated = comparison.judged["by"] == "generate()"
    return ACCURACY_LEGEND.format(what="right answers written" if generated else "exact match")


def _summary_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    measure, base = comparison.measure, comparison.baseline
    columns = _value_columns(comparison.scores[base])
    header = ["", *columns, *(["vs first"] if len(comparison.scores) > 1 else [])]
    cells = []
    for label, scores in comparison.scores.items():
        line = [label, *_values(scores)]
        if len(comparison.scores) > 1:
            line.append("" if label == base else difference(comparison.difference(label, base), measure))
        cells.append(line)
    return header, cells


def _value_columns(scores: PositionScores) -> list[str]:
    if scores.measure == "loss":
        return ["loss", "perplexity", *(["first", "last"] if len(scores.positions) > 1 else [])]
    if len(scores.positions) < _MIDDLE_NEEDS:
        return ["accuracy"]
    return ["accuracy", "first", "middle", "last", "U"]


def _values(scores: PositionScores) -> list[str]:
    average, by_position = scores.average(), scores.value_by_position
    line = [value_with_interval(average, scores.measure)]
    if scores.measure == "loss":
        line.append(f"{perplexity(-average.value):.2f}")
        return line + ([f"{-by_position[0]:.3f}", f"{-by_position[-1]:.3f}"] if len(by_position) > 1 else [])
    if len(by_position) < _MIDDLE_NEEDS:
        return line
    ends = (by_position[0], by_position[1:-1].mean(), by_position[-1], scores.utilisation())
    return line + [percent(value) for value in ends]


def _position_cells(curves: Mapping[str, PositionScores]) -> tuple[list[str], list[list[str]]]:
    first = next(iter(curves.values()))
    columns = [
        [value_with_interval(interval, scores.measure) for interval in scores.intervals()] for scores in curves.values()
    ]
    name = "token" if first.measure == "loss" else "position"
    return [name, *curves], [[str(p), *row] for p, row in zip(first.positions, zip(*columns, strict=True), strict=True)]


def _is_on(value: Any) -> bool:
    return value is not None and value is not False


def _shown(value: Any) -> str:
    if value is True:
        return "yes"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
