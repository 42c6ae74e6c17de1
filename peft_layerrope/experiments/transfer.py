"""Do factors that were searched on one task and length help on others? Every adapter in every cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..comparison.candidates import NO_SCALING, Candidate
from ..plots import new_figure, plain, to_png
from ..report import Table, Unit, legend, times_window, unit_of
from ..scoring.scores import Interval, PositionScores
from ..tasks.base import Task
from .measuring import Measuring, json_data
from .section import Section, SectionFigure

NAME = "transfer"


def run_transfer(measuring: Measuring, cells: Mapping[str, Task], adapters: Sequence[Candidate]) -> Section:
    """Measures each adapter on each task, against no scaling; tasks by a name such as `"kv_words:512"`."""
    splits = {cell: measuring.split(task) for cell, task in cells.items()}
    scores = {
        cell: measuring.scores(split, [Candidate(NO_SCALING), *adapters], f"{NAME}, {cell}", str(number))
        for number, (cell, split) in enumerate(splits.items())
    }
    gains = {
        adapter.label: {
            cell: by_label[adapter.label].paired_difference(by_label[NO_SCALING]) for cell, by_label in scores.items()
        }
        for adapter in adapters
    }
    units = {cell: unit_of(split.measure) for cell, split in splits.items()}
    measured = f"{len(cells)} cells, {measuring.num_groups} contexts of the test split in each"
    header = ("adapter", *(f"{cell} ({unit.symbol})" for cell, unit in units.items()))
    values = [
        (label, *(units[cell].mean(by_label[label].average()) for cell, by_label in scores.items()))
        for label in (NO_SCALING, *gains)
    ]
    changes = [
        (label, *(units[cell].change(gain) for cell, gain in by_cell.items())) for label, by_cell in gains.items()
    ]
    lengths = "; ".join(
        f"{cell}: {split.max_tokens} tokens{times_window(split.max_tokens, measuring.window)}"
        for cell, split in splits.items()
    )
    legends = " ".join(dict.fromkeys(legend([units[cell].name], split.measure) for cell, split in splits.items()))
    return Section(
        name=NAME,
        title="Transfer between tasks and lengths",
        question="Do factors that were searched on one task and length help on others?",
        measured=measured,
        findings=tuple(_finding(label, by_cell, units) for label, by_cell in gains.items()),
        tables=(
            Table(header, tuple(values), "Average accuracy or loss", f"{lengths}. {legends}"),
            Table(header, tuple(changes), f"Difference to {NO_SCALING}"),
        ),
        figures=(_heat_map(scores, gains, units, measured),),
        data=json_data(
            tasks=cells,
            splits=splits,
            scores=scores,
            average_minus_none=gains,
        ),
    )


def _finding(label: str, gains: dict[str, Interval], units: dict[str, Unit]) -> str:
    better = [cell for cell, gain in gains.items() if gain.low > 0]
    worse = [cell for cell, gain in gains.items() if gain.high < 0]
    if len(better) == len(gains):
        verdict = "helps in every cell"
    elif better:
        verdict = f"helps on {', '.join(better)} and not elsewhere"
    else:
        verdict = "helps nowhere beyond noise"
    if worse:
        verdict += f"; hurts on {', '.join(worse)}"
    return f"{label} {verdict} ({', '.join(f'{cell} {units[cell].change_in_words(gains[cell])}' for cell in gains)})."


def _heat_map(
    scores: dict[str, dict[str, PositionScores]],
    gains: dict[str, dict[str, Interval]],
    units: dict[str, Unit],
    measured: str,
) -> SectionFigure:
    shown = np.array([[gain.value for gain in by_cell.values()] for by_cell in gains.values()])
    for unit in set(units.values()):  # accuracies and losses do not share a scale of colours
        columns = [column for column, other in enumerate(units.values()) if other == unit]
        shown[:, columns] /= max(np.nanmax(np.abs(shown[:, columns]), initial=0), 1e-9)
    figure, (axes,) = new_figure(height=1.6 + 0.7 * len(gains))
    axes.imshow(shown, cmap="PuOr", vmin=-1.6, vmax=1.6, aspect="auto")
    for row, (label, by_cell) in enumerate(gains.items()):
        for column, (cell, gain) in enumerate(by_cell.items()):
            text = f"{units[cell].value(scores[cell][label].average().value)}\n{units[cell].change(gain)}"
            star = "*" if gain.excludes_zero() else ""
            axes.text(column, row, text + star, ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(units)), [plain(cell) for cell in units], fontsize=8)
    axes.set_yticks(range(len(gains)), [plain(label) for label in gains], fontsize=8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    caption = (
        f"Average of each adapter in each cell, and its difference to {NO_SCALING}, which gives the colour: orange is "
        "worse, violet better. *: the paired 95 % interval excludes 0."
    )
    return SectionFigure("matrix", caption, to_png(figure, f"Average, and difference to {NO_SCALING}", measured))
