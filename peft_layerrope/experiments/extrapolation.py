"""How scalings hold up as prompts grow beyond the trained window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

from ..comparison.candidates import NO_SCALING, Candidate
from ..errors import TaskError
from ..plots import COLOURS, GREY, draw_line, new_figure, to_png, unit_axis
from ..report import Table, Unit, legend, perplexity_of, unit_of
from ..scoring.scores import Interval, PositionScores, rank_key
from ..tasks.base import Task
from .measuring import Measuring, json_data, verdict
from .section import Section, SectionFigure

NAME = "extrapolation"
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
        raise TaskError(f"{NAME} needs a length, and a trained window (max_position_embeddings) in the model's config.")
    splits = {length: measuring.split(task) for length, task in sorted(tasks.items())}
    scores: Scores = {}
    for length, split in splits.items():
        matched = [Candidate(PI), Candidate(NTK)]  # nothing has to be matched within the window
        if length > window:
            matched = [Candidate(PI, "linear", (length / window,)), Candidate(NTK, "dynamic", (length / window,))]
        candidates = [Candidate(NO_SCALING), *matched, *baselines, *adapters]
        scores[length] = measuring.scores(split, candidates, f"{NAME}, {length} tokens", str(length))
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
        name=NAME,
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
    for label, colour in zip(scores[lengths[0]], cycle([GREY, *COLOURS])):
        intervals = [by_label[label].average() for by_label in scores.values()]
        draw_line(axes, lengths, intervals, unit, label, colour)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("prompt length in tokens")
    unit_axis(axes, unit)
    caption = f"Average {unit.name} over the length of the prompt, one line for each candidate; bars: 95 % intervals."
    return SectionFigure("lengths", caption, to_png(figure, f"{unit.name} over prompt length".capitalize(), measured))
