"""Which half of the layers carries the effect of an adapter's factors?"""

from __future__ import annotations

from ..comparison.candidates import NO_SCALING, Candidate
from ..plots import draw_positions, new_figure, to_png
from ..report import Table, legend, score_cells, unit_of
from ..tasks import Task
from ..tuner.config import LayerRopeConfig
from .measuring import Measuring, factor_vector, in_force, json_data, score_header, verdict, with_factors
from .section import Section, SectionFigure

NAME = "halves"
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
    scores = measuring.scores(split, list(map(Candidate.of_config, configs, configs.values())), NAME)
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
        data=json_data(
            task=task,
            split=split,
            layer_factors={label: made.layer_factors for label, made in configs.items()},
            scores=scores,
            average_minus_none=gains,
            average_minus_all=short,
        ),
    )
