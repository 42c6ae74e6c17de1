"""Tables hold the numbers they should; plots are written without touching matplotlib's global state."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from peft_layerrope import PositionScores, plots, report
from peft_layerrope.experiments.section import Section, to_html
from peft_layerrope.report import Table
from peft_layerrope.scoring.scores import Interval
from peft_layerrope.searcher.harm import Harm
from peft_layerrope.searcher.result import HeldOutTables, ResultTable, TableRow
from peft_layerrope.searcher.settings import SearchSettings


class Held(HeldOutTables):
    """What of a search is shown in tables."""

    settings, chosen = SearchSettings(), "per_layer"

    def __init__(self, table: ResultTable) -> None:
        self.table, self.difference = table, table.difference


def rendered(*tables: Table) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tables:
        console.print(table.to_rich())
    return console.export_text()


def scores(hits: list[list[int]]) -> PositionScores:
    correct = np.array(hits, dtype=bool)
    return PositionScores((0, 5, 10), correct, np.where(correct, -0.1, -3.0))


@pytest.fixture
def table() -> ResultTable:
    before = scores([[1, 0, 0], [1, 0, 1], [0, 0, 1], [1, 0, 1]])
    after = scores([[1, 1, 0], [1, 0, 1], [1, 1, 1], [1, 1, 1]])
    middle = scores([[1, 1, 0], [1, 0, 0], [0, 0, 1], [1, 1, 1]])
    harm = [Harm(Interval(value, 0.0, 2 * value), Interval(-value, -1.0, 1.0)) for value in (0.0, 0.002, 0.004)]
    return ResultTable(
        (
            TableRow("none", (1.0, 1.0), -2.0, 1, before, harm[0]),
            TableRow("uniform_bounded", (1.5, 1.5), -1.5, 9, middle, harm[1]),
            TableRow("per_layer", (1.1, 2.0), -1.0, 40, after, harm[2]),
        )
    )


def test_markdown_table(table):
    lines = Held(table).held_out_table().to_markdown().splitlines()
    head = "| candidate | accuracy | worst | U | vs none | vs uniform | tried | KL | text loss | factors |"
    assert lines[0] == head
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:5]]
    assert [row[0] for row in cells] == ["no scaling", "uniform within bound", "per layer"]
    assert [row[6:] for row in cells] == [
        ["1", "0.0000", "-0.0000", "1"],
        ["9", "0.0020", "-0.0020", "1.5"],
        ["40", "0.0040", "-0.0040", "1.1 2"],
    ]
    assert [row[1].split(" ")[0] for row in cells] == ["50.0", "58.3", "83.3"]
    assert [row[2] for row in cells] == ["0.0", "50.0", "75.0"]
    assert [row[4].split(" ")[0] for row in cells] == ["", "+8.3", "+33.3"]
    assert [row[5].split(" ")[0] for row in cells] == ["-8.3", "", "+25.0"]


def test_candidates_of_the_same_factors_have_no_difference(table):
    same = replace(table["uniform_bounded"], name="uniform")
    lines = Held(ResultTable((*table, same))).held_out_table().to_markdown().splitlines()
    cells = [cell.strip() for cell in lines[5].strip("|").split("|")]
    assert cells[0] == "best uniform factor"
    assert cells[4].startswith("+8.3")
    assert cells[5] == ""
    held = Held(ResultTable((table["none"], same, *table.rows[1:])))
    assert [held.label(row.name) for row in held.table] == ["no scaling", *2 * ["best uniform factor"], "per layer"]


def test_a_table_without_the_baselines_compares_with_nothing(table):
    text = Held(ResultTable(table.rows[2:])).held_out_table().to_markdown()
    assert text.startswith("| candidate | accuracy | worst | U | tried | KL |")


def test_terminal_tables_fit_80_columns(table):
    held = Held(table)
    positions = report.position_table(table["per_layer"].scores, "demo")
    text = rendered(held.choice_table(), held.scores_table("Held out"), positions)
    assert "…" not in text
    for words in ("per layer", "+33.3 ± ", "1.1 2", "83.3 ["):
        assert words in text


def test_differences_are_paired_and_signed(table):
    assert table.difference("per_layer", "none").value == pytest.approx(1 / 3)
    assert table.difference("none", "per_layer").value == pytest.approx(-1 / 3)
    assert "per_layer" in table
    with pytest.raises(KeyError, match="no row 'random'; the table has none, uniform_bounded, per_layer"):
        table["random"]


def test_plots_need_no_display_and_no_pyplot(table):
    curves = {row.label: row.scores for row in table}
    points = [(0, 1.0), (0.3, 1.2), (0.6, 1.8), (1, 2.0)]
    for picture in (
        plots.plot_by_position(curves, "a subtitle"),
        plots.plot_factors_by_depth([1.0, 1.0, 1.4, 2.0], control_points=points, scaled_layers=[2, 3]),
    ):
        assert picture.startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(("factors", "text"), [((1.3, 1.3), "1.3"), ((1.0, 2.0), "1 2")])
def test_format_factors(factors, text):
    assert report.format_factors(factors) == text


SAVED = np.array([0.4, 0.5, 0.6])
SAVED_HALF = stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)


@pytest.fixture
def losses() -> ResultTable:
    """Three windows in two buckets; the factors per layer save 0.4 to 0.6 nats in each."""
    before = np.array([[-2.0, -1.0], [-3.0, -2.0], [-2.5, -1.0]])
    rows = (("none", (1.0, 1.0), before), ("per_layer", (1.0, 1.5), before + SAVED[:, None]))
    harm = Harm(Interval(0.0, 0.0, 0.0))
    nothing = np.zeros(before.shape, dtype=bool)
    return ResultTable(
        tuple(
            TableRow(name, factors, -1.0, 9, PositionScores((1, 64), nothing, values, "loss"), harm)
            for name, factors, values in rows
        )
    )


def test_a_search_by_loss_has_a_table_of_losses(losses):
    lines = Held(losses).held_out_table().to_markdown().splitlines()
    assert lines[0] == "| candidate | loss | perplexity | vs none | tried | KL | text loss | factors |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:4]]
    mean = (2 + 1 + 3 + 2 + 2.5 + 1) / 6
    assert [row[1].split(" ")[0] for row in cells] == [f"{mean:.3f}", f"{mean - 0.5:.3f}"]
    assert [row[2] for row in cells] == [f"{math.exp(mean):.2f}", f"{math.exp(mean - 0.5):.2f}"]
    assert [row[3] for row in cells] == ["", f"+0.500 ± {SAVED_HALF:.3f}"]
    assert "nats of loss saved" in lines[-1]
    assert "exact match" not in lines[-1]


def test_loss_tables_of_the_terminal(losses):
    positions = report.position_table(losses["none"].scores, "demo")
    text = rendered(Held(losses).scores_table("Held out"), positions)
    low, high = stats.ttest_1samp([2.0, 3.0, 2.5], 0).confidence_interval(0.95)
    for words in (
        f"2.500 [{low:.3f}, {high:.3f}]",
        f"{math.exp(2.5):.2f} [{math.exp(low):.2f}, {math.exp(high):.2f}]",
        f"+0.500 ± {SAVED_HALF:.3f}",
    ):
        assert words in text
    assert "…" not in text
    assert "U" not in text.replace("Uniform", "")


def page_of(table: Table) -> str:
    section = Section("one", "A section", "", "", (), (table,))
    return to_html("A page", [], [section], [], "")


@pytest.mark.parametrize("title", ["", "What it shows"])
@pytest.mark.parametrize("form", ["rich", "markdown", "html"])
def test_a_table_has_its_cells_in_every_form(form, title):
    table = Table(("name", "accuracy"), (("a_b <c>", "50.0 [40.1, 59.9]"), ("d", "-1.0 ± 2.0")), title, "How to read.")
    of_form = {"rich": lambda: rendered(table), "markdown": table.to_markdown, "html": lambda: page_of(table)}
    text = of_form[form]()
    for words in (*table.header, *table.rows[1], title, table.caption, "50.0 [40.1, 59.9]"):
        assert words in text
    assert {"rich": "a_b <c>", "markdown": r"a\_b &lt;c>", "html": "a_b &lt;c&gt;"}[form] in text


@pytest.mark.parametrize(
    ("tokens", "window", "text"),
    [
        (512, 256, " = 2.0× the trained window"),
        (1004, 32768, " = 0.03× the trained window"),  # not 0.0
        (512, None, ""),
    ],
)
def test_lengths_are_put_beside_the_window(tokens, window, text):
    assert report.times_window(tokens, window) == text
