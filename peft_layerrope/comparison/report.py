"""Tables of a [`Comparison`], for terminals and as Markdown; and what a report calls a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..plots import plot_by_position
from ..report import (
    ACCURACY,
    NATS,
    Table,
    fitness_remark,
    legend,
    score_cells,
    unit_of,
    written_columns,
    written_legend,
)
from .compare import Comparison

_ROOM, _GAP = 70, 2  # of 80 columns beside the positions; between two columns
_MIDDLE_NEEDS = 3  # positions

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


def summary_table(comparison: Comparison, title: str = "") -> Table:
    """Returns a line for each contender: average, ends, U, and the paired difference to the first."""
    base, unit = comparison.baseline, unit_of(comparison.measure)
    first = comparison.scores[base]
    wanted = ("loss", "perplexity", "first", "last") if comparison.measure == "loss" else ("accuracy",)
    if comparison.measure != "loss" and len(first.positions) >= _MIDDLE_NEEDS:
        wanted = ("accuracy", "first", "middle", "last", "U")
    several = len(comparison.scores) > 1
    rows = []
    for label, scores in comparison.scores.items():
        gain = "" if label == base else unit.gain(comparison.difference(label, base))
        rows.append((label, *score_cells(scores, wanted).values(), *([gain] if several else [])))
    header = ("", *score_cells(first, wanted), *(["vs first"] if several else []))
    right = "right answers written" if comparison.judged["by"] == "generate()" else "exact match"
    return Table(header, tuple(rows), title, legend(header, comparison.measure, right, gains=True))


def written_table(comparison: Comparison) -> Table | None:
    """Returns a line for each contender with what is known of its written answers beside the metric; None where none
    were written.
    """
    first = comparison.scores[comparison.baseline]
    if first.written is None:
        return None
    rows = []
    for label, scores in comparison.scores.items():
        shares = [scores.average().value, *(values.mean() for values in written_columns(scores).values())]
        lengths = f"{scores.written.num_tokens.mean():.1f}", ACCURACY.value(scores.written.cut_off.mean())
        rows.append((label, *map(ACCURACY.value, shares), NATS.value(scores.log_prob.mean()), *lengths))
    header = ("", "accuracy", *written_columns(first), "log-prob", "tokens", "cut off %")
    return Table(header, tuple(rows), "Written answers and likelihood", " ".join(written_legend(first)[:-1]))


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
    whole = _position_table(comparison)
    widths = [max(len(row[i]) for row in whole.rows) for i in range(1, len(whole.header))]
    tables: list[Table] = []
    for columns in _fitting(widths):
        header, *rows = ((line[0], *(line[i + 1] for i in columns)) for line in (whole.header, *whole.rows))
        parts = ("", "") if tables else (title, whole.caption)
        tables.append(Table(header, tuple(rows), *parts, text_columns=()))
    return tables


def _position_table(comparison: Comparison) -> Table:
    unit = unit_of(comparison.measure)
    positions = map(str, comparison.scores[comparison.baseline].positions)
    columns = [[unit.mean(interval) for interval in scores.intervals()] for scores in comparison.scores.values()]
    loss = comparison.measure == "loss"
    header = ("token" if loss else "position", *comparison.scores)
    caption = BUCKET_LEGEND if loss else POSITION_LEGEND
    return Table(header, tuple(zip(positions, *columns, strict=True)), "", caption, ())


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
    """Returns the tables in Markdown, with what was measured and what the columns mean."""
    tables = summary_table(comparison), _position_table(comparison), written_table(comparison)
    parts = [describe_setting(comparison) + ".", *(table.to_markdown() for table in tables if table is not None)]
    return "\n\n".join([*parts, *fitness_remark(comparison.scores)]) + "\n"


def plot_comparison(comparison: Comparison) -> bytes:
    """Draws every contender's scores over the position, with 95 % bands, as PNG."""
    return plot_by_position(comparison.scores, describe_setting(comparison))


def _is_on(value: Any) -> bool:
    return value is not None and value is not False


def _shown(value: Any) -> str:
    if value is True:
        return "yes"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
