"""How scalings hold up as prompts grow beyond the trained window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from torch import nn

from ..comparison.contenders import NO_SCALING, Contender
from ..errors import TaskError
from ..plots import COLOURS, GREY, draw_line, new_figure, to_png, unit_axis
from ..report import Table, Unit, legend, perplexity_of, unit_of
from ..scoring.scores import Interval, PositionScores, rank_key
from ..tasks import Task
from ..tuner.sites import trained_window
from .measuring import Measuring, held_out, interval_dict, measure, measured_on, verdict
from .section import Section, SectionFigure

NAME = "extrapolation"
DEFAULT_GROUPS = 30
PI, NTK = "PI, matched", "Dynamic-NTK, matched"


@dataclass(frozen=True)
class Line:
    """A contender at every length.

    Attributes:
        label: its name.
        at: what it is at a length, given that length over the trained window.
        is_baseline: whether it is what the others have to beat.
    """

    label: str
    at: Callable[[float], Contender]
    is_baseline: bool = False

    @classmethod
    def fixed(cls, contender: Contender, is_baseline: bool = False) -> Line:
        """The same at every length."""
        return cls(contender.label, lambda ratio: contender, is_baseline)

    @classmethod
    def matched(cls, label: str, kind: str) -> Line:
        """The baseline `"linear"` or `"dynamic"` with the factor that the length needs; nothing within the window."""
        return cls(label, lambda ratio: Contender(label, kind, (ratio,)) if ratio > 1 else Contender(label), True)


def matched_baselines() -> list[Line]:
    """No scaling, PI and Dynamic-NTK, the last two by length over trained window."""
    return [Line.fixed(Contender(NO_SCALING), True), Line.matched(PI, "linear"), Line.matched(NTK, "dynamic")]


def run_extrapolation(
    model: nn.Module,
    tasks: Mapping[int, Task],
    lines: Sequence[Line],
    *,
    num_groups: int = DEFAULT_GROUPS,
    measuring: Measuring | None = None,
) -> Section:
    """Measures each contender at each length.

    Args:
        model: a transformers causal language model; left as it was found.
        tasks: the same task for each length in tokens.
        lines: the contenders; the first is what the others are compared with.
        num_groups: held-out contexts of each length.
        measuring: how to measure.

    Raises:
        TaskError: no length, contenders of one name, no trained window in the model's config, or a task that cannot
            give the contexts.
        LayerRopeError: an adapter that cannot be loaded or does not fit.
    """
    measuring, window = measuring or Measuring(), trained_window(model)
    if not tasks or not lines:
        raise TaskError(f"{NAME} needs a length and a contender at least.")
    if window is None:
        raise TaskError("the model's config names no trained window (max_position_embeddings) to extrapolate from.")
    if len({line.label for line in lines}) < len(lines):
        raise TaskError(f"contenders must have names of their own, got {', '.join(line.label for line in lines)}.")
    splits = {length: held_out(task, num_groups) for length, task in sorted(tasks.items())}
    scores: dict[int, dict[str, PositionScores]] = {}
    for length, split in splits.items():
        contenders = [line.at(length / window) for line in lines]
        name = f"{NAME}, {length} tokens"
        scores[length] = measure(model, split, contenders, name, measuring.within(str(length)))
    longest = max(splits)
    measured = measured_on(model, tasks[longest], splits[longest])
    unit = unit_of(splits[longest].measure)
    labels, base = [line.label for line in lines], lines[0].label
    gains = {
        length: {label: of_one.paired_difference(by_label[base]) for label, of_one in by_label.items() if label != base}
        for length, by_label in scores.items()
    }
    return Section(
        name=NAME,
        title="Extrapolation to longer prompts",
        question="How do the scalings hold up as prompts grow beyond the trained window?",
        measured=f"up to {measured}",
        findings=tuple(_findings(scores, lines, unit, window)),
        tables=_tables(scores, gains, labels, unit, window),
        figures=(_figure(scores, labels, unit, measured),),
        data={
            "tasks": {str(length): tasks[length].describe() for length in splits},
            "splits": {str(length): split.describe() for length, split in splits.items()},
            "window": window,
            "scores": {
                str(length): {label: of_one.to_dict() for label, of_one in by_label.items()}
                for length, by_label in scores.items()
            },
            "average_minus_baseline": {
                str(length): {label: interval_dict(gain) for label, gain in by_label.items()}
                for length, by_label in gains.items()
            },
        },
    )


def _findings(
    scores: dict[int, dict[str, PositionScores]], lines: Sequence[Line], unit: Unit, window: int
) -> list[str]:
    """At each length, the longest first, every contender against the first line and against the best baseline."""
    found, base = [], lines[0].label
    for length, by_label in reversed(scores.items()):
        at = f"{length} tokens ({length / window:g}×)"
        baselines = [line.label for line in lines if line.is_baseline]
        strongest = max(baselines or [base], key=lambda label: rank_key(by_label[label].average().value))
        tested = [line.label for line in lines if not line.is_baseline and line.label != base] or [strongest]
        for label in tested:
            for other in dict.fromkeys([base, strongest]):
                if other != label:
                    gap = by_label[label].paired_difference(by_label[other])
                    found.append(f"{at}: {verdict(label, other, gap, unit)}")
    return found


def _tables(
    scores: dict[int, dict[str, PositionScores]],
    gains: dict[int, dict[str, Interval]],
    labels: list[str],
    unit: Unit,
    window: int,
) -> tuple[Table, ...]:
    header = ("contender", *(f"{length} tokens ({length / window:g}×)" for length in scores))
    measure_name = next(iter(next(iter(scores.values())).values())).measure
    caption = legend([unit.name], measure_name) + " Matched: by length over trained window."
    values = [(label, *(unit.mean(by_label[label].average()) for by_label in scores.values())) for label in labels]
    changes = [(label, *(unit.change(by_label[label]) for by_label in gains.values())) for label in labels[1:]]
    tables = [
        Table(header, tuple(values), f"{unit.name} ({unit.symbol})".capitalize(), caption),
        Table(header, tuple(changes), f"Difference to {labels[0]} ({unit.step})"),
    ]
    if measure_name == "loss":
        perplexities = [
            (label, *(perplexity_of(by_label[label].average().value) for by_label in scores.values()))
            for label in labels
        ]
        tables.insert(1, Table(header, tuple(perplexities), "Perplexity"))
    return tuple(table for table in tables if table.rows)


def _figure(
    scores: dict[int, dict[str, PositionScores]], labels: list[str], unit: Unit, measured: str
) -> SectionFigure:
    figure, (axes,) = new_figure()
    lengths = list(scores)
    for label, colour in zip(labels, cycle([GREY, *COLOURS])):
        intervals = [by_label[label].average() for by_label in scores.values()]
        draw_line(axes, lengths, intervals, unit, label, colour)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("prompt length in tokens")
    unit_axis(axes, unit)
    caption = f"Average {unit.name} over the length of the prompt, one line for each contender; bars: 95 % intervals."
    return SectionFigure("lengths", caption, to_png(figure, f"{unit.name} over prompt length".capitalize(), measured))
