"""Factors on other prompts than those they were searched on: how scalings hold up as prompts grow beyond the trained
window, and whether an adapter helps on other tasks and lengths. Every candidate in every cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np

from ..comparison.candidates import NO_SCALING, Candidate
from ..errors import TaskError
from ..plots import COLORS, GRAY, draw_line, new_figure, plain, to_png, unit_axis
from ..report import Table, Unit, legend, perplexity_of, times_window, unit_of
from ..scoring.scores import Interval, PositionScores, rank_key
from ..tasks.base import Task
from . import Measuring, json_data, verdict
from .section import Section, SectionFigure

EXTRAPOLATION, TRANSFER = "extrapolation", "transfer"
PI, NTK = "PI, matched", "Dynamic-NTK, matched"

Scores = dict[int, dict[str, PositionScores]]
"""Of each candidate at each length."""


def run_extrapolation(
    measuring: Measuring,
    tasks: Mapping[int, Task],
    adapters: Sequence[Candidate],
    baselines: Sequence[Candidate] = (),
) -> Section:
    """Measures adapters with the same task at each length in tokens, beside baselines."""
    window = measuring.window
    if not tasks or window is None:
        raise TaskError(
            f"{EXTRAPOLATION} needs a length, and a trained window (max_position_embeddings) in the model's config."
        )
    splits = {length: measuring.split(task) for length, task in sorted(tasks.items())}
    scores: Scores = {}
    for length, split in splits.items():
        matched = [Candidate(PI), Candidate(NTK)]  # nothing has to be matched within the window
        if length > window:
            matched = [Candidate(PI, "linear", (length / window,)), Candidate(NTK, "dynamic", (length / window,))]
        candidates = [Candidate(NO_SCALING), *matched, *baselines, *adapters]
        scores[length] = measuring.scores(split, candidates, f"{EXTRAPOLATION}, {length} tokens", str(length))
    longest = max(splits)
    measured, unit = measuring.described(tasks[longest], splits[longest]), unit_of(splits[longest].measure)
    gains = {
        length: {
            label: of_one.paired_difference(by_label[NO_SCALING])
            for label, of_one in by_label.items()
            if label != NO_SCALING
        }
        for length, by_label in scores.items()
    }
    return Section(
        name=EXTRAPOLATION,
        title="Extrapolation to longer prompts",
        question="How do the scalings hold up as prompts grow beyond the trained window?",
        measured=f"up to {measured}",
        findings=tuple(_findings(scores, [adapter.label for adapter in adapters], unit, window)),
        tables=_tables(scores, gains, unit, window),
        figures=(_figure(scores, unit, measured),),
        data=json_data(
            tasks={length: tasks[length] for length in splits},
            splits=splits,
            window=window,
            scores=scores,
            average_minus_baseline=gains,
        ),
    )


def _findings(scores: Scores, adapters: Sequence[str], unit: Unit, window: int) -> list[str]:
    """At each length, the longest first, every adapter against no scaling and against the best baseline."""
    found = []
    for length, by_label in reversed(scores.items()):
        baselines = [label for label in by_label if label not in adapters]
        strongest = max(baselines, key=lambda label: rank_key(by_label[label].average().value))
        for label in adapters or [strongest]:
            for other in dict.fromkeys([NO_SCALING, strongest]):
                if other != label:
                    gap = by_label[label].paired_difference(by_label[other])
                    at = f"{length} tokens ({length / window:g}×)"
                    found.append(f"{at}: {verdict(label, other, gap, unit)}")
    return found


def _tables(scores: Scores, gains: dict[int, dict[str, Interval]], unit: Unit, window: int) -> tuple[Table, ...]:
    header = ("candidate", *(f"{length} tokens ({length / window:g}×)" for length in scores))
    labels = list(next(iter(scores.values())))
    averages = {label: [by_label[label].average() for by_label in scores.values()] for label in labels}
    measure = next(iter(scores.values()))[NO_SCALING].measure
    values = [(label, *map(unit.mean, averages[label])) for label in labels]
    caption = legend([unit.name], measure) + " Matched: by length over trained window."
    tables = [Table(header, tuple(values), f"{unit.name} ({unit.symbol})".capitalize(), caption)]
    if measure == "loss":
        perplexities = [(label, *(perplexity_of(mean.value) for mean in averages[label])) for label in labels]
        tables.append(Table(header, tuple(perplexities), "Perplexity"))
    changes = [(label, *(unit.change(of_one[label]) for of_one in gains.values())) for label in labels[1:]]
    return (*tables, Table(header, tuple(changes), f"Difference to {NO_SCALING} ({unit.step})"))


def _figure(scores: Scores, unit: Unit, measured: str) -> SectionFigure:
    figure, (axes,) = new_figure()
    lengths = list(scores)
    for label, color in zip(scores[lengths[0]], cycle([GRAY, *COLORS])):
        intervals = [by_label[label].average() for by_label in scores.values()]
        draw_line(axes, lengths, intervals, unit, label, color)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("prompt length in tokens")
    unit_axis(axes, unit)
    caption = f"Average {unit.name} over the length of the prompt, one line for each candidate; bars: 95 % intervals."
    return SectionFigure("lengths", caption, to_png(figure, f"{unit.name} over prompt length".capitalize(), measured))


def run_transfer(measuring: Measuring, cells: Mapping[str, Task], adapters: Sequence[Candidate]) -> Section:
    """Measures each adapter on each task, against no scaling; tasks by a name such as `"kv_words:512"`."""
    splits = {cell: measuring.split(task) for cell, task in cells.items()}
    scores = {
        cell: measuring.scores(split, [Candidate(NO_SCALING), *adapters], f"{TRANSFER}, {cell}", str(number))
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
        name=TRANSFER,
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
