"""`search`: from a model and a task to an adapter and a held-out table."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import get_peft_model
from torch import nn

from .._version import __version__
from ..config import LayerRopeConfig
from ..demo import DEMO_NAME, demo_model_path
from ..errors import SearchError
from ..evaluation import PositionScores, check_vocabulary, score
from ..sites import find_stack, model_type
from ..tasks import Split, Task, check_disjoint
from . import controls as families
from .controls import Control, best_of
from .evaluator import BudgetView, MemoEvaluator, ModelEvaluator
from .genetic import evolve_curve
from .genome import BezierGenome
from .grid import FactorGrid, Factors
from .progress import RichProgress, SearchProgress, SilentProgress
from .refine import refine_by_coordinates
from .result import ALONE, CURVE, FIRST_REST, NONE, RANDOM, REFINED, UNIFORM, ResultTable, SearchResult, TableRow
from .settings import SearchSettings

MIN_CONTROL_BUDGET = 150
"""Shared-factor controls get as many evaluations as the per-layer search took, and never fewer than this: enough
to try every (a, b) on the default grid, so that a control that loses does not lose for want of trying."""


def search(
    model: nn.Module,
    task: Task,
    settings: SearchSettings | None = None,
    *,
    progress: bool | SearchProgress = True,
    **overrides: Any,
) -> SearchResult:
    """Searches one RoPE factor per layer (arXiv 2503.04355) and compares it with simpler choices.

    A genetic algorithm over cubic Bézier curves finds the region, coordinate steps on the grid the optimum. No
    scaling, every uniform factor, two shared-factor controls and random search are tried on the same search
    split at the same budget. What each chose is then scored once on the held-out test split.

    Args:
        model: a transformers causal language model; left as it was found.
        task: where the examples come from; its search and test splits must be disjoint.
        settings: see [`SearchSettings`].
        progress: a progress bar (default), none (`False`), or your own.
        **overrides: fields of `SearchSettings`, instead of `settings`.

    Returns:
        The result: `.config`, `.table`, `.save(directory)`.

    Raises:
        SearchError: the settings do not work for this model.
        TaskError: the splits cannot be made, overlap, or do not fit the model.
        UnsupportedModelError: the model's rotation cannot be scaled per layer.

    Example:
    ```py
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from peft_layerrope import KeyValueRetrieval, demo_model_path, search

    >>> model = AutoModelForCausalLM.from_pretrained(demo_model_path())
    >>> task = KeyValueRetrieval(AutoTokenizer.from_pretrained(demo_model_path()), length=512)
    >>> result = search(model, task, rope_type="default", seed=0)
    >>> result.save("my-adapter")
    ```
    """
    if settings is not None and overrides:
        raise SearchError(f"pass either settings or fields of it, got both: {', '.join(overrides)}.")
    settings = settings if settings is not None else SearchSettings(**overrides)
    num_layers = _searchable_layers(model)
    scaled_layers = settings.layers_to_scale(num_layers)
    search_split = task.split("search", settings.search_groups)
    test_split = task.split("test", settings.test_groups)
    check_disjoint([search_split, test_split])
    check_vocabulary(model, search_split)
    was_training = model.training
    peft_model = get_peft_model(model, settings.adapter_config([1.0] * num_layers))
    try:
        with _audience(progress) as audience:
            run = _Run(peft_model, settings, scaled_layers, num_layers, search_split, test_split, audience)
            return run.result(task, model_name(model))
    finally:
        peft_model.unload().train(was_training)


def _searchable_layers(model: nn.Module) -> int:
    """The number of decoder layers, each of which may have any factor."""
    stack = find_stack(model)
    sharing = [layer for layer, source in enumerate(stack.key_sources) if layer != source]
    if sharing:
        raise SearchError(
            f"layers {sharing} of {model_type(model)} attend to the keys of other layers (a shared KV cache) and need "
            "their factors, which no searcher keeps to yet. A LayerRopeConfig that keeps to it works."
        )
    return len(stack.layers)


def model_name(model: nn.Module) -> str:
    """Returns the model's Hub id, or a name without the path for one loaded from a folder."""
    name = model.config._name_or_path or type(model).__name__
    path = Path(name)
    if path.is_dir():
        return DEMO_NAME if path.resolve() == Path(demo_model_path()).resolve() else path.resolve().name
    return name


def _audience(progress: bool | SearchProgress) -> SearchProgress:
    if isinstance(progress, bool):
        return RichProgress() if progress else SilentProgress()
    return progress


class _Run:
    """The stages of one search, in order, on one shared memo."""

    def __init__(
        self,
        model: nn.Module,
        settings: SearchSettings,
        scaled_layers: tuple[int, ...],
        num_layers: int,
        search_split: Split,
        test_split: Split,
        audience: SearchProgress,
    ) -> None:
        self.model = model
        self.settings = settings
        self.scaled_layers = scaled_layers
        self.num_layers = num_layers
        self.search_split = search_split
        self.test_split = test_split
        self.audience = audience
        self.seconds: dict[str, float] = {}
        self.best_so_far = float("-inf")
        inner = ModelEvaluator(
            model,
            search_split,
            objective=settings.objective,
            weights=settings.weights,
            batch_tokens=settings.batch_tokens,
        )
        self.memo = MemoEvaluator(inner, self._evaluated)

    def _evaluated(self, vector: Factors, fitness: float) -> None:
        self.best_so_far = max(self.best_so_far, fitness)
        self.audience.advance()
        self.audience.note(f"best {self.best_so_far:.3f}")

    @contextmanager
    def _stage(self, name: str, total: int) -> Iterator[None]:
        started = time.perf_counter()
        self.audience.stage(name, total)
        yield
        self.seconds[name] = time.perf_counter() - started

    def _rng(self, name: str) -> random.Random:
        """A generator per searcher, so that leaving one out does not change another."""
        return random.Random(f"{self.settings.seed}/{name}")

    def result(self, task: Task, name: str) -> SearchResult:
        """Runs every stage."""
        grid, settings = self.settings.grid, self.settings
        unscaled = (1.0,) * self.num_layers
        found: list[Control] = []
        with self._stage("uniform factors", len(grid.values) + 1):
            found.append(best_of(NONE, [unscaled], self.memo, 1, self._rng(NONE)))
            uniform_family = families.uniform_vectors(grid, self.num_layers)
            found.append(best_of(UNIFORM, uniform_family, self.memo, len(uniform_family), self._rng(UNIFORM)))
        view = BudgetView(self.memo)
        with self._stage("Bézier curve search", settings.population * (settings.generations + 1)):
            genome = BezierGenome(grid, self.scaled_layers, self.num_layers)
            curve = evolve_curve(
                genome,
                view,
                population=settings.population,
                generations=settings.generations,
                rng=self._rng(CURVE),
                seeds=[genome.constant(1.0), genome.constant(found[1].factors[0])],
            )
        per_layer = [Control(CURVE, curve.factors, curve.fitness, view.evaluations, False)]
        if settings.refine:
            with self._stage("coordinate refinement", settings.refine_evaluations):
                refined, fitness = refine_by_coordinates(
                    curve.factors, view, grid, self.scaled_layers, settings.refine_evaluations
                )
            per_layer.append(Control(REFINED, refined, fitness, view.evaluations, False))
        if settings.controls:
            found += self._controls(grid, view.evaluations)
        table = self._held_out(found + per_layer)
        chosen = per_layer[-1]
        return SearchResult(
            config=self._config(chosen.factors, curve.control_points, name),
            table=table,
            settings=settings,
            chosen=chosen.name,
            control_points=curve.control_points,
            model_name=name,
            model_window=self.model.config.get_text_config(decoder=True).max_position_embeddings,
            task=task.describe(),
            splits=[self.search_split.describe(), self.test_split.describe()],
            history=curve.history,
            evaluations={
                "per_layer_search": view.evaluations,
                "all_methods": self.memo.evaluations,
                "saved_by_memo": self.memo.requested - self.memo.evaluations,
            },
            seconds=self.seconds,
            edge_layers=[i for i in self.scaled_layers if chosen.factors[i] in (grid.low, grid.values[-1])],
        )

    def _controls(self, grid: FactorGrid, evaluations: int) -> list[Control]:
        random_family = families.random_vectors(
            grid, self.scaled_layers, self.num_layers, evaluations, self._rng(RANDOM)
        )
        shared = max(evaluations, MIN_CONTROL_BUDGET)
        members = [
            (ALONE, families.first_layers_alone_vectors(grid, self.num_layers), shared),
            (FIRST_REST, families.first_and_rest_vectors(grid, self.num_layers), shared),
            (RANDOM, random_family, evaluations),
        ]
        found = []
        for name, vectors, budget in members:
            with self._stage(f"control: {name}", min(len(vectors), budget)):
                found.append(best_of(name, vectors, self.memo, budget, self._rng(name)))
        return found

    def _held_out(self, candidates: Sequence[Control]) -> ResultTable:
        scored: dict[Factors, PositionScores] = {}
        rows = []
        with self._stage("held-out test", len(candidates)):
            for candidate in candidates:
                if candidate.factors not in scored:
                    self.model.base_model.set_layer_factors(candidate.factors)
                    scored[candidate.factors] = score(
                        self.model, self.test_split, batch_tokens=self.settings.batch_tokens
                    )
                self.audience.advance()
                rows.append(
                    TableRow(
                        candidate.name,
                        candidate.factors,
                        candidate.fitness,
                        candidate.evaluations,
                        candidate.exhaustive,
                        scored[candidate.factors],
                    )
                )
        return ResultTable(tuple(rows))

    def _config(self, factors: Factors, control_points: list[list[float]], name: str) -> LayerRopeConfig:
        window = self.model.config.get_text_config(decoder=True).max_position_embeddings
        config = self.settings.adapter_config(
            list(factors),
            control_points=control_points,
            scaled_layers=list(self.scaled_layers),
            searcher_version=__version__,
        )
        if config.rope_type == "dynamic" and config.original_max_position_embeddings is None:
            config.original_max_position_embeddings = window
        config.base_model_name_or_path = DEMO_NAME if name == DEMO_NAME else self.model.config._name_or_path
        return config
