"""The options of `layerrope search`, by their panels in its help; and where each stands in search.yaml."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from functools import partial
from typing import Annotated

import typer

from ..scoring.scores import DEFAULT_WEIGHTS
from ..searcher import Guards, SearchSettings
from .options import RopeOptions, TaskOptions, scaling_option

_search_option = partial(typer.Option, rich_help_panel="Search")
_guard_option = partial(typer.Option, rich_help_panel="Guards")
_examples_option = partial(typer.Option, rich_help_panel="Examples")


class ObjectiveName(StrEnum):
    """Choices of --objective."""

    log_prob = "log_prob"
    accuracy = "accuracy"


class CurveName(StrEnum):
    """Choices of --curve."""

    bezier = "bezier"
    linear = "linear"
    direct = "direct"


class AlgorithmName(StrEnum):
    """Choices of --algorithm."""

    genetic = "genetic"
    cma_es = "cma-es"
    greedy = "greedy"
    random = "random"


@dataclass(frozen=True)
class ScalingOptions(RopeOptions):
    """Which factors there are."""

    min_factor: Annotated[float, scaling_option(help="Smallest factor of a layer.")] = 1.0
    max_factor: Annotated[float, scaling_option(help="Largest factor of a layer.")] = 2.0
    step: Annotated[float, scaling_option(help="Step of the factor grid.")] = 0.1
    layers: Annotated[
        str | None,
        scaling_option(
            help="Layers that may be scaled, such as 0-3,7. Default: all but the first 2 of every 32. "
            "`layerrope sensitivity` says which are worth it."
        ),
    ] = None


@dataclass(frozen=True)
class SearcherOptions:
    """How they are searched."""

    curve: Annotated[
        CurveName | None, _search_option(help="What is searched: a Bézier curve, a straight line, or each factor.")
    ] = None
    algorithm: Annotated[AlgorithmName, _search_option(help="greedy and random search the factors themselves.")] = (
        AlgorithmName.genetic
    )
    population: Annotated[int, _search_option(help="Curves per generation.")] = SearchSettings.population
    generations: Annotated[int, _search_option(help="Generations after the first.")] = SearchSettings.generations
    objective: Annotated[ObjectiveName, _search_option(help="Fitness: gold log-probability or exact match.")] = (
        ObjectiveName.log_prob
    )
    weights: Annotated[
        tuple[float, float, float], _search_option(help="λ first, middle, last of context utilisation.")
    ] = DEFAULT_WEIGHTS
    refine: Annotated[bool, _search_option(help="Gradient and coordinate steps after the curve.")] = True
    gradient_steps: Annotated[int, _search_option(help="Gradient steps on the factors.")] = (
        SearchSettings.gradient_steps
    )
    refine_evaluations: Annotated[int, _search_option(help="Vectors that the coordinate steps may evaluate.")] = (
        SearchSettings.refine_evaluations
    )
    race: Annotated[bool, _search_option(help="Give up on vectors that clearly lose, on a part of the examples.")] = (
        True
    )
    controls: Annotated[bool, _search_option(help="Search the controls too, at the same budget.")] = True
    seed: Annotated[int, _search_option(help="Seed of the searchers.")] = 0


@dataclass(frozen=True)
class GuardOptions:
    """What they must not cost."""

    guards: Annotated[bool, _guard_option(help="Keep to the limits below.")] = True
    max_tail_drop: Annotated[float, _guard_option(help="How far accuracy at the last position may fall (0 to 1).")] = (
        Guards.max_tail_drop
    )
    max_short_rise: Annotated[float, _guard_option(help="How far the loss on short prompts may rise, in nats.")] = (
        Guards.max_short_rise
    )


@dataclass(frozen=True)
class ExampleOptions:
    """What they are measured on."""

    search_groups: Annotated[int, _examples_option(help="Contexts to search on.")] = SearchSettings.search_groups
    validation_groups: Annotated[int, _examples_option(help="Contexts that choose between curve and refinement.")] = (
        SearchSettings.validation_groups
    )
    test_groups: Annotated[int, _examples_option(help="Contexts of the held-out table.")] = SearchSettings.test_groups


def _under(section: str, *groups: type) -> dict[str, tuple[str, ...]]:
    return {field.name: (section, field.name) for group in groups for field in fields(group)}


# `guards` stands for both of its limits
PLACES: dict[str, tuple[str, ...]] = {
    **_under("task", TaskOptions),
    "task": ("task", "name"),
    "task_seed": ("task", "seed"),
    **_under("search", ScalingOptions, SearcherOptions, ExampleOptions),
    "min_factor": ("search", "grid", "low"),
    "max_factor": ("search", "grid", "high"),
    "step": ("search", "grid", "step"),
    "layers": ("search", "scaled_layers"),
    "max_tail_drop": ("search", "guards", "max_tail_drop"),
    "max_short_rise": ("search", "guards", "max_short_rise"),
    **{name: ("search", name) for name in ("batch_tokens", "share_mib", "bootstrap")},
    **{name: (name,) for name in ("model", "device", "dtype")},
}
"""Where the value of an option stands in search.yaml."""
