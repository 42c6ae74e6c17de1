"""Tables of a comparison hold its numbers, within 80 columns."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from peft_layerrope import PositionScores
from peft_layerrope.comparison import (
    Comparison,
    by_position_tables,
    comparison_markdown,
    describe_setting,
    describe_task,
    plot_comparison,
    summary_table,
)
from peft_layerrope.scoring.scores import utilization

TASK = {
    "name": "multi_doc_qa",
    "num_documents": 20,
    "positions": [0, 9, 19],
    "distractors": "drawn from other questions' passages",
    "chat_template": False,
    "data": None,
}
SPLIT = {"name": "test", "groups": 100, "max_tokens": 3501}
LABELS = ("no scaling", "first_and_rest:1.5,2", "yarn:2", "a-very-long-name-of-an-adapter-from-the-hub", "last")


def comparison(measure: str = "accuracy", count: int = 5, num_positions: int = 5, scale: float = 1.0) -> Comparison:
    rng = np.random.default_rng(0)
    shape = (100, num_positions)
    scores = {
        label: PositionScores(
            tuple(range(0, 10 * num_positions, 10)),
            rng.random(shape) < 0.3 + 0.1 * i,
            -scale * (rng.random(shape) + 2 - 0.1 * i),
            measure,
        )
        for i, label in enumerate(LABELS[:count])
    }
    judged = {"by": "loss", "buckets": num_positions} if measure == "loss" else {"by": "teacher-forced"}
    return Comparison(scores, {label: {} for label in scores}, TASK, SPLIT, judged)


def rendered(*tables: object) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tables:
        console.print(table.to_rich())
    return console.export_text()


def cells_of(markdown: str, table: int) -> list[list[str]]:
    """Lines of the n-th table, the header first."""
    tables, rows = [], []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip().replace("\\", "") for cell in line.strip("|").split("|")])
        elif rows:
            tables.append([rows[0], *rows[2:]])
            rows = []
    return tables[table]


def test_the_summary_holds_averages_ends_and_paired_differences():
    found = comparison()
    header, *rows = cells_of(comparison_markdown(found), 0)
    assert header == ["", "accuracy", "first", "middle", "last", "U", "vs first"]
    assert [row[0] for row in rows] == list(LABELS)
    for label, average, first, middle, last, used, versus in rows:
        by_position = found.scores[label].accuracy_by_position
        expected = (by_position[0], by_position[1:-1].mean(), by_position[-1], utilization(by_position))
        assert [first, middle, last, used] == [f"{100 * value:.1f}" for value in expected]
        assert average.split(" ")[0] == f"{100 * by_position.mean():.1f}"
        gap = found.difference(label, "no scaling")
        assert versus == (
            "" if label == "no scaling" else f"{100 * gap.value:+.1f} ± {100 * (gap.high - gap.value):.1f}"
        )


def test_losses_are_losses_and_plus_is_better():
    found = comparison("loss")
    header, *rows = cells_of(comparison_markdown(found), 0)
    assert header == ["", "loss", "perplexity", "first", "last", "vs first"]
    for label, average, perplexity, first, last, versus in rows:
        losses = -found.scores[label].log_prob
        assert average.split(" ")[0] == f"{losses.mean():.3f}"
        assert perplexity == f"{np.exp(losses.mean()):.2f}"
        assert [first, last] == [f"{losses[:, i].mean():.3f}" for i in (0, -1)]
        saved = -found.scores["no scaling"].log_prob.mean() - losses.mean()
        assert versus == "" or versus.startswith(f"{saved:+.3f} ")
        assert versus == "" or saved > 0
    assert "nats of loss saved: + is better" in comparison_markdown(found)


@pytest.mark.parametrize("measure", ["accuracy", "loss"])
def test_positions_have_their_intervals(measure):
    found = comparison(measure)
    header, *rows = cells_of(comparison_markdown(found), 1)
    assert header[1:] == list(LABELS)
    for place, row in enumerate(rows):
        assert row[0] == str(10 * place)
        for label, cell in zip(LABELS, row[1:], strict=True):
            i = found.scores[label].intervals()[place]
            expected = (i.value, i.low, i.high) if measure == "accuracy" else (-i.value, -i.high, -i.low)
            numbers = [float(number) for number in cell.replace("[", "").replace("]", "").replace(",", "").split()]
            scale, digits = (100, 0.06) if measure == "accuracy" else (1, 0.0006)
            np.testing.assert_allclose(numbers, scale * np.array(expected), atol=digits)


@pytest.mark.parametrize("scale", [1.0, 4.0])  # of losses below and above 10 nats
@pytest.mark.parametrize("measure", ["accuracy", "loss"])
def test_terminal_tables_fit_80_columns_and_are_complete(measure, scale):
    found = comparison(measure, scale=scale)
    summary = rendered(summary_table(found, "a title"))
    tables = by_position_tables(found, "by position")
    by_position = rendered(*tables)
    for text in (summary, by_position):
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
    for line in cells_of(comparison_markdown(found), 0)[1:]:
        assert all(cell in summary for cell in line[1:])
    for line in cells_of(comparison_markdown(found), 1)[1:]:
        assert all(cell in by_position for cell in line)
    assert len(tables) >= 2
    assert all(label in by_position for label in ("no scaling", "yarn:2", "last"))


@pytest.mark.parametrize(("num_positions", "columns"), [(1, ["accuracy"]), (2, ["accuracy"])])
def test_without_a_middle_there_are_no_ends(num_positions, columns):
    header, *_ = cells_of(comparison_markdown(comparison(num_positions=num_positions)), 0)
    assert header == ["", *columns, "vs first"]


def test_one_candidate_is_compared_with_nothing():
    assert cells_of(comparison_markdown(comparison(count=1)), 0)[0][-1] == "U"


def test_the_task_is_named_with_its_settings():
    text = describe_task(TASK)
    assert text == (
        "multi_doc_qa (num documents: 20; positions: 0 9 19; distractors: drawn from other questions' passages)"
    )
    setting = describe_setting(comparison())
    assert setting.startswith(text)
    assert setting.endswith("test split, 100 contexts, up to 3501 tokens; teacher-forced exact match")
    assert describe_task({}) == "task"


@pytest.mark.parametrize("metric", ["contains_value", "best_subspan_em"])
def test_generated_answers_are_labelled(metric):
    found = comparison()
    judged = {"by": "generate()", "metric": metric, "max_new_tokens": 12}
    found = Comparison(found.scores, found.candidates, found.task, found.split, judged)
    assert describe_setting(found).endswith(f"generate(), judged by {metric}, up to 12 new tokens")
    assert "accuracy: right answers written" in comparison_markdown(found)
    assert "exact match" not in comparison_markdown(found)


@pytest.mark.parametrize("measure", ["accuracy", "loss"])
def test_the_plot_is_written(measure):
    assert plot_comparison(comparison(measure), "a model").startswith(b"\x89PNG")
