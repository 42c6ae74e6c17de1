"""The search under a bound: simple choices first, then a factor for each layer, all under one bound on what they do to
ordinary text; a validation split chooses among them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from ..files import to_float
from ..runs import Journal
from ..scoring.batching import can_pack
from ..scoring.scorer import Scorer
from ..scoring.scores import Interval, PositionScores, difference_interval, mean_interval, rank_key
from ..tasks import KeyValueRetrieval, PromptTask, Split, SplitName, Task
from ..tasks.base import spread_positions
from ..tasks.prompts import ASKED_EVERYWHERE
from .algorithms import adapt, fitted_top, population_of
from .common import since
from .families import (
    Family,
    decay_family,
    farthest,
    first_and_rest_family,
    per_layer_family,
    uniform_family,
)
from .harm import (
    NUM_WRITTEN,
    Harm,
    Windows,
    choose,
    divergences,
    losses,
    sample_windows,
    scored_positions,
    window_logits,
)
from .plan import (
    CONTROLS,
    CURVATURE,
    HARM,
    TEST,
    UNIFORM_HARM,
    UNIFORM_VALUES,
    VALIDATION,
    WRITTEN,
    Rates,
    Schedule,
    SearchProgress,
    compared_on,
    contexts_of,
    race_of,
    steps_of,
)
from .result import BOUNDED, NONE, PER_LAYER, UNIFORM
from .settings import SearchSettings
from .space import Factors, FactorSpace

_FAMILIES = dict(zip(CONTROLS, (first_and_rest_family, decay_family), strict=True))
SIMPLEST_FIRST = (NONE, BOUNDED, *CONTROLS, PER_LAYER)
"""What may be the result. `UNIFORM` knows no bound: it is shown beside them."""
UNIFORM_RANGE = (0.4, 2.5)
_PROBE = 0.1  # log-factor at which the harm of a uniform factor is measured to find where it meets the bound
_OWN_TARGET_CONTEXTS = 24  # the most contexts of the search split whose questions are each asked for their targets
_READ_TO_WRITTEN = 1.3  # divergence on people's text, by which is searched, to that on what the model writes
_FEW, _COMPARED, _LOSSES = (
    128,
    512,
    2048,
)  # positions of a window at most: of distributions that are compared, of losses
# Questions to a context, in times of the task's positions: of 100 pairs, 42 questions instead of 14 take a quarter more
# time, and four fifths of what one says are its own.
_DENSER = 8
_DIGITS = 2
_USUAL_HARM = 0.01  # nats, by which a search without a bound takes its first steps
_PRICE_OF_BOUND = 0.05  # probability of the answers that harm of the size of its bound costs
_MOVED, _PROBED_TOKENS = 0.25, 256  # log-factor and tokens of text by which a layer's harm is measured
_WIDEST = 0.5  # log-factor of a standard draw at most
_LEAST_CURVATURE = 0.25  # of the mean, added to each layer's
_MOST_RATIO = 5.0  # of measured harm to what the curvatures say, which one window may tell
_AIMED = 0.9  # share of the bound: what breaks it has to be made smaller and measured again
_MEMORY = 0.7  # share of the running mean of that ratio that a generation keeps
_AVERAGED_SHARE = 0.25  # of the centroids, the last ones, whose mean is one of the two ends of a search


@dataclass(frozen=True)
class Generation:
    """What one generation saw.

    Attributes:
        fitness: mean over its members.
        divergence: at its centroid, on ordinary text.
    """

    fitness: float
    divergence: float


@dataclass(frozen=True)
class MethodResult:
    """What a method ended with.

    Attributes:
        factors: of each layer, rounded.
        fitness: mean probability of the targets on the last contexts of the search split that it was raced on.
        evaluations: vectors whose fitness was looked at.
        generations: by which it was found.
    """

    factors: Factors
    fitness: float
    evaluations: int
    generations: tuple[Generation, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a search under a bound found.

    Attributes:
        found: by name.
        harm: of each.
        chosen: the result's name.
        test: held-out scores of each, of the answers that the model writes where the task has a metric.
    """

    found: Mapping[str, MethodResult]
    harm: Mapping[str, Harm]
    chosen: str
    test: Mapping[str, PositionScores]


class BoundedSearch:
    """One search, stage after stage. Each result is kept in a journal, and taken from there if it is there.

    Args:
        model: a `PeftModel` with one LAYER_ROPE adapter, changed in place.
        settings: see [`SearchSettings`].
        space: which layers are free.
        windows: people's text; none: what the model writes takes its place.
        text_tokens: of a window of what the model writes.
        scorer: of `model`.
        journal: of the run.
        audience: told what is done.
        enough: asked after each generation; once it says so, no other begins. None: never.
    """

    def __init__(
        self,
        model: PeftModel,
        settings: SearchSettings,
        space: FactorSpace,
        windows: Windows,
        text_tokens: int,
        scorer: Scorer,
        journal: Journal,
        audience: SearchProgress,
        enough: Callable[[], bool] | None = None,
    ) -> None:
        self._enough = enough or (lambda: False)
        self._model = model
        self._settings = settings
        self._space = space
        self._read = windows
        self._text_tokens = text_tokens
        self._written: Windows = ()
        self._unscaled = cache(self._unscaled_on)
        self._curvature = cache(self._measured_curvature)
        self._scorer = scorer
        self._journal = journal
        self._audience = audience
        self._limits = tuple(np.log(settings.factor_limits))
        self._contexts: list[int] = []
        self._search: Split | None = None
        self.seconds: dict[str, float] = {}

    def run(self, schedule: Schedule, search: Split, validation: Split, test: Split) -> Outcome:
        """Searches, measures, chooses, and has each vector tested.

        Args:
            schedule: what to do.
            search: contexts to search on; drawn with replacement where they are fewer than the schedule has.
            validation: contexts to choose by.
            test: contexts of the held-out table.
        """
        self._search = search
        rng, self._contexts = np.random.default_rng(self._settings.seed), list(range(search.num_groups))
        while len(self._contexts) < schedule.search_contexts:
            self._contexts += rng.permutation(search.num_groups).tolist()
        with self._stage(WRITTEN, 1):
            self._written = tuple(map(tuple, self._once("text", "written", self._write)))
        results = self._uniform(schedule)
        start = sum(schedule.rounds)
        layers = self._space.key_sources, self._space.scaled_layers
        per_layer = self._evolved(PER_LAYER, per_layer_family(*layers), schedule.steps, start)
        start += contexts_of(schedule.steps)
        for name, family in _FAMILIES.items():
            results[name] = self._evolved(name, family(*layers), schedule.control_steps, start)
            start += contexts_of(schedule.control_steps)
        results[PER_LAYER] = per_layer
        scores = self._scored(
            "validation",
            VALIDATION,
            {name: results[name] for name in SIMPLEST_FIRST},
            lambda: densely_scored(self._scorer, validation),
        )
        harm = self._harm(results, scores)
        fitness = {name: fitness_by_context(score) for name, score in scores.items()}
        chosen = choose(fitness, harm, SIMPLEST_FIRST, self._settings.max_harm)
        held_out = self._scored("test", TEST, results, lambda: self._scorer.measure(test))
        return Outcome(results, harm, chosen, held_out)

    def _part(self, start: int, count: int) -> Split:
        """Contexts number `start` and on, each once."""
        numbers = set(self._contexts[start : start + count])
        members = list(dict.fromkeys(example.group for example in self._search.examples))
        wanted = {members[number] for number in numbers}
        return replace(self._search, examples=tuple(e for e in self._search.examples if e.group in wanted))

    def _once(self, kind: str, key: str, compute: Callable[[], Any]) -> Any:
        """What is in the record, or is computed and put there."""
        kept = self._journal.get(kind, key)
        if kept is None:
            kept = compute()
            self._journal.append(kind, key, kept)
        self._audience.advance()
        return kept

    @contextmanager
    def _stage(self, name: str, total: int) -> Iterator[None]:
        started = time.perf_counter()
        self._audience.stage(name, total)
        yield
        self.seconds[name] = since(started)

    def _rounded(self, log_factors: np.ndarray) -> Factors:
        """Factors as they are kept: rounded, and those of layers that are not free exactly 1."""
        factors = np.round(np.exp(np.clip(log_factors, *self._limits)), _DIGITS)
        return self._space.spread([float(factors[layer]) for layer in self._space.scaled_layers])

    def _set(self, factors: Factors) -> None:
        self._model.base_model.set_layer_factors(factors)

    def _uniform(self, schedule: Schedule) -> dict[str, MethodResult]:
        """The best uniform factor of a wide range, and the best of those that keep to the bound."""
        family = uniform_family(self._space.key_sources, self._space.scaled_layers)
        wide = np.linspace(*np.log(UNIFORM_RANGE), UNIFORM_VALUES)
        races = {UNIFORM: wide, BOUNDED: self._bounded_values(family)}
        unscaled = self._rounded(np.zeros(self._space.num_layers))
        results: dict[str, MethodResult] = {}
        for name, values in races.items():
            vectors = list(dict.fromkeys(self._rounded(family.log_factors(np.array([value]))) for value in values))
            alone = len(schedule.rounds) if NONE not in results else 0
            with self._stage(race_of(name), alone + sum(schedule.running(len(vectors)))):
                if NONE not in results:
                    starts = np.cumsum([0, *schedule.rounds[:-1]]).tolist()
                    parts = [self._by_context(unscaled, *part) for part in zip(starts, schedule.rounds, strict=True)]
                    results[NONE] = MethodResult(unscaled, float(np.mean(np.concatenate(parts))), 1)
                results[name] = self._raced(vectors, schedule)
                best = results[name]
                self._audience.note(f"{best.factors[-1]:g}: {best.fitness:.3f}, unscaled {results[NONE].fitness:.3f}")
        return results

    def _write(self) -> Windows:
        self._set(self._rounded(np.zeros(self._space.num_layers)))
        return sample_windows(self._model, NUM_WRITTEN, self._text_tokens, seed=self._settings.seed, read=self._read)

    def _bounded_values(self, family: Family) -> list[float]:
        """Log-factors from one end of the bound to the other."""
        bound = self._settings.max_harm
        if bound is None:
            return [0.0]
        with self._stage(UNIFORM_HARM, 2):
            low, high = (
                self._harm_on_text(self._rounded(family.log_factors(np.array([v]))), windows=1)
                for v in (-_PROBE, _PROBE)
            )
        rises = [harm.loss_rise.value if harm.loss_rise is not None else 0.0 for harm in (low, high)]
        ends = [
            -farthest(_PROBE, low.divergence.value, rises[0], rises[1], bound),
            farthest(_PROBE, high.divergence.value, rises[1], rises[0], bound),
        ]
        return [share * end for end in ends for share in (1.0, 2 / 3, 1 / 3)] + [0.0]

    def _raced(self, vectors: Sequence[Factors], schedule: Schedule) -> MethodResult:
        """Scores vectors on more and more contexts; after each round the better third goes on."""
        start, running = 0, list(vectors)
        values: dict[Factors, list[float]] = {vector: [] for vector in vectors}
        for contexts, count in zip(schedule.rounds, schedule.running(len(vectors)), strict=True):
            running = running[:count]
            for vector in running:
                values[vector] += self._by_context(vector, start, contexts)
            start += contexts
            running.sort(key=lambda vector: -rank_key(np.mean(values[vector])))
            self._audience.note(f"{running[0][-1]:g}: {np.mean(values[running[0]]):.3f}")
        return MethodResult(running[0], float(np.mean(values[running[0]])), len(vectors))

    def _by_context(self, factors: Factors, start: int, contexts: int) -> list[float]:
        def scored() -> list[float]:
            self._set(factors)
            return fitness_by_context(densely_scored(self._scorer, self._part(start, contexts))).tolist()

        return self._once("raced", f"{start}+{contexts} {factors}", scored)

    def _evolved(self, name: str, family: Family, count: int, start: int) -> MethodResult:
        """Searches a family by CMA-ES, each generation on contexts of its own, and ends with the mean of the last
        centroids or where a parabola through all that was seen has its top, whichever is better on contexts that
        neither knows, as far as the bound. Harm is what the curvature of each layer alone makes of a vector, in the
        measure of what was seen at the centroids.
        """
        curvature, bound = self._curvature(), self._settings.max_harm
        wide = np.sqrt(2 * (bound or _USUAL_HARM) / (curvature @ family.basis**2) / family.num_parameters)
        family = family.scaled(np.minimum(wide, _WIDEST / np.abs(family.basis).max(axis=0)))
        price = 0.0 if bound is None else _PRICE_OF_BOUND / bound
        generations: list[Generation] = []
        seen: list[tuple[list[np.ndarray], list[float]]] = []
        ratio = 1.0  # of harm that was measured to what the curvatures say

        def harm_of(log_factors: np.ndarray) -> float:
            return float(curvature @ log_factors**2) / 2

        def score(number: int, centroid: np.ndarray, members: Sequence[np.ndarray]) -> list[float]:
            nonlocal ratio
            split = self._part(start + number, 1)
            kept = self._once("generation", f"{name} {number}", lambda: scored(split, centroid, members))
            fitness, divergence = [to_float(value) for value in kept[0]], to_float(kept[1])
            if harm_of(centroid) > 0:
                measured = float(np.clip(divergence / harm_of(centroid), 1 / _MOST_RATIO, _MOST_RATIO))
                measured = measured if np.isfinite(measured) else _MOST_RATIO
                ratio = _MEMORY * ratio + (1 - _MEMORY) * measured
            seen.append(([family.nearest(member) for member in members], fitness))
            generations.append(Generation(float(np.mean(fitness)), divergence))
            self._audience.note(f"fitness {generations[-1].fitness:.3f}, harm {divergence:.4f}")
            return [value - price * ratio * harm_of(member) for value, member in zip(fitness, members, strict=True)]

        def scored(split: Split, centroid: np.ndarray, members: Sequence[np.ndarray]) -> list[Any]:
            values = []
            for member in members:
                self._set(self._rounded(member))
                values.append(float(fitness_by_context(densely_scored(self._scorer, split)).mean()))
            return [values, self._divergence(self._rounded(centroid), len(generations))]

        def as_far_as_allowed(ray: np.ndarray, farthest: float) -> Factors:
            if bound is not None:
                allowed = np.sqrt(_AIMED * self._max_divergence / max(ratio * harm_of(ray), 1e-12))
                farthest = min(farthest, float(allowed))
            return self._rounded(farthest * ray)

        ended, centroids = self._journal.get("ended", name), []
        with self._stage(steps_of(name), count + 2):
            for centroid in adapt(family, count, score, self._settings.seed, self._limits):
                centroids.append(centroid)
                done = len(centroids) - 1
                if done and (done == ended or (ended is None and done < count and self._enough())):
                    break
            if done < count and ended is None:
                self._journal.append("ended", name, done)
            last = centroids[-max(1, round(done * _AVERAGED_SHARE)) :]
            finalists = [as_far_as_allowed(np.mean(last, axis=0), 1.0)]
            if (top := fitted_top(*zip(*seen, strict=True))) is not None:
                direction, distance = top
                finalists.append(as_far_as_allowed(family.log_factors(direction), distance))
            split = start + count, compared_on(count)
            values = [rank_key(np.mean(self._by_context(vector, *split))) for vector in finalists]
        best = finalists[int(np.argmax(values))]
        found = self._rounded(self._within_bound(np.log(best)))
        return MethodResult(found, max(values), done * population_of(family.num_parameters), tuple(generations))

    def _measured_curvature(self) -> np.ndarray:
        """Of the divergence by each layer's log-factor, shape `(num_layers,)`: twice what moving the layer alone does,
        by the square of how far it was moved; never much less than the mean, which noise might say.
        """
        sources, free = self._space.key_sources, self._space.scaled_layers
        found = np.zeros(len(sources))
        with self._stage(CURVATURE, len(free)):
            for layer in free:
                moved = np.where(np.array(sources) == layer, _MOVED, 0.0)
                kept = self._once(
                    "curvature",
                    f"{layer}",
                    lambda moved=moved: self._divergence(self._rounded(moved), 0, _PROBED_TOKENS),
                )
                found[layer] = to_float(kept)
        found = np.nan_to_num(np.maximum(found, 0), nan=1.0, posinf=1.0) * 2 / _MOVED**2
        found[list(free)] += found[list(free)].mean() * _LEAST_CURVATURE + 1e-9
        return found

    @torch.no_grad()
    def _divergence(self, factors: Factors, number: int, tokens: int | None = None) -> float:
        """On one of the windows that are searched by, or its first tokens."""
        windows = self._read or self._written
        window = windows[number % len(windows)][:tokens]
        unscaled = self._unscaled(self._few_logits, window)
        return float(divergences(unscaled, self._few_logits(factors, window)).mean())

    @property
    def _max_divergence(self) -> float | None:
        """On the text that gradients are taken of."""
        bound = self._settings.max_harm
        return bound * (_READ_TO_WRITTEN if self._read else 1.0) if bound is not None else None

    def _within_bound(self, log_factors: np.ndarray) -> np.ndarray:
        """Log-factors made smaller together until the harm to text is about within its bound: the divergence grows
        with their square, and a loss that rises at least with them.
        """
        bound = self._settings.max_harm
        if bound is None:
            return log_factors
        harm = self._harm_on_text(self._rounded(log_factors))
        share = min(1.0, np.sqrt(bound / max(harm.divergence.value, 1e-9)))
        if harm.loss_rise is not None:
            share = min(share, bound / max(harm.loss_rise.value, bound))
        return log_factors * share

    def _scored(
        self, split: str, stage: str, results: Mapping[str, MethodResult], score: Callable[[], PositionScores]
    ) -> dict[str, PositionScores]:
        """What `score` returns with each vector."""
        scores: dict[str, PositionScores] = {}
        with self._stage(stage, len(results)):
            for name, found in results.items():

                def plain(factors: Factors = found.factors) -> list[Any]:
                    self._set(factors)
                    return score().to_plain()

                scores[name] = PositionScores.from_plain(self._once(split, f"{found.factors}", plain))
        return scores

    def _harm(self, results: Mapping[str, MethodResult], scores: Mapping[str, PositionScores]) -> dict[str, Harm]:
        with self._stage(HARM, len(results)):
            harm = {name: self._harm_on_text(found.factors) for name, found in results.items()}
        if scores[NONE].measure == "loss":
            return harm
        ends = {name: end_changes(score, scores[NONE]) for name, score in scores.items()}
        return {name: replace(harm[name], ends=ends.get(name)) for name in harm}

    def _harm_on_text(self, factors: Factors, windows: int | None = None) -> Harm:
        """On all text, or on so many windows of each kind."""
        if set(factors) == {1.0}:
            nothing = Interval(0.0, 0.0, 0.0)
            return Harm(nothing, nothing if self._read else None)
        key = f"{factors}" + (f" on {windows}" if windows else "")
        kept = self._once("harm", key, lambda: self._measured_harm(factors, windows))
        return Harm(*(Interval(*map(to_float, part)) for part in kept))

    @torch.no_grad()
    def _measured_harm(self, factors: Factors, windows: int | None) -> list[list[float]]:
        """Divergence on what the unscaled model wrote, rise of the loss on people's text, with their intervals."""
        written, read = self._written[:windows], self._read[:windows]
        rises = [self._losses(factors, window) - self._unscaled(self._losses, window) for window in read]
        divergence = [
            divergences(self._unscaled(self._logits, window), self._logits(factors, window)) for window in written
        ]
        measured = [torch.cat(parts).double().cpu().numpy() for parts in (divergence, rises) if parts]
        return [[each.value, each.low, each.high] for each in map(mean_interval, measured)]

    def _unscaled_on(self, what: Callable[[Factors, tuple[int, ...]], torch.Tensor], window: tuple[int, ...]) -> Any:
        """Logits or losses of the unscaled model, by which those of every vector are judged."""
        return what(self._rounded(np.zeros(self._space.num_layers)), window)

    def _logits(self, factors: Factors, window: tuple[int, ...], most: int = _COMPARED) -> torch.Tensor:
        self._set(factors)
        return window_logits(self._model, window, scored_positions(len(window), most=most))

    def _few_logits(self, factors: Factors, window: tuple[int, ...]) -> torch.Tensor:
        return self._logits(factors, window, _FEW)

    def _losses(self, factors: Factors, window: tuple[int, ...]) -> torch.Tensor:
        positions = scored_positions(len(window), most=_LOSSES)
        return losses(self._logits(factors, window, _LOSSES), window, positions)


def end_changes(scores: PositionScores, unscaled: PositionScores) -> tuple[Interval, Interval]:
    """Returns how the accuracy at the first and at the last position differs, each with its paired interval."""
    first, last = (difference_interval(scores.correct[:, i].astype(float) - unscaled.correct[:, i]) for i in (0, -1))
    return first, last


def fitness_by_context(scores: PositionScores) -> np.ndarray:
    """Returns the mean probability of each context's targets, or minus its loss."""
    return (scores.log_prob if scores.measure == "loss" else np.exp(scores.log_prob)).mean(axis=1)


def contexts_to_ask(task: Task, wanted: int) -> int:
    """Returns how many different contexts of the search split there are for a search that wants so many."""
    if isinstance(task, PromptTask) and task.without_distractors("search", 0, 1, gold=True) is not None:
        wanted = min(wanted, _OWN_TARGET_CONTEXTS)
    return available(task, "search", wanted)


def densely_asked(task: Task, name: SplitName, contexts: int) -> Split:
    """Returns contexts of a split, asked at many more positions where a context is run once for all of its questions:
    they add little to it, and each says something of the factors.
    """
    if not isinstance(task, KeyValueRetrieval) or task.protocol(name) != ASKED_EVERYWHERE:
        return task.split(name, contexts)
    count = min(_DENSER * len(task.positions), task.num_items)
    positions = {*task.positions, *spread_positions(task.num_items, max(3, count))}
    return task.split(name, contexts, sorted(positions))


def densely_scored(scorer: Scorer, split: Split) -> PositionScores:
    """Scores by likelihood, a context in one row with its many questions: quicker than through the KV cache."""
    return scorer.score(split, packed=can_pack(scorer.model) or None)


def available(task: Task, split: SplitName, wanted: int) -> int:
    """Returns how many contexts a split has, at least 1 and at most `wanted`; all that are, where a task cannot say."""
    return max(1, task.available(split, wanted)) if hasattr(task, "available") else wanted


def measured_rates(model: PeftModel, scorer: Scorer, one: Split, text_tokens: int) -> Rates:
    """Times the unscaled model on one context and on as many tokens as a window of text has, after a first pass that
    makes everything ready.
    """
    window = (one.examples[0].prompt_ids + one.examples[0].answer_ids)[:text_tokens]
    densely_scored(scorer, one)
    positions = scored_positions(len(window), most=_LOSSES)

    def passed_over() -> None:
        with torch.no_grad():
            window_logits(model, window, positions)

    def seconds(timed: Callable[[], object]) -> float:
        started = time.perf_counter()
        timed()
        return max(1e-6, since(started))

    return Rates(seconds(lambda: densely_scored(scorer, one)), seconds(passed_over))
