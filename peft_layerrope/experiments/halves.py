"""Which half of the layers carries the effect of an adapter's factors?"""

from __future__ import annotations

from torch import nn

from ..comparison.contenders import NO_SCALING, Contender
from ..plots import draw_positions, new_figure, to_png
from ..report import Table, legend, score_cells, unit_of
from ..tasks import Task
from ..tuner.config import LayerRopeConfig
from .measuring import (
    Measuring,
    factor_vector,
    held_out,
    in_force,
    interval_dict,
    measure,
    measured_on,
    score_header,
    verdict,
    with_factors,
)
from .section import Section, SectionFigure

NAME = "halves"
DEFAULT_GROUPS = 100
FIRST, LAST, ALL = "first half", "last half", "all layers"


def half_vectors(factors: list[float]) -> dict[str, list[float]]:
    """Returns the vectors to compare. Of an odd number of layers the one in the middle belongs to the last half."""
    half = len(factors) // 2
    ones = [1.0] * len(factors)
    return {
        NO_SCALING: ones,
        FIRST: factors[:half] + ones[half:],
        LAST: ones[:half] + factors[half:],
        ALL: factors,
    }


def run_halves(
    model: nn.Module,
    task: Task,
    config: LayerRopeConfig,
    *,
    num_groups: int = DEFAULT_GROUPS,
    measuring: Measuring | None = None,
) -> Section:
    """Applies the adapter's factors to the first half of the layers, to the last half, to all, and to none.

    Args:
        model: a transformers causal language model; left as it was found.
        task: where the examples come from.
        config: the adapter.
        num_groups: held-out contexts.
        measuring: how to measure.

    Raises:
        AdapterMismatchError: the adapter is for another number of layers.
        TaskError: the task cannot give the contexts.
    """
    factors = factor_vector(model, config)
    split = held_out(task, num_groups)
    vectors = {label: with_factors(model, config, vector) for label, vector in half_vectors(factors).items()}
    contenders = [Contender.of_config(label, vector) for label, vector in vectors.items()]
    scores = measure(model, split, contenders, NAME, measuring or Measuring())
    unit, measured = unit_of(split.measure), measured_on(model, task, split)
    gains = {label: scores[label].paired_difference(scores[NO_SCALING]) for label in (FIRST, LAST, ALL)}
    short = {label: scores[label].paired_difference(scores[ALL]) for label in (FIRST, LAST)}
    names = score_header(split.measure)
    rows = [
        (
            label,
            _layers(label, len(factors)),
            *score_cells(scores[label], names).values(),
            unit.change(gains[label]) if label in gains else "",
        )
        for label in scores
    ]
    header = ("factors on", "layers", *names, "Δ to none")
    figures = ()
    if split.measure == "accuracy":
        figure, (axes,) = new_figure()
        draw_positions(axes, scores, band=False)
        caption = "Accuracy over the place of the answer with the adapter's factors on a part of the layers."
        figures = (SectionFigure("positions", caption, to_png(figure, "Factors on half of the layers", measured)),)
    return Section(
        name=NAME,
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
        data={
            "task": task.describe(),
            "split": split.describe(),
            "layer_factors": {label: vector.layer_factors for label, vector in vectors.items()},
            "scores": {label: of_one.to_dict() for label, of_one in scores.items()},
            "average_minus_none": {label: interval_dict(gain) for label, gain in gains.items()},
            "average_minus_all": {label: interval_dict(gap) for label, gap in short.items()},
        },
    )


def _layers(label: str, num_layers: int) -> str:
    half, last = num_layers // 2, num_layers - 1
    return {NO_SCALING: "none", FIRST: f"0-{half - 1}" if half else "none", LAST: f"{half}-{last}"}.get(
        label, f"0-{last}"
    )
