"""Is there a dip in the middle? Accuracy by gold position of the unscaled model, at one or more lengths."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..comparison.contenders import NO_SCALING, Contender
from ..plots import draw_positions, new_figure, to_png
from ..report import ACCURACY, Table, legend, position_table, score_cells, times_window
from ..scoring.scores import Interval, PositionScores, difference_interval
from ..tasks import Task
from ..tuner.sites import trained_window
from .measuring import Measuring, Thirds, held_out, interval_dict, measure, measured_on, need_positions, score_header
from .section import Section, SectionFigure

NAME = "u-shape"
DEFAULT_GROUPS = 100


def run_u_shape(
    model: nn.Module, tasks: Sequence[Task], *, num_groups: int = DEFAULT_GROUPS, measuring: Measuring | None = None
) -> Section:
    """Measures the unscaled model at every gold position, and compares the middle with both ends.

    Args:
        model: a transformers causal language model; left as it was found.
        tasks: one for each length.
        num_groups: held-out contexts of each.
        measuring: how to measure.

    Raises:
        TaskError: a task without gold positions, or one that cannot give the contexts.
    """
    measuring = measuring or Measuring()
    splits = [held_out(task, num_groups) for task in tasks]
    for task, split in zip(tasks, splits, strict=True):
        need_positions(task, split, NAME)
    window = trained_window(model)
    curves: dict[str, PositionScores] = {}
    findings, gaps, by_position = [], {}, []
    for number, split in enumerate(splits):
        length = split.max_tokens
        label = f"{length} tokens{times_window(length, window)}"
        part = measuring.within(str(number))
        scores = measure(model, split, [Contender(NO_SCALING)], f"{NAME}, {length} tokens", part)[NO_SCALING]
        curves[label] = scores
        ends = Thirds.of(scores)
        gaps[label] = difference_interval(ends.middle - ends.first), difference_interval(ends.middle - ends.last)
        findings.append(f"{label}: {describe_shape(*gaps[label])}.")
        by_position.append(position_table(scores, f"By position, {label}"))
    names = score_header("accuracy")
    rows = [
        (label, *score_cells(scores, names).values(), *(ACCURACY.change(gap) for gap in gaps[label]))
        for label, scores in curves.items()
    ]
    table = Table(("length", *names, "middle − first", "middle − last"), tuple(rows), caption=legend(names, "accuracy"))
    return Section(
        name=NAME,
        title="Accuracy by position of the unscaled model",
        question="Does the model without any scaling lose answers that stand in the middle of its prompt?",
        measured=measured_on(model, tasks[-1], splits[-1]),
        findings=tuple(findings),
        tables=(table, *by_position),
        figures=(_figure(curves, measured_on(model, tasks[-1], splits[-1])),),
        data={
            "tasks": [task.describe() for task in tasks],
            "splits": [split.describe() for split in splits],
            "scores": {label: scores.to_dict() for label, scores in curves.items()},
            "middle_minus_first": {label: interval_dict(first) for label, (first, _) in gaps.items()},
            "middle_minus_last": {label: interval_dict(last) for label, (_, last) in gaps.items()},
        },
    )


def describe_shape(to_first: Interval, to_last: Interval) -> str:
    """Says what the middle minus the first and minus the last position mean together."""
    gaps = f"middle − first {ACCURACY.change_in_words(to_first)}, − last {ACCURACY.change_in_words(to_last)}"
    lower = [end for end, gap in (("first", to_first), ("last", to_last)) if gap.high < 0]
    higher = [end for end, gap in (("first", to_first), ("last", to_last)) if gap.low > 0]
    if len(lower) == 2:
        text = "a dip in the middle, which is worse than both ends"
    elif len(higher) == 2:
        text = "no dip; the middle is better than both ends"
    elif lower:
        text = f"no dip, but a slope: the middle is worse than the {lower[0]} position only"
    elif higher:
        text = f"no dip; the middle is better than the {higher[0]} position"
    else:
        text = "no dip beyond noise"
    return f"{text} ({gaps})"


def _figure(curves: dict[str, PositionScores], measured: str) -> SectionFigure:
    figure, (axes,) = new_figure()
    draw_positions(axes, curves)
    caption = "Accuracy of the unscaled model over the place of the answer; bands: 95 % Wilson intervals."
    return SectionFigure("positions", caption, to_png(figure, "Accuracy by position, unscaled", measured))
