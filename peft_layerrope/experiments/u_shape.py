"""Is there a dip in the middle? Accuracy by gold position of the unscaled model, at one or more lengths."""

from __future__ import annotations

from collections.abc import Sequence

from ..comparison.candidates import NO_SCALING, Candidate
from ..plots import draw_positions, new_figure, to_png
from ..report import ACCURACY, Table, legend, position_table, score_cells, times_window
from ..scoring.scores import Interval, PositionScores, difference_interval
from ..tasks.base import Task
from .measuring import Measuring, by_place, json_data, score_header
from .section import Section, SectionFigure

NAME = "u-shape"


def run_u_shape(measuring: Measuring, tasks: Sequence[Task]) -> Section:
    """Measures the unscaled model at every gold position, and compares the middle with both ends: a task by length."""
    splits = [measuring.split_by_position(task, NAME) for task in tasks]
    curves: dict[str, PositionScores] = {}
    gaps: dict[str, tuple[Interval, Interval]] = {}
    for number, split in enumerate(splits):
        label = f"{split.max_tokens} tokens{times_window(split.max_tokens, measuring.window)}"
        stage = f"{NAME}, {split.max_tokens} tokens"
        curves[label] = measuring.scores(split, [Candidate(NO_SCALING)], stage, str(number))[NO_SCALING]
        first, middle, last = by_place(curves[label]).values()
        gaps[label] = difference_interval(middle - first), difference_interval(middle - last)
    names = score_header("accuracy")
    rows = [
        (label, *score_cells(scores, names).values(), *(ACCURACY.change(gap) for gap in gaps[label]))
        for label, scores in curves.items()
    ]
    table = Table(("length", *names, "middle − first", "middle − last"), tuple(rows), caption=legend(names, "accuracy"))
    measured = measuring.described(tasks[-1], splits[-1])
    figure, (axes,) = new_figure()
    draw_positions(axes, curves)
    caption = "Accuracy of the unscaled model over the place of the answer; bands: 95 % Wilson intervals."
    return Section(
        name=NAME,
        title="Accuracy by position of the unscaled model",
        question="Does the model without any scaling lose answers that stand in the middle of its prompt?",
        measured=measured,
        findings=tuple(f"{label}: {describe_shape(*pair)}." for label, pair in gaps.items()),
        tables=(table, *(position_table(scores, f"By position, {label}") for label, scores in curves.items())),
        figures=(SectionFigure("positions", caption, to_png(figure, "Accuracy by position, unscaled", measured)),),
        data=json_data(
            tasks=tasks,
            splits=splits,
            scores=curves,
            middle_minus_first={label: first for label, (first, _) in gaps.items()},
            middle_minus_last={label: last for label, (_, last) in gaps.items()},
        ),
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
