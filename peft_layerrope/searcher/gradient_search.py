"""The search by gradients: simple choices first, then a factor for each layer, all under one bound on what they do to
ordinary text; a validation split chooses among them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from ..errors import SearchError
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
from .gradient import (
    AVERAGED_SHARE,
    FactorGradient,
    Family,
    Slope,
    Step,
    averaged,
    climb,
    decay_family,
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
    CONTEXTS_PER_STEP,
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
    race_of,
    steps_of,
)
from .result import BOUNDED, NONE, PER_LAYER, UNIFORM
from .settings import SearchSettings
from .space import Factors, FactorSpace

_FAMILIES = dict(zip(CONTROLS, (first_and_rest_family, decay_family), strict=True))
Slopes = Callable[[int, np.ndarray], tuple[Slope, Slope]]
"""See [`climb`]."""
SIMPLEST_FIRST = (NONE, BOUNDED, *CONTROLS, PER_LAYER)
"""What may be the result. `UNIFORM` knows no bound: it is shown beside them."""
UNIFORM_RANGE = (0.4, 2.5)
_PROBE = 0.1  # log-factor at which the harm of a uniform factor is measured to find where it meets the bound
_FARTHEST = 1.0  # log-factor that is tried where a uniform factor does no harm
_OWN_TARGET_CONTEXTS = 24  # the most contexts of the search split whose questions are each asked for their targets
_READ_TO_WRITTEN = 1.3  # divergence on people's text, of which gradients are taken, to that on what the model writes
_FEW, _COMPARED, _LOSSES = (
    128,
    512,
    2048,
)  # positions of a window at most: of distributions that are compared, of losses
# Questions to a context, in times of the task's positions. Of the variance of a gradient on 14 questions (100 pairs,
# Qwen2.5 0.5B, six contexts) four fifths are theirs and one the context's; 42 questions take a quarter more time.
_DENSER = 8
_DIGITS = 2
_USUAL_HARM = 0.01  # nats, by which a search without a bound takes its first steps
_PRICE_OF_BOUND = 0.05  # probability of the answers that harm of the size of its bound costs
_MOVED, _PROBED_TOKENS = 0.25, 256  # log-factor and tokens of text by which a layer's harm is measured
_LEAST_CURVATURE = 0.25  # of the mean, added to each layer's
_MOST_RATIO = 5.0  # of measured harm to what the curvatures say, which one window may tell
_AIMED = 0.9  # share of the bound: what breaks it has to be made smaller and measured again
_MEMORY = 0.7  # share of the running mean of that ratio that a generation keeps


@dataclass(frozen=True)
class MethodResult:
    """What a method ended with.

    Attributes:
        factors: of each layer, rounded.
        fitness: mean probability of the targets on contexts of the search split: the average of the last steps, or of
            the contexts of a race; not a number where none was run.
        evaluations: vectors whose fitness was looked at.
        steps: of a climb.
    """

    factors: Factors
    fitness: float
    evaluations: int
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a search by gradients found.

    Attributes:
        found: by name.
        harm: of each, on text that no gradient was taken on.
        chosen: the result's name.
        test: held-out scores of each, of the answers that the model writes where the task has a metric.
    """

    found: Mapping[str, MethodResult]
    harm: Mapping[str, Harm]
    chosen: str
    test: Mapping[str, PositionScores]


class GradientSearch:
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
        enough: asked before each gradient step but the first of a climb; once it says so, climbs end. None: never.
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
        self._enough = enough
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
        self._gradient = FactorGradient(model)
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
        search = self._climbed if self._settings.takes_gradient_steps else self._evolved
        per_layer = search(PER_LAYER, per_layer_family(*layers), schedule.steps, start)
        start += schedule.steps * schedule.contexts_per_step
        for name, family in _FAMILIES.items():
            if schedule.control_steps:
                results[name] = search(name, family(*layers), schedule.control_steps, start)
                start += schedule.control_steps * schedule.contexts_per_step
            else:
                results[name] = self._replayed(name, family(*layers), per_layer.steps)
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

    def _climbed(self, name: str, family: Family, count: int, start: int) -> MethodResult:
        steps: list[Step] = []

        def slopes(number: int, log_factors: np.ndarray) -> tuple[Slope, Slope]:
            split = self._part(start + number * CONTEXTS_PER_STEP, CONTEXTS_PER_STEP)
            kept = self._once(
                "step",
                f"{name} {number}",
                lambda: [
                    _plain(self._gradient.of_answers(split, log_factors)),
                    _plain(self._of_text(number, log_factors)),
                ],
            )
            return _slope(kept[0]), _slope(kept[1])

        ended = self._journal.get("ended", name)
        with self._stage(steps_of(name), count):
            for step in self._climb(family, count, slopes):
                steps.append(step)
                recent = [s.fitness.value for s in steps[-5:]]
                self._audience.note(f"fitness {np.mean(recent):.3f}, harm {step.divergence:.4f}")
                if len(steps) == ended or (ended is None and len(steps) < count and self._is_enough()):
                    break
        if len(steps) < count and ended is None:
            self._journal.append("ended", name, len(steps))
        if not steps:
            raise SearchError(f"{name}: the gradient is not finite at its first step; use another --dtype.")
        fitness = float(np.mean([step.fitness.value for step in steps[len(steps) // 2 :]]))
        return MethodResult(self._rounded(self._within_bound(averaged(steps))), fitness, len(steps), tuple(steps))

    def _evolved(self, name: str, family: Family, count: int, start: int) -> MethodResult:
        """Searches a family by CMA-ES, each generation on contexts of its own, and goes in the end where a parabola
        through all that was seen has its top, as far as the bound. Harm is what the curvature of each layer alone makes
        of a vector, in the measure of what was seen at the centroids.
        """
        curvature, bound = self._curvature(), self._settings.max_harm
        family = family.scaled(
            np.sqrt(2 * (bound or _USUAL_HARM) / (curvature @ family.basis**2) / family.num_parameters)
        )
        price = 0.0 if bound is None else _PRICE_OF_BOUND / bound
        steps: list[Step] = []
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
            steps.append(Step(centroid, Slope(float(np.mean(fitness)), np.zeros(0)), divergence, price))
            self._audience.note(f"fitness {steps[-1].fitness.value:.3f}, harm {divergence:.4f}")
            return [value - price * ratio * harm_of(member) for value, member in zip(fitness, members, strict=True)]

        def scored(split: Split, centroid: np.ndarray, members: Sequence[np.ndarray]) -> list[Any]:
            values = []
            for member in members:
                self._set(self._rounded(member))
                values.append(float(fitness_by_context(densely_scored(self._scorer, split)).mean()))
            return [values, self._divergence(self._rounded(centroid), len(steps))]

        ended, centroids = self._journal.get("ended", name), []
        with self._stage(steps_of(name), count):
            for centroid in adapt(family, count, score, self._settings.seed, self._limits):
                centroids.append(centroid)
                done = len(centroids) - 1
                if done and (done == ended or (ended is None and done < count and self._is_enough())):
                    break
        if done < count and ended is None:
            self._journal.append("ended", name, done)
        last = centroids[-max(1, round(done * AVERAGED_SHARE)) :]
        found = np.mean(last, axis=0)
        if bound is not None and (top := fitted_top(*zip(*seen, strict=True))) is not None:
            ray = family.log_factors(top[0])
            allowed = np.sqrt(_AIMED * self._max_divergence / max(ratio * harm_of(ray), 1e-12))
            found = np.clip(min(top[1], float(allowed)) * ray, *self._limits)
        found = self._rounded(self._within_bound(found))
        fitness = float(np.mean([step.fitness.value for step in steps[done // 2 :]]))
        return MethodResult(found, fitness, done * population_of(family.num_parameters), tuple(steps))

    def _is_enough(self) -> bool:
        return self._enough is not None and self._enough()

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

    def _replayed(self, name: str, family: Family, steps: Sequence[Step]) -> MethodResult:
        """Climbs once more, in a smaller family, on the slopes of fitness that the steps of a larger one saw where they
        were, which is near; of the divergence on the parabola that it is near the unscaled model.
        """
        inverse, columns = np.linalg.pinv(family.basis), []
        with self._stage(steps_of(name, replayed=True), family.num_parameters):
            for number, direction in enumerate(family.basis.T):
                at = _PROBE * direction
                slope = _slope(self._once("bend", f"{name} {number}", lambda at=at: _plain(self._of_text(0, at))))
                columns.append(family.basis.T @ slope.gradient / _PROBE)
        bend = (np.array(columns) + np.array(columns).T) / 2

        def slopes(number: int, log_factors: np.ndarray) -> tuple[Slope, Slope]:
            values = inverse @ log_factors
            pull = bend @ values
            return steps[number].fitness, Slope(float(values @ pull) / 2, inverse.T @ pull)

        climbed = list(self._climb(family, len(steps), slopes))
        return MethodResult(self._rounded(self._within_bound(averaged(climbed))), math.nan, len(steps))

    def _climb(self, family: Family, count: int, slopes: Slopes) -> Iterator[Step]:
        """From the unscaled model: a race on few contexts may begin on the wrong side of it."""
        origin = np.zeros(self._space.num_layers)
        return climb(family, origin, count, slopes, max_divergence=self._max_divergence, limits=self._limits)

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

    def _of_text(self, number: int, log_factors: np.ndarray) -> Slope:
        windows = self._read or self._written
        number %= len(windows)
        positions = scored_positions(len(windows[number]), number)
        return self._gradient.of_divergence(windows[number], positions, log_factors)

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


def farthest(probe: float, divergence: float, rise: float, rise_beyond: float, bound: float) -> float:
    """Returns how far a log-factor may go on one side before its harm meets a bound.

    Args:
        probe: log-factor at which the harm is known.
        divergence: there, which grows with the square of the log-factor.
        rise: of the loss there; a parabola through it, through 0 at 0, and through `rise_beyond` at `-probe`.
        rise_beyond: see `rise`.
        bound: of both, in nats.
    """
    far = min(_FARTHEST, probe * math.sqrt(bound / max(divergence, 1e-9)))
    slope, curvature = (rise - rise_beyond) / (2 * probe), (rise + rise_beyond) / (2 * probe**2)
    roots = np.roots([curvature, slope, -bound])
    return min([far, *(root.real for root in roots if abs(root.imag) < 1e-12 and root.real > 0)])


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


def measured_rates(model: PeftModel, scorer: Scorer, one: Split, text_tokens: int, by_gradients: bool) -> Rates:
    """Times the unscaled model on one context and on as many tokens as a window of text has, after a first pass that
    makes everything ready; with gradients only where a search takes them.
    """
    gradient, window = FactorGradient(model), (one.examples[0].prompt_ids + one.examples[0].answer_ids)[:text_tokens]
    unscaled = np.zeros(len(model.peft_config[model.active_adapter].layer_factors))
    densely_scored(scorer, one)
    positions = scored_positions(len(window))

    def passed_over() -> None:
        with torch.no_grad():
            window_logits(model, window, positions)

    def seconds(timed: Callable[[], object]) -> float:
        started = time.perf_counter()
        timed()
        return max(1e-6, since(started))

    context = seconds(lambda: densely_scored(scorer, one))
    if not by_gradients:
        return Rates(context, 0.0, 3 * seconds(passed_over))
    return Rates(
        context,
        seconds(lambda: gradient.of_answers(one, unscaled)),
        seconds(lambda: gradient.of_divergence(window, positions, unscaled)),
    )


def _plain(slope: Slope) -> list[Any]:
    return [slope.value, slope.gradient.tolist()]


def _slope(plain: Sequence[Any]) -> Slope:
    return Slope(to_float(plain[0]), np.array([to_float(value) for value in plain[1]]))
