"""Accuracy by position of the answer. Of the unscaled model: is there a dip in the middle? Of one factor for all
layers: what does each cost at the ends of the prompt and give in the middle? Of an adapter's factors on half of the
layers: which half carries their effect?
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from ..comparison.candidates import NO_SCALING, Candidate
from ..plots import COLORS, draw_line, draw_positions, new_figure, relative_positions, to_png, unit_axis
from ..report import ACCURACY, Table, legend, position_table, score_cells, times_window, unit_of
from ..scoring.scores import Interval, PositionScores, difference_interval, proportion_interval, rank_key
from ..tasks.base import Task
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import find_stack
from . import (
    Measuring,
    by_place,
    factor_vector,
    in_force,
    json_data,
    score_header,
    tried_factors,
    utilization_difference,
    verdict,
    with_factors,
)
from .section import Section, SectionFigure

U_SHAPE, SWEEP, HALVES = "u-shape", "sweep", "halves"
DEFAULT_FACTORS = tuple(round(1 + i / 10, 1) for i in range(11))


def run_u_shape(measuring: Measuring, tasks: Sequence[Task]) -> Section:
    """Measures the unscaled model at every gold position, and compares the middle with both ends: a task by length."""
    splits = [measuring.split_by_position(task, U_SHAPE) for task in tasks]
    curves: dict[str, PositionScores] = {}
    gaps: dict[str, tuple[Interval, Interval]] = {}
    for number, split in enumerate(splits):
        label = f"{split.max_tokens} tokens{times_window(split.max_tokens, measuring.window)}"
        stage = f"{U_SHAPE}, {split.max_tokens} tokens"
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
        name=U_SHAPE,
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


def run_sweep(
    measuring: Measuring, task: Task, config: LayerRopeConfig, factors: Sequence[float] = DEFAULT_FACTORS
) -> Section:
    """Scales all layers by one factor at a time, 1 among them, with the rope type of `config` in force."""
    tried = sorted((1.0, *tried_factors(factors)))
    split = measuring.split_by_position(task, SWEEP)
    model, num_layers = measuring.model, len(find_stack(measuring.model).layers)
    configs = {f"{factor:g}": with_factors(model, config, [factor] * num_layers) for factor in tried}
    found = measuring.scores(split, list(map(Candidate.of_config, configs, configs.values())), SWEEP)
    scores = dict(zip(tried, found.values(), strict=True))
    changes = {factor: utilization_difference(of_one, scores[1.0]) for factor, of_one in scores.items()}
    names = score_header("accuracy")
    rows = [
        (f"{factor:g}", *score_cells(of_one, names).values(), "" if factor == 1 else ACCURACY.change(changes[factor]))
        for factor, of_one in scores.items()
    ]
    measured = measuring.described(task, split)
    return Section(
        name=SWEEP,
        title="One uniform factor",
        question="What does one factor for all layers change, and is what it gains in the middle lost in the tail?",
        measured=measured + in_force(config),
        findings=tuple(sweep_findings(scores, changes)),
        tables=(Table(("factor", *names, "ΔU to 1"), tuple(rows), "", legend(names, "accuracy"), ()),),
        figures=(_lines(scores, measured), _curves(scores, measured)),
        data=json_data(
            task=task,
            split=split,
            rope_type=config.rope_type,
            factor=config.factor,
            scores=found,
            utilization_change={f"{factor:g}": change for factor, change in changes.items()},
        ),
    )


def sweep_findings(scores: dict[float, PositionScores], changes: dict[float, Interval]) -> list[str]:
    """Says which factor is best, and what is lost from there to the largest one."""
    best, largest = max(scores, key=lambda factor: rank_key(scores[factor].utilization())), max(scores)
    if best == 1 or not changes[best].excludes_zero():
        lines = ["No uniform factor raises U beyond noise."]
    else:
        lines = [
            f"Highest U at factor {best:g}: {ACCURACY.change_in_words(changes[best])} against 1 (chosen on these "
            "contexts, so a little too good)."
        ]
    if best == largest:
        return [*lines, f"That is the largest factor tried, so nothing is known of a loss beyond {largest:g}."]
    before, after = by_place(scores[best]), by_place(scores[largest])
    drops = {place: difference_interval(after[place] - before[place]) for place in before}
    text = ", ".join(f"{place} {ACCURACY.change_in_words(drop)}" for place, drop in drops.items())
    lost = "Lost in the tail" if drops["last"].high < 0 else "No loss in the tail beyond noise"
    return [*lines, f"{lost} from factor {best:g} to {largest:g}: {text}."]


def _lines(scores: dict[float, PositionScores], measured: str) -> SectionFigure:
    figure, (axes,) = new_figure()
    ends = [of_one.intervals() for of_one in scores.values()]
    lines = {
        "first": [intervals[0] for intervals in ends],
        "middle": [proportion_interval(by_place(of_one)["middle"]) for of_one in scores.values()],
        "last": [intervals[-1] for intervals in ends],
    }
    shift = 0.004 * (max(scores) - min(scores))  # so that bars do not hide each other
    for number, (place, color) in enumerate(zip(lines, (COLORS[2], COLORS[0], COLORS[1]), strict=True)):
        draw_line(axes, list(scores), lines[place], ACCURACY, f"answer {place}", color, (number - 1) * shift)
    axes.set_xlabel("factor of all layers")
    unit_axis(axes, ACCURACY)
    caption = "Accuracy with the answer first, in the middle and last, over one factor for all layers; bars: 95 %."
    return SectionFigure("factors", caption, to_png(figure, "Accuracy over a uniform factor", measured))


def _curves(scores: dict[float, PositionScores], measured: str) -> SectionFigure:
    figure, (axes,) = new_figure()
    colors, norm = colormaps["viridis"], Normalize(min(scores), max(scores))
    for factor, of_one in scores.items():
        values = ACCURACY.shown(of_one.value_by_position)
        axes.plot(relative_positions(of_one.positions), values, "-", color=colors(norm(factor)), linewidth=1.4)
    figure.colorbar(ScalarMappable(norm, colors), ax=axes, label="factor of all layers")
    axes.set_xlabel("place of the answer in the prompt (0: first, 1: last)")
    unit_axis(axes, ACCURACY)
    caption = "Accuracy over the place of the answer, one line for each uniform factor."
    return SectionFigure("positions", caption, to_png(figure, "Accuracy by position, by uniform factor", measured))


FIRST, LAST, ALL = "first half", "last half", "all layers"


def half_vectors(factors: list[float]) -> dict[str, list[float]]:
    """Returns the vectors to compare. Of an odd number of layers the one in the middle belongs to the last half."""
    half, ones = len(factors) // 2, [1.0] * len(factors)
    return {NO_SCALING: ones, FIRST: factors[:half] + ones[half:], LAST: ones[:half] + factors[half:], ALL: factors}


def run_halves(measuring: Measuring, task: Task, config: LayerRopeConfig) -> Section:
    """Applies the adapter's factors to the first half of the layers, to the last half, to all, and to none."""
    factors = factor_vector(measuring.model, config)
    split = measuring.split(task)
    configs = {label: with_factors(measuring.model, config, vector) for label, vector in half_vectors(factors).items()}
    scores = measuring.scores(split, list(map(Candidate.of_config, configs, configs.values())), HALVES)
    unit, measured = unit_of(split.measure), measuring.described(task, split)
    gains = {label: scores[label].paired_difference(scores[NO_SCALING]) for label in (FIRST, LAST, ALL)}
    short = {label: scores[label].paired_difference(scores[ALL]) for label in (FIRST, LAST)}
    names = score_header(split.measure)
    half, end = len(factors) // 2, len(factors) - 1
    layers = {NO_SCALING: "none", FIRST: f"0-{half - 1}" if half else "none", LAST: f"{half}-{end}", ALL: f"0-{end}"}
    rows = []
    for label, of_one in scores.items():
        change = unit.change(gains[label]) if label in gains else ""
        rows.append((label, layers[label], *score_cells(of_one, names).values(), change))
    header = ("factors on", "layers", *names, "Δ to none")
    figures = ()
    if split.measure == "accuracy":
        figure, (axes,) = new_figure()
        draw_positions(axes, scores, band=False)
        caption = "Accuracy over the place of the answer with the adapter's factors on a part of the layers."
        figures = (SectionFigure("positions", caption, to_png(figure, "Factors on half of the layers", measured)),)
    return Section(
        name=HALVES,
        title="First half, last half",
        question="Which half of the layers carries the effect of the adapter's factors?",
        measured=measured + in_force(config),
        findings=(
            *(verdict(f"Scaling the {label} alone", NO_SCALING, gains[label], unit) for label in (FIRST, LAST)),
            verdict(f"Scaling {ALL}", NO_SCALING, gains[ALL], unit),
            *(verdict(f"Scaling the {label} alone", f"scaling {ALL}", short[label], unit) for label in (FIRST, LAST)),
        ),
        tables=(Table(header, tuple(rows), caption=legend(header, split.measure), text_columns=(0, 1)),),
        figures=figures,
        data=json_data(
            task=task,
            split=split,
            layer_factors={label: made.layer_factors for label, made in configs.items()},
            scores=scores,
            average_minus_none=gains,
            average_minus_all=short,
        ),
    )
