"""`search`: from a model and a task to an adapter and a held-out table."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..base_model import adapted, describe_loading, keeping_modes
from ..errors import SearchError, TaskError
from ..messages import named
from ..scoring.preflight import Preflight
from ..scoring.scorer import Scorer
from ..scoring.scores import PositionScores, rank_key
from ..tasks import PromptTask, Task
from ..tasks.base import check_task
from ..tuner.sites import find_stack, trained_window
from .algorithms import (
    Candidate,
    Found,
    Generation,
    best_of,
    coordinate_ascent,
    first_and_rest_vectors,
    first_layers_alone_vectors,
    line_vectors,
    random_vectors,
    run_strategy,
    uniform_vectors,
)
from .bounded_run import BoundedPlan, plan_under_bound, search_under_bound
from .common import (
    SearchData,
    SearchJournal,
    adapter_config,
    identity_of,
    keep_look,
    look,
    make_data,
    model_name,
    since,
)
from .evaluator import Evaluator, Heats, Measurement, ModelEvaluator, plan_heats
from .gradient import STEP_COST, GradientSteps
from .memo import BudgetView, Memo
from .plan import (
    MIN_CONTROL_BUDGET,
    TEST,
    VALIDATION,
    Plan,
    SearchProgress,
    audience_of,
    memory_in_use,
    planned_evaluations,
)
from .result import (
    ALONE,
    CURVE,
    FIRST_REST,
    LABELS,
    LINE,
    NONE,
    RANDOM,
    REFINED,
    UNIFORM,
    ResultTable,
    SearchResult,
    TableRow,
)
from .settings import SearchSettings
from .space import Factors, FactorSpace


def bootstrap_choice(
    measurements: Mapping[Factors, np.ndarray], chosen: Factors, num_groups: int, draws: int, seed: int
) -> dict[str, Any]:
    """Draws the search split's contexts again and again, and sees which of the evaluated vectors would have won.

    Args:
        measurements: each vector's utilisation by context; those with fewer than `num_groups`, given up early by
            racing, and those with values that are not finite take no part.
        chosen: the vector that was chosen.
        num_groups: contexts of the search split.
        draws: how many times to draw.
        seed: of the drawing.

    Returns:
        `draws`; `winners`, the number of distinct winners; `chosen_wins`, the share of draws won by `chosen`;
        `chosen_behind_winner`, mean and 95th percentile of the winner's utilisation minus that of `chosen`;
        `factors_5_50_95`, for each layer the percentiles of the winner's factor.
    """
    vectors = [
        vector for vector, values in measurements.items() if len(values) == num_groups and np.isfinite(values).all()
    ]
    values = np.array([measurements[vector] for vector in vectors])
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=draws)
    means = counts @ values.T / num_groups  # (draws, vectors)
    winners = means.argmax(axis=1)
    behind = means.max(axis=1) - means[:, vectors.index(chosen)]
    factors = np.array([vectors[winner] for winner in winners])
    return {
        "draws": draws,
        "winners": len(Counter(winners.tolist())),
        "chosen_wins": round(float((winners == vectors.index(chosen)).mean()), 4),
        "chosen_behind_winner": [round(float(behind.mean()), 4), round(float(np.percentile(behind, 95)), 4)],
        "factors_5_50_95": np.percentile(factors, (5, 50, 95), axis=0, method="nearest").T.tolist(),
    }


Distribute = Callable[[ModelEvaluator], Evaluator]
"""Given the evaluator of this process, returns one that has the work done elsewhere; see `ray_workers`."""


def search(
    model: nn.Module,
    task: Task,
    settings: SearchSettings | None = None,
    *,
    progress: bool | SearchProgress = True,
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_plan: Callable[[Plan | BoundedPlan], None] | None = None,
    on_begin: Callable[[SearchSettings], None] | None = None,
    distribute: Distribute | None = None,
    enough: Callable[[], bool] | None = None,
    **overrides: Any,
) -> SearchResult:
    """Searches one RoPE factor per layer (arXiv 2503.04355) and compares it with simpler choices.

    With `algorithm="cma-es"`, the default, uniform factors race on a few contexts, and then CMA-ES searches two choices
    of two numbers and a factor for each layer, each generation on fresh contexts, with the change of ordinary text in
    the objective; a validation split chooses the simplest that none clearly beats.

    With `"paper"`, a genetic algorithm over cubic Bézier curves maximizes the context utilisation of exact matches.

    With `"genetic"`, a genetic algorithm over cubic Bézier curves finds the region; gradient steps on the
    factors and coordinate steps on the grid look for the optimum, and a validation split decides whether they found
    it. No scaling, every uniform factor, two shared-factor controls, straight lines and random search are tried on the
    same search split at the same budget.

    What each chose is then scored once on the held-out test split.

    Args:
        model: a transformers causal language model; left as it was found.
        task: where the examples come from; its splits must be disjoint.
        settings: see [`SearchSettings`].
        progress: a progress bar (default), none (`False`), or your own.
        folder: where `journal.jsonl` keeps every evaluation; default: in memory only.
        resume: go on from what is in `folder`, if there is something; the result is the uninterrupted run's, bit for
            bit on as many threads.
        overwrite: begin anew in `folder`; what is there is replaced once all is checked and one evaluation was timed.
        on_plan: told what the search is going to cost, as soon as that is known.
        on_begin: told the settings, with what the plan has settled, when all is checked and the journal has begun.
        distribute: has the evaluations done elsewhere; see `ray_workers`. Not with cma-es.
        enough: with cma-es, asked after each generation; once it says so, what was found so far is measured and
            returned.
        **overrides: fields of `SearchSettings`, instead of `settings`.

    Returns:
        The result: `.config`, `.table`, `.save(directory)`.

    Raises:
        SearchError: the settings do not work for this model, or the journal is not this search's.
        TaskError: the splits cannot be made, overlap, or do not fit the model.
        TaskError: the unscaled model answers nothing, or everything, and `anyway` is off.
        UnsupportedModelError: the model's rotation cannot be scaled per layer.
        BlockingIOError: another search is at work in `folder`.
        OSError: the journal cannot be written, as on a full disk; make room and resume.

    Example:
    ```py
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from peft_layerrope import KeyValueWords, demo_model_path, search

    >>> model = AutoModelForCausalLM.from_pretrained(demo_model_path())
    >>> task = KeyValueWords(AutoTokenizer.from_pretrained(demo_model_path()), length=512)
    >>> result = search(model, task, algorithm="genetic", seed=0)
    >>> result.save("my-adapter")
    ```
    """
    settings = _settings(settings, overrides)
    if not isinstance(progress, bool) and not hasattr(progress, "stage"):
        raise SearchError(f"progress={named(progress)} must be True, False or a SearchProgress.")
    if settings.is_bounded:
        if distribute is not None:
            raise SearchError(f"algorithm={settings.algorithm!r} runs in one process: leave the workers out.")
        kept = Path(folder) if folder is not None else None
        watched = {"progress": progress, "folder": kept, "on_plan": on_plan, "on_begin": on_begin}
        return search_under_bound(model, task, settings, **watched, resume=resume, overwrite=overwrite, enough=enough)
    with _prepared(model, task, settings, progress, folder, resume, overwrite) as run:
        run.time_one_evaluation()
        run.begin()
        if on_begin is not None:  # first: whoever reads the plan may interrupt
            on_begin(settings)
        if on_plan is not None:
            on_plan(run.plan)
        run.audience.expect(run.plan.stage_seconds)
        run.distribute(distribute)
        return run.result(task, model_name(model))


def plan_search(
    model: nn.Module, task: Task, settings: SearchSettings | None = None, **overrides: Any
) -> Plan | BoundedPlan:
    """Returns what [`search`] with these arguments would cost, after one timed evaluation. Writes nothing."""
    settings = _settings(settings, overrides)
    if settings.is_bounded:
        return plan_under_bound(model, task, settings)
    with _prepared(model, task, settings, progress=False, folder=None, ask=False) as run:
        run.time_one_evaluation()
        return run.plan


def _settings(settings: SearchSettings | None, overrides: dict[str, Any]) -> SearchSettings:
    if settings is not None and overrides:
        raise SearchError(f"pass either settings or fields of it, got both: {', '.join(overrides)}.")
    if settings is None:
        return SearchSettings(**overrides)
    if not isinstance(settings, SearchSettings):
        raise SearchError(
            f"settings={named(settings)} must be a SearchSettings; or pass its fields by name, as in "
            "search(model, task, population=16)."
        )
    return settings


@contextmanager
def _prepared(
    model: nn.Module,
    task: Task,
    settings: SearchSettings,
    progress: bool | SearchProgress,
    folder: str | Path | None,
    resume: bool = False,
    overwrite: bool = False,
    ask: bool = True,
) -> Iterator[_Run]:
    """Checks everything, with `ask` also what the model answers, injects the adapter, and takes it out again
    afterwards.
    """
    check_task(task)
    space = settings.space(tuple(find_stack(model).key_sources))
    data = make_data(model, task, settings)
    scorer = Scorer(model, batch_tokens=settings.batch_tokens)
    kept = Path(folder) if folder is not None else None
    found = None
    if ask and isinstance(task, PromptTask):
        with keeping_modes(model):
            wanted = {
                "search": settings.search_groups,
                "validation": settings.validation_groups,
                "test": settings.test_groups,
            }
            # somebody's own progress is entered once, for the search itself
            with audience_of(progress if isinstance(progress, bool) else False) as audience:
                found = look(scorer, task, settings, wanted, kept if resume else None, audience)
        if not settings.anyway:
            found.check()
        data = make_data(model, task, settings, found)
    identity = identity_of(model, task, settings.to_dict(), data.all)
    with adapted(model, settings.adapter_config([1.0] * space.num_layers)) as peft_model:
        scorer.check(data.search)
        with SearchJournal(kept, identity, resume, overwrite) as state, audience_of(progress) as audience:
            yield _Run(peft_model, settings, space, data, state, audience, found, scorer)


class _Run:
    """The stages of one search, in order, on one shared memo."""

    def __init__(
        self,
        model: nn.Module,
        settings: SearchSettings,
        space: FactorSpace,
        data: SearchData,
        state: SearchJournal,
        audience: SearchProgress,
        found: Preflight | None,
        scorer: Scorer,
    ) -> None:
        self.model = model
        self.scorer = scorer
        self.preflight = found
        self.settings = settings
        self.space = space
        self.data = data
        self.state = state
        self.audience = audience
        self.seconds: dict[str, float] = {}
        self.plan: Plan | None = None
        self._best = float("-inf")
        self._generation = ""
        self._held_out_layers = [0, 0]  # run and asked, on the validation and test splits
        self.heats: Heats = plan_heats(settings.search_groups, settings.race, data.short is not None)
        parts = [data.search.part(start, stop) for start, stop in self.heats.bounds]
        if data.short is not None:
            parts.append(data.short)
        self._split_numbers = {"validation": len(parts), "test": len(parts) + 1}
        self.local = ModelEvaluator(
            model,
            [replace(split, judge=None) for split in (*parts, data.validation, data.test)],
            objective=settings.objective,
            weights=settings.weights,
            batch_tokens=settings.batch_tokens,
            share_bytes=settings.share_mib * 2**20,
        )
        self.evaluator: Evaluator = self.local
        self.memo = Memo(self.local, self.heats, settings.guards, dict(state.measurements), self._measured)

    def _measured(self, new: dict[Factors, Measurement]) -> None:
        self.state.add_measurements(new)
        for vector, measured in new.items():
            if len(measured.heats) == 1:
                self.audience.advance()
            if measured.is_complete(self.heats):
                self._best = max(self._best, self.memo.known[vector].fitness(self.heats))
        self._note()

    def _advance(self, steps: int) -> None:
        for _ in range(steps):
            self.audience.advance()

    def _note(self) -> None:
        asked, ran = self.evaluator.layers_asked, self.evaluator.layers_run
        shared = f" · {1 - ran / asked:.0%} of layers shared" if asked else ""
        known = self.memo.requested - len(self.memo.known)
        self.audience.note(f"{self._generation}best {self._best:.3f} · {known} known{shared}")

    @contextmanager
    def _stage(self, name: str, total: int, logged: bool = True) -> Iterator[None]:
        started = time.perf_counter()
        self.audience.stage(name, total)
        if logged:
            self.state.log("stage", name=name, at_most=total)
        yield
        self.seconds[name] = since(started)

    def _rng(self, name: str) -> random.Random:
        """A generator per searcher, so that leaving one out does not change another."""
        return random.Random(f"{self.settings.seed}/{name}")

    def _view(self) -> BudgetView:
        return BudgetView(self.memo, self.settings.race)

    def _unscaled(self) -> Factors:
        return (1.0,) * self.space.num_layers

    def time_one_evaluation(self) -> None:
        """Times the unscaled model on every heat, and plans the search by it."""
        with self._stage("one timed evaluation", len(self.heats), logged=False):
            self.local.measure([self._unscaled()], 0)  # the first pass is slow, and finds out about sharing
            self.local.forget()
            started = time.perf_counter()
            for heat in range(len(self.heats)):
                found = self.local.measure([self._unscaled()], heat)[0]
                if not np.isfinite(found.values).all():
                    raise SearchError(
                        f"{np.sum(~np.isfinite(found.values))} of {len(found.values)} contexts have no finite score on "
                        "the unscaled model, by which all others are judged: use another --dtype, or shorter prompts."
                    )
                self.audience.advance()
            seconds = since(started)
            self.local.forget()
        held_out = sum(self.local.num_tokens(number) for number in self._split_numbers.values())
        self.plan = Plan(
            planned_evaluations(self.settings, self.space, self._search_name()),
            sum(self.local.num_tokens(heat) for heat in range(len(self.heats))),
            held_out * (4 + 4 * self.settings.controls),
            memory_in_use(self.model) + self.settings.share_mib * 2**20,
            seconds,
        )

    def begin(self) -> None:
        """Writes the first entry of the journal, in place of a search that is overwritten; nothing is before it."""
        self.state.log("plan", **self.plan.to_dict(), threads=torch.get_num_threads())
        keep_look(self.state.folder, self.preflight)

    def distribute(self, distribute: Distribute | None) -> None:
        """Has the evaluations done elsewhere from now on."""
        if distribute is not None:
            self.evaluator = self.memo.evaluator = distribute(self.local)

    def result(self, task: Task, name: str) -> SearchResult:
        """Runs every stage."""
        grid, settings = self.space.grid, self.settings
        found: list[Candidate] = []
        with self._stage("uniform factors", len(grid.values) + 1):
            found.append(best_of(NONE, [self._unscaled()], self._view(), 1, self._rng(NONE)))
            uniform_family = uniform_vectors(self.space)
            uniform = best_of(UNIFORM, uniform_family, self._view(), len(uniform_family), self._rng(UNIFORM))
            found.append(uniform)
        view = self._view()
        with self._stage(self._search_name(), settings.search_evaluations):
            seeds = [1.0, uniform.factors[0]]
            curve = run_strategy(settings, self.space, view, self._rng(CURVE), seeds, self._on_generation)
        per_layer = [Candidate(CURVE, curve.factors, curve.fitness, view.evaluations)]
        if settings.refine:
            per_layer.append(self._refine(curve, view))
        if settings.controls:
            found += self._controls(view.evaluations)
        table = self._held_out(found + per_layer)
        return self._assemble(task, name, table, per_layer, curve, view)

    def _search_name(self) -> str:
        return f"{self.settings.algorithm} search, {self.settings.genome}"

    def _on_generation(self, generation: Generation, random_state: list[Any]) -> None:
        self._generation = f"gen {generation.number} · "
        self.state.add_generation(self._search_name(), generation.population, random_state)
        best, mean = max(generation.fitness), sum(generation.fitness) / len(generation.fitness)
        self.state.log("generation", number=generation.number, best=best, mean=mean)
        self._note()

    def _refine(self, curve: Found, view: BudgetView) -> Candidate:
        """Gradient steps from the curve's best point, coordinate steps from the better of the two, and the choice
        among all three on the validation split.
        """
        settings, self._generation = self.settings, ""
        candidates = [curve]
        if settings.takes_gradient_steps:
            with self._stage("gradient steps", settings.gradient_steps):
                candidates.append(self._gradient(curve, view))
        with self._stage("coordinate steps", settings.refine_evaluations):
            start = max(candidates, key=lambda found: found.fitness)
            candidates.append(coordinate_ascent(start.factors, view, self.space, settings.refine_evaluations))
        with self._stage(VALIDATION, len(candidates)):
            scores = self._scores("validation", [found.factors for found in candidates])
            chosen = max(candidates, key=lambda found: rank_key(self._utilisation(scores[found.factors])))
        return Candidate(REFINED, chosen.factors, chosen.fitness, view.evaluations)

    def _gradient(self, curve: Found, view: BudgetView) -> Found:
        if self.state.gradient_path is None:
            steps = GradientSteps(
                self.model,
                self.data.search,
                self.space,
                weights=self.settings.weights,
                batch_tokens=self.local.batch_tokens,
            )
            count = self.settings.gradient_steps
            try:
                path = steps.climb(curve.factors, count, self.audience.advance)
            except TaskError as error:  # a backward pass takes far more of it; the coordinate steps do not
                self.state.log("skipped", stage="gradient steps", reason=str(error))
                path = []
            if not steps.is_finite:
                self.state.log("ended", stage="gradient steps", reason="the gradient is not finite")
            self.state.add_gradient_path(path)
        visited = self.state.gradient_path
        if not visited:
            return curve
        view.charge(STEP_COST * self.settings.gradient_steps)
        view.evaluate(visited)
        best = max(view.feasible(visited), key=view.fitness.__getitem__, default=curve.factors)
        return Found(best, view.fitness.get(best, curve.fitness))

    def _utilisation(self, scores: PositionScores) -> float:
        return float(scores.utilisation_by_group(self.settings.objective, self.settings.weights).mean())

    def _controls(self, evaluations: int) -> list[Candidate]:
        random_family = random_vectors(self.space, evaluations, self._rng(RANDOM))
        shared = max(evaluations, MIN_CONTROL_BUDGET)
        members = [
            (ALONE, first_layers_alone_vectors(self.space), shared),
            (FIRST_REST, first_and_rest_vectors(self.space), shared),
            (LINE, line_vectors(self.space), shared),
            (RANDOM, random_family, evaluations),
        ]
        found = []
        for name, vectors, budget in members:
            with self._stage(f"control: {LABELS[name]}", min(len(set(vectors)), budget)):
                found.append(best_of(name, vectors, self._view(), budget, self._rng(name)))
        everything = len(self.space.grid.values) ** len(self.space.scaled_layers)
        found[-1] = replace(found[-1], exhaustive=len(random_family) == everything)
        return found

    def _held_out(self, candidates: Sequence[Candidate]) -> ResultTable:
        with self._stage(TEST, len({c.factors for c in candidates})):
            scores = self._scores("test", [candidate.factors for candidate in candidates])
        return ResultTable(tuple(TableRow.of(candidate, scores[candidate.factors]) for candidate in candidates))

    def _scores(self, split: str, vectors: Sequence[Factors]) -> dict[Factors, PositionScores]:
        """Full scores on the validation or test split, from the state where they are there."""
        distinct = list(dict.fromkeys(vectors))
        missing = [vector for vector in distinct if (split, vector) not in self.state.scores]
        for start in range(0, len(missing), self.evaluator.at_once):
            group = missing[start : start + self.evaluator.at_once]
            before = self.evaluator.layers_run, self.evaluator.layers_asked
            if split == "test" and self.data.test.judge is not None:
                self.state.add_scores(split, self._written(group))
            else:
                self.state.add_scores(split, self.evaluator.score(group, self._split_numbers[split]))
            self._held_out_layers[0] += self.evaluator.layers_run - before[0]
            self._held_out_layers[1] += self.evaluator.layers_asked - before[1]
            self._advance(len(group))
        self._advance(len(distinct) - len(missing))
        return {vector: self.state.scores[split, vector] for vector in vectors}

    def _written(self, vectors: Sequence[Factors]) -> dict[Factors, PositionScores]:
        """Scores of the answers that the model writes with each vector, in this process."""
        self.scorer.model, self.scorer.batch_tokens = self.model, self.local.batch_tokens
        found = {}
        for vector in vectors:
            self.model.base_model.set_layer_factors(vector)
            found[vector] = self.scorer.measure(self.data.test)
        return found

    def _assemble(
        self,
        task: Task,
        name: str,
        table: ResultTable,
        per_layer: Sequence[Candidate],
        curve: Found,
        view: BudgetView,
    ) -> SearchResult:
        chosen, grid = per_layer[-1], self.space.grid
        groups = len(self.memo.known) * self.settings.search_groups
        searched = sum(len(m.values(self.heats)) for m in self.memo.known.values())
        measurements = {vector: measured.values(self.heats) for vector, measured in self.memo.known.items()}
        settings = self.settings
        bootstrap = None
        if settings.bootstrap:
            draws = settings.search_groups, settings.bootstrap, settings.seed
            bootstrap = bootstrap_choice(measurements, chosen.factors, *draws)
        return SearchResult(
            config=adapter_config(
                self.model,
                settings,
                chosen.factors,
                name,
                control_points=curve.control_points,
                scaled_layers=list(self.space.scaled_layers),
            ),
            table=table,
            settings=self.settings,
            chosen=chosen.name,
            control_points=curve.control_points,
            model_name=name,
            base=describe_loading(self.model.get_base_model()),
            model_window=trained_window(self.model),
            task=task.describe(),
            splits=[split.describe() for split in self.data.all],
            history=list(curve.history),
            evaluations={
                "per_layer_search": view.evaluations,
                "all_methods": len(self.memo.known),
                "saved_by_memo": self.memo.requested - len(self.memo.known),
                "gradient_steps": self.settings.gradient_steps if self.state.gradient_path else 0,
                "given_up_early": sum(not self.memo.is_complete(vector) for vector in self.memo.known),
                "examples_saved_by_racing": (groups - searched) * len(self.data.search.positions),
            },
            guards=self._guards(chosen.factors),
            timing={
                "seconds": {stage: round(value, 2) for stage, value in self.seconds.items()},
                "layer_tokens_run": self.evaluator.layers_run,
                "layer_tokens_asked": self.evaluator.layers_asked,
                "held_out_layer_tokens_run": self._held_out_layers[0],
                "held_out_layer_tokens_asked": self._held_out_layers[1],
                "prefix_sharing": bool(self.local.sharing),
                "batch_tokens": self.local.batch_tokens,
                "plan": self.plan.to_dict(),
            },
            edge_layers=[
                i for i in self.space.scaled_layers if chosen.factors[i] in (grid.min_factor, grid.values[-1])
            ],
            measurements=measurements,
            bootstrap=bootstrap,
            preflight=self.preflight,
        )

    def _guards(self, factors: Factors) -> dict[str, Any]:
        """What the guards watch, without and with the chosen factors, on the search split."""
        before, after = self.memo.known[self._unscaled()], self.memo.known[factors]
        return {
            "tail_accuracy": [before.tail_accuracy(self.heats), after.tail_accuracy(self.heats)],
            "max_tail_drop": self.settings.guards.max_tail_drop,
            "short_loss": [before.short_loss(self.heats), after.short_loss(self.heats)],
            "short_tokens": self.data.short.max_tokens if self.data.short is not None else None,
            "max_short_rise": self.settings.guards.max_short_rise,
        }
