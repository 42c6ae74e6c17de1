"""One uniform factor for all layers: what each costs at the ends of the prompt and gives in the middle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from torch import nn

from ..comparison.contenders import Contender
from ..errors import SearchError
from ..messages import is_number
from ..plots import COLOURS, draw_line, new_figure, relative_positions, to_png, unit_axis
from ..report import ACCURACY, Table, legend, score_cells
from ..scoring.scores import Interval, PositionScores, difference_interval, proportion_interval, rank_key
from ..tasks import Split, Task
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import find_stack
from .measuring import (
    Measuring,
    Thirds,
    held_out,
    in_force,
    interval_dict,
    measure,
    measured_on,
    need_positions,
    score_header,
    utilisation_difference,
    with_factors,
)
from .section import Section, SectionFigure

NAME = "sweep"
DEFAULT_GROUPS = 50
DEFAULT_FACTORS = tuple(round(1 + i / 10, 1) for i in range(11))
_PARTS = ("first", "middle", "last")


def run_sweep(
    model: nn.Module,
    task: Task,
    config: LayerRopeConfig | None = None,
    *,
    factors: Sequence[float] = DEFAULT_FACTORS,
    num_groups: int = DEFAULT_GROUPS,
    measuring: Measuring | None = None,
) -> Section:
    """Scales all layers by one factor at a time.

    Args:
        model: a transformers causal language model; left as it was found.
        task: where the examples come from.
        config: whose rope type and global factor are in force; default: the plain rope.
        factors: what to scale by; 1 is added.
        num_groups: held-out contexts.
        measuring: how to measure.

    Raises:
        SearchError: a factor that is not a positive number, or fewer than two.
        TaskError: a task without gold positions, or one that cannot give the contexts.
    """
    config, measuring = config or LayerRopeConfig(), measuring or Measuring()
    tried = _checked(factors)
    split = held_out(task, num_groups)
    need_positions(task, split, NAME)
    num_layers = len(find_stack(model).layers)
    contenders = [Contender.of_config(f"{f:g}", with_factors(model, config, [f] * num_layers)) for f in tried]
    scores = list(measure(model, split, contenders, NAME, measuring).values())
    return _section(model, task, split, config, dict(zip(tried, scores, strict=True)))


def _section(
    model: nn.Module, task: Task, split: Split, config: LayerRopeConfig, scores: dict[float, PositionScores]
) -> Section:
    changes = {factor: utilisation_difference(of_one, scores[1.0]) for factor, of_one in scores.items()}
    names = score_header("accuracy")
    rows = [
        (f"{factor:g}", *score_cells(of_one, names).values(), "" if factor == 1 else ACCURACY.change(changes[factor]))
        for factor, of_one in scores.items()
    ]
    measured = measured_on(model, task, split)
    table = Table(("factor", *names, "ΔU to 1"), tuple(rows), "", legend(names, "accuracy"), ())
    return Section(
        name=NAME,
        title="One uniform factor",
        question="What does one factor for all layers change, and is what it gains in the middle lost in the tail?",
        measured=measured + in_force(config),
        findings=tuple(sweep_findings(scores, changes)),
        tables=(table,),
        figures=(_lines(scores, measured), _curves(scores, measured)),
        data={
            "task": task.describe(),
            "split": split.describe(),
            "rope_type": config.rope_type,
            "factor": config.factor,
            "scores": {f"{factor:g}": of_one.to_dict() for factor, of_one in scores.items()},
            "utilisation_change": {f"{factor:g}": interval_dict(change) for factor, change in changes.items()},
        },
    )


def sweep_findings(scores: dict[float, PositionScores], changes: dict[float, Interval]) -> list[str]:
    """Says which factor is best, and what is lost from there to the largest one."""
    best, largest = max(scores, key=lambda factor: rank_key(scores[factor].utilisation())), max(scores)
    if best == 1 or not changes[best].excludes_zero():
        lines = ["No uniform factor raises U beyond noise."]
    else:
        lines = [
            f"Highest U at factor {best:g}: {ACCURACY.change_in_words(changes[best])} against 1 (chosen on these "
            "contexts, so a little too good)."
        ]
    if best == largest:
        return [*lines, f"That is the largest factor tried, so nothing is known of a loss beyond {largest:g}."]
    ends = {factor: Thirds.of(scores[factor]) for factor in (best, largest)}
    drops = {part: difference_interval(getattr(ends[largest], part) - getattr(ends[best], part)) for part in _PARTS}
    text = ", ".join(f"{part} {ACCURACY.change_in_words(drop)}" for part, drop in drops.items())
    lost = drops["last"].high < 0
    verdict = "Lost in the tail" if lost else "No loss in the tail beyond noise"
    return [*lines, f"{verdict} from factor {best:g} to {largest:g}: {text}."]


def _lines(scores: dict[float, PositionScores], measured: str) -> SectionFigure:
    figure, (axes,) = new_figure()
    middle = [proportion_interval(Thirds.of(of_one).middle) for of_one in scores.values()]
    ends = [of_one.intervals() for of_one in scores.values()]
    lines = {"first": [i[0] for i in ends], "middle": middle, "last": [i[-1] for i in ends]}
    shift = 0.004 * (max(scores) - min(scores))  # so that bars do not hide each other
    for number, (part, colour) in enumerate(zip(lines, (COLOURS[2], COLOURS[0], COLOURS[1]), strict=True)):
        draw_line(axes, list(scores), lines[part], ACCURACY, f"answer {part}", colour, (number - 1) * shift)
    axes.set_xlabel("factor of all layers")
    unit_axis(axes, ACCURACY)
    caption = "Accuracy with the answer first, in the middle and last, over one factor for all layers; bars: 95 %."
    return SectionFigure("factors", caption, to_png(figure, "Accuracy over a uniform factor", measured))


def _curves(scores: dict[float, PositionScores], measured: str) -> SectionFigure:
    figure, (axes,) = new_figure()
    colours, norm = colormaps["viridis"], Normalize(min(scores), max(scores))
    for factor, of_one in scores.items():
        values = ACCURACY.shown(of_one.value_by_position)
        axes.plot(relative_positions(of_one.positions), values, "-", color=colours(norm(factor)), linewidth=1.4)
    figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="factor of all layers")
    axes.set_xlabel("place of the answer in the prompt (0: first, 1: last)")
    unit_axis(axes, ACCURACY)
    caption = "Accuracy over the place of the answer, one line for each uniform factor."
    return SectionFigure("positions", caption, to_png(figure, "Accuracy by position, by uniform factor", measured))


def _checked(factors: Iterable[float]) -> list[float]:
    """Returns the factors with 1, ascending, each once."""
    values = list(factors)
    for value in values:
        if not is_number(value) or not np.isfinite(value) or value <= 0:
            raise SearchError(f"factor {value!r} must be a positive finite number.")
    found = sorted({1.0, *map(float, values)})
    if len(found) < 2:
        raise SearchError("a sweep needs a factor other than 1.")
    return found
