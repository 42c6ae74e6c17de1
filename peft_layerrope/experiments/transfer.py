"""Do factors that were searched on one task and length help on others? Every adapter in every cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from ..comparison.contenders import NO_SCALING, Contender
from ..errors import TaskError
from ..plots import new_figure, plain, to_png
from ..report import Table, Unit, legend, times_window, unit_of
from ..scoring.scores import Interval, PositionScores
from ..tasks import Split, Task
from ..tuner.sites import trained_window
from .measuring import Measuring, held_out, interval_dict, measure
from .section import Section, SectionFigure

NAME = "transfer"
DEFAULT_GROUPS = 50


def run_transfer(
    model: nn.Module,
    cells: Mapping[str, Task],
    adapters: Sequence[Contender],
    *,
    num_groups: int = DEFAULT_GROUPS,
    measuring: Measuring | None = None,
) -> Section:
    """Measures each adapter on each task, against no scaling.

    Args:
        model: a transformers causal language model; left as it was found.
        cells: task by name, such as `"kv_words:512"`.
        adapters: what to put on.
        num_groups: held-out contexts of each cell.
        measuring: how to measure.

    Raises:
        TaskError: no cell or adapter, or a task that cannot give the contexts.
        LayerRopeError: an adapter that cannot be loaded or does not fit.
    """
    measuring = measuring or Measuring()
    if not cells or not adapters:
        raise TaskError(f"{NAME} needs an adapter and a cell at least.")
    splits = {cell: held_out(task, num_groups) for cell, task in cells.items()}
    contenders = [Contender(NO_SCALING), *adapters]
    scores = {
        cell: measure(model, split, contenders, f"{NAME}, {cell}", measuring.within(str(number)))
        for number, (cell, split) in enumerate(splits.items())
    }
    labels = [adapter.label for adapter in adapters]
    gains = {
        label: {cell: by_label[label].paired_difference(by_label[NO_SCALING]) for cell, by_label in scores.items()}
        for label in labels
    }
    units = {cell: unit_of(split.measure) for cell, split in splits.items()}
    window = trained_window(model)
    groups = next(iter(splits.values())).num_groups
    measured = f"{len(cells)} cells, {groups} contexts of the test split in each"
    return Section(
        name=NAME,
        title="Transfer between tasks and lengths",
        question="Do factors that were searched on one task and length help on others?",
        measured=measured,
        findings=tuple(_findings(gains, units)),
        tables=_tables(scores, gains, units, splits, window),
        figures=(_heat_map(scores, gains, units, measured),),
        data={
            "tasks": {cell: task.describe() for cell, task in cells.items()},
            "splits": {cell: split.describe() for cell, split in splits.items()},
            "scores": {
                cell: {label: of_one.to_dict() for label, of_one in by_label.items()}
                for cell, by_label in scores.items()
            },
            "average_minus_none": {
                label: {cell: interval_dict(gain) for cell, gain in by_cell.items()} for label, by_cell in gains.items()
            },
        },
    )


def _findings(gains: dict[str, dict[str, Interval]], units: dict[str, Unit]) -> list[str]:
    lines = []
    for label, by_cell in gains.items():
        better = [cell for cell, gain in by_cell.items() if gain.low > 0]
        worse = [cell for cell, gain in by_cell.items() if gain.high < 0]
        if better and len(better) == len(by_cell):
            verdict = "helps in every cell"
        elif better:
            verdict = f"helps on {', '.join(better)} and not elsewhere"
        else:
            verdict = "helps nowhere beyond noise"
        if worse:
            verdict += f"; hurts on {', '.join(worse)}"
        numbers = ", ".join(f"{cell} {units[cell].change_in_words(gain)}" for cell, gain in by_cell.items())
        lines.append(f"{label} {verdict} ({numbers}).")
    return lines


def _tables(
    scores: dict[str, dict[str, PositionScores]],
    gains: dict[str, dict[str, Interval]],
    units: dict[str, Unit],
    splits: dict[str, Split],
    window: int | None,
) -> tuple[Table, ...]:
    header = ("adapter", *(f"{cell} ({unit.symbol})" for cell, unit in units.items()))
    values = [
        (label, *(units[cell].mean(by_label[label].average()) for cell, by_label in scores.items()))
        for label in (NO_SCALING, *gains)
    ]
    changes = [
        (label, *(units[cell].change(gain) for cell, gain in by_cell.items())) for label, by_cell in gains.items()
    ]
    lengths = "; ".join(
        f"{cell}: {split.max_tokens} tokens{times_window(split.max_tokens, window)}" for cell, split in splits.items()
    )
    legends = " ".join(dict.fromkeys(legend([unit_of(split.measure).name], split.measure) for split in splits.values()))
    return (
        Table(header, tuple(values), "Average accuracy or loss", f"{lengths}. {legends}"),
        Table(header, tuple(changes), f"Difference to {NO_SCALING}"),
    )


def _heat_map(
    scores: dict[str, dict[str, PositionScores]],
    gains: dict[str, dict[str, Interval]],
    units: dict[str, Unit],
    measured: str,
) -> SectionFigure:
    labels, cells = list(gains), list(units)
    shown = np.array([[gains[label][cell].value for cell in cells] for label in labels])
    for unit in set(units.values()):  # accuracies and losses do not share a scale of colours
        columns = [column for column, cell in enumerate(cells) if units[cell] == unit]
        shown[:, columns] /= max(np.nanmax(np.abs(shown[:, columns]), initial=0), 1e-9)
    figure, (axes,) = new_figure(height=1.6 + 0.7 * len(labels))
    axes.imshow(shown, cmap="PuOr", vmin=-1.6, vmax=1.6, aspect="auto")
    for row, label in enumerate(labels):
        for column, cell in enumerate(cells):
            gain, unit = gains[label][cell], units[cell]
            text = f"{unit.value(scores[cell][label].average().value)}\n{unit.change(gain)}"
            star = "*" if gain.excludes_zero() else ""
            axes.text(column, row, text + star, ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(cells)), [plain(cell) for cell in cells], fontsize=8)
    axes.set_yticks(range(len(labels)), [plain(label) for label in labels], fontsize=8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    caption = (
        f"Average of each adapter in each cell, and its difference to {NO_SCALING}, which gives the colour: orange is "
        "worse, violet better. *: the paired 95 % interval excludes 0."
    )
    return SectionFigure("matrix", caption, to_png(figure, f"Average, and difference to {NO_SCALING}", measured))
