"""The stages of a search: simple choices first, then a factor for each layer, all under one bound on what they do to
ordinary text; a validation split chooses among them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftModel

from ..files import to_float
from ..runs import Journal
from ..scoring.scores import Interval, PositionScores, difference_interval, mean_interval, rank_key
from ..tasks.base import Split
from ..tuner.scaling import merged_factors
from .algorithms import adapt, evolve, fitted_parabola, population_of
from .evaluator import Evaluator, fitness_by_context
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
    FINALISTS,
    HARM,
    KEPT,
    TEST,
    UNIFORM_HARM,
    VALIDATION,
    WRITTEN,
    Schedule,
    SearchProgress,
    compared_on,
    contexts_of,
    race_of,
    since,
    steps_of,
)
from .result import BOUNDED, LABELS, NONE, PER_LAYER, UNIFORM
from .settings import SearchSettings
from .space import (
    AIMED,
    BezierGenome,
    Factors,
    FactorSpace,
    allowed_share,
    between,
    decay_family,
    farthest,
    first_and_rest_family,
    harm_of,
    per_layer_family,
    steepest,
)

T = TypeVar("T")

_FAMILIES = dict(zip(CONTROLS, (first_and_rest_family, decay_family), strict=True))
SIMPLEST_FIRST = (NONE, BOUNDED, *CONTROLS, PER_LAYER)
"""What may be the result. `UNIFORM` knows no bound: it is shown beside them."""
UNIFORM_RANGE = (0.4, 2.5)
_PROBE = 0.1  # log-factor at which the harm of a uniform factor is measured to find where it meets the bound
_READ_TO_WRITTEN = 1.3  # divergence on people's text, by which is searched, to that on what the model writes
_FEW, _COMPARED, LOSSES = 128, 512, 2048  # positions of a window at most, by what is compared there
_DIGITS = 2
_USUAL_HARM = 0.01  # nats, by which a search without a bound takes its first steps
_PRICE_OF_BOUND = 0.05  # probability of the answers that harm of the size of its bound costs
_MOVED, _PROBED_TOKENS = 0.25, 256  # log-factor and tokens of text by which a layer's harm is measured
_WIDEST = 0.5  # log-factor of a standard draw at most
_LEAST_CURVATURE = 0.1  # of the mean, added to each layer's
_NOTHING = 0.01  # log-factor that changes nothing but how numbers are rounded
_MOST_RATIO = 5.0  # of measured harm to what the curvatures say, which one window may tell
_RESIZED = 4  # times at most that the harm of what was found is measured, made smaller or larger
_RESIZED_ENOUGH = 1.02  # times that log-factors could still grow, which is not worth a measurement
_MEMORY = 0.7  # share of the running mean of that ratio that a generation keeps
_AVERAGED_SHARE = 0.25  # of the centroids, the last ones, whose mean is one of the two ends of a search


@dataclass(frozen=True)
class MethodResult:
    """What a method ended with."""

    factors: Factors  # of each layer, rounded
    fitness: float  # mean probability of the targets on the last contexts of the search split that it was raced on
    evaluations: int  # vectors whose fitness was looked at
    # by which it was found: of each the mean `fitness` of its members and the `divergence` at its centroid, on ordinary
    # text; of curves the fitness of the fittest so far, and None
    generations: tuple[dict[str, float | None], ...] = ()
    control_points: list[list[float]] | None = None  # the four `(x, y)` points of its curve; None where it is none
    unmerged: float | None = None  # its fitness, on the same contexts, before the nearest factors were merged, if any


@dataclass(frozen=True)
class Outcome:
    """What a search found, by the name of the method."""

    found: Mapping[str, MethodResult]
    harm: Mapping[str, Harm]
    chosen: str  # the result's name
    test: Mapping[str, PositionScores]  # held-out; of the answers that the model writes where the task has a metric


@dataclass(eq=False)
class Stages:
    """One search, stage after stage. Each result is kept in a journal, and taken from there if it is there."""

    model: PeftModel  # with one LAYER_ROPE adapter, changed in place
    settings: SearchSettings
    space: FactorSpace
    read: Windows  # of people's text; none: what the model writes takes its place
    text_tokens: int  # of a window of what the model writes
    evaluator: Evaluator  # of `model`
    journal: Journal
    audience: SearchProgress
    enough: Callable[[], bool]  # asked after each generation; once it says so, no other begins
    seconds: dict[str, float] = field(default_factory=dict)  # that each stage took

    def __post_init__(self) -> None:
        self._written: Windows = ()
        self._ones: Factors = (1.0,) * self.space.num_layers
        # logits or losses of the unscaled model, by which those of every vector are judged
        self._unscaled = cache(lambda measured, *of: measured(self._ones, *of))

    def run(
        self, schedule: Schedule, search: Split, validation: Split, test: Split, kept: Split | None = None
    ) -> Outcome:
        """Searches, measures, chooses, and has each vector tested. Contexts to search on are drawn with replacement
        where they are fewer than the schedule has. On contexts that are `kept` the result loses nothing for sure.
        """
        self._search = search
        rng, self._contexts = np.random.default_rng(self.settings.seed), list(range(search.num_groups))
        while len(self._contexts) < schedule.search_contexts:
            self._contexts += rng.permutation(search.num_groups).tolist()
        with self._stage(WRITTEN, 1):
            self._written = tuple(map(tuple, self._once("text", "written", self._write)))
        results = self._uniform(schedule)
        start = sum(schedule.rounds)
        if schedule.shared_contexts is None:
            per_layer = self._evolved(PER_LAYER, per_layer_family(self.space), schedule.steps, start)
        else:
            per_layer = self._curve(schedule, start)
        start += schedule.own_contexts
        for name, family in _FAMILIES.items():
            results[name] = self._evolved(name, family(self.space), schedule.control_steps, start)
            start += contexts_of(schedule.control_steps)
        results[PER_LAYER] = per_layer
        scores = self._scored(VALIDATION, {name: results[name] for name in SIMPLEST_FIRST}, validation)
        harm = self._harm(results, scores)
        fitness = {name: fitness_by_context(score) for name, score in scores.items()}
        chosen = self._chosen(results, fitness, harm, kept)
        first = {name: results[name] for name in (NONE, chosen)}  # a test that is interrupted has these
        held_out = self._scored(TEST, first | results, test, written=True)
        return Outcome(results, harm, chosen, held_out)

    def _chosen(
        self,
        results: Mapping[str, MethodResult],
        fitness: Mapping[str, np.ndarray],
        harm: dict[str, Harm],
        kept: Split | None,
    ) -> str:
        """The result's name. What is to be kept is measured for that alone, and added to its `harm`."""
        while True:
            chosen = choose(fitness, harm, SIMPLEST_FIRST, self.settings.max_harm)
            if kept is None or chosen == NONE or harm[chosen].kept is not None:
                return chosen
            scores = self._scored(KEPT, {name: results[name] for name in (NONE, chosen)}, kept)
            change = mean_interval(fitness_by_context(scores[chosen]) - fitness_by_context(scores[NONE]))
            alike = (name for name in results if results[name].factors == results[chosen].factors)
            harm.update((name, replace(harm[name], kept=change)) for name in list(alike))
            self.audience.note(f"{LABELS[chosen]}: {change.value:+.3f}")

    def _part(self, start: int, count: int) -> Split:
        """Contexts number `start` and on, each once."""
        return self._search.part(self._contexts[start : start + count])

    def _once(self, kind: str, key: str, compute: Callable[[], Any]) -> Any:
        """What is in the record, or is computed and put there."""
        kept = self.journal.get(kind, key)
        if kept is None:
            kept = compute()
            self.journal.append(kind, key, kept)
        self.audience.advance()
        return kept

    def _each(
        self,
        kind: str,
        vectors: Sequence[Factors],
        split: Split,
        plain: Callable[[PositionScores], Any],
        prefix: str = "",
        written: bool = False,
    ) -> list[Any]:
        """What `plain` makes of each vector's scores. Those that are not in the record are scored, a few at a time."""
        keys = [f"{prefix}{vector}" for vector in vectors]
        new = [number for number, key in enumerate(keys) if self.journal.get(kind, key) is None]
        for at in range(0, len(new), self.evaluator.at_once):
            some = new[at : at + self.evaluator.at_once]
            found = self.evaluator.scores([vectors[number] for number in some], split, written)
            for number, scores in zip(some, found, strict=True):
                self.journal.append(kind, keys[number], plain(scores))
                self.audience.advance()
        for _ in range(len(keys) - len(new)):
            self.audience.advance()
        return [self.journal.get(kind, key) for key in keys]

    @contextmanager
    def _stage(self, name: str, total: int) -> Iterator[None]:
        started = time.perf_counter()
        self.audience.stage(name, total)
        yield
        self.seconds[name] = since(started)

    @cached_property
    def _log_limits(self) -> tuple[float, float]:
        return tuple(np.log(self.settings.factor_limits))

    def _rounded(self, log_factors: np.ndarray | float) -> Factors:
        """Factors as they are kept: within their range and rounded, and those of layers that are not free exactly 1. A
        number: of all.
        """
        return self._anywhere(np.clip(log_factors, *self._log_limits))

    def _anywhere(self, log_factors: np.ndarray | float) -> Factors:
        """The same of factors that need not be within their range, to see what they do."""
        factors = np.broadcast_to(np.round(np.exp(log_factors), _DIGITS), self.space.num_layers)
        return self.space.spread([float(factors[layer]) for layer in self.space.scaled_layers])

    def _uniform(self, schedule: Schedule) -> dict[str, MethodResult]:
        """The best uniform factor of a wide range, and the best of those that keep to the bound."""
        races = {UNIFORM: np.linspace(*np.log(UNIFORM_RANGE), schedule.uniform_values)}
        if self.settings.max_harm is not None:
            races[BOUNDED] = self._bounded_values(self.settings.max_harm)
        results: dict[str, MethodResult] = {}
        for name, values in races.items():
            vectors = list(dict.fromkeys(map(self._rounded, values)))
            alone = len(schedule.rounds) if NONE not in results else 0
            measured = _RESIZED if name == BOUNDED else 0
            with self._stage(race_of(name), alone + sum(schedule.running(len(vectors))) + measured):
                if NONE not in results:
                    results[NONE] = self._raced([self._ones], schedule)
                best = self._raced(vectors, schedule)
                if name == BOUNDED:  # where the bound lies was reckoned from one window of each text
                    kept = self._rounded(self._within_bound(np.log(best.factors), grow=False))
                    best = replace(best, factors=kept)
                results[name] = best
                self.audience.note(f"{best.factors[-1]:g}: {best.fitness:.3f}, unscaled {results[NONE].fitness:.3f}")
        return {BOUNDED: results[UNIFORM], **results}

    def _write(self) -> Windows:
        self.model.base_model.set_layer_factors(self._ones)
        return sample_windows(self.model, NUM_WRITTEN, self.text_tokens, seed=self.settings.seed, read=self.read)

    def _bounded_values(self, bound: float) -> list[float]:
        """Log-factors from one end of the bound to the other."""
        with self._stage(UNIFORM_HARM, 2):
            low, high = (self._harm_on_text(self._anywhere(far), windows=1) for far in (-_PROBE, _PROBE))
        below, above = (harm.loss_rise.value if harm.loss_rise is not None else 0.0 for harm in (low, high))
        ends = [
            -farthest(_PROBE, low.divergence.value, below, above, bound),
            farthest(_PROBE, high.divergence.value, above, below, bound),
        ]
        return [share * end for end in ends for share in (1.0, 2 / 3, 1 / 3)] + [0.0]

    def _raced(self, vectors: Sequence[Factors], schedule: Schedule) -> MethodResult:
        """Scores vectors on more and more contexts; after each round the better third goes on."""
        start, running = 0, list(vectors)
        values: dict[Factors, list[float]] = {vector: [] for vector in vectors}
        for contexts, count in zip(schedule.rounds, schedule.running(len(vectors)), strict=True):
            running = running[:count]
            for vector, seen in zip(running, self._by_context(running, start, contexts), strict=True):
                values[vector] += seen
            start += contexts
            running.sort(key=lambda vector: -rank_key(np.mean(values[vector])))
            self.audience.note(f"{running[0][-1]:g}: {np.mean(values[running[0]]):.3f}")
        return MethodResult(running[0], float(np.mean(values[running[0]])), len(vectors))

    def _by_context(self, vectors: Sequence[Factors], start: int, contexts: int) -> list[list[float]]:
        """Fitness of each vector on each of some contexts."""
        split = self._part(start, contexts)
        fitness = self._each(
            "raced", vectors, split, lambda scores: fitness_by_context(scores).tolist(), f"{start}+{contexts} "
        )
        return [[to_float(value) for value in values] for values in fitness]

    def _evolved(self, name: str, family: np.ndarray, count: int, start: int) -> MethodResult:
        """Searches a family by CMA-ES, each generation on contexts of its own, and ends with the mean of the last
        centroids, or where a parabola through all that was seen rises most for the harm that it does, whichever is
        better on contexts that neither knows, as far as the bound. Harm is what the curvature of each layer alone makes
        of a vector, in the measure of what was seen at the centroids.
        """
        curvature, bound = self._curvature, self.settings.max_harm
        least = curvature.min(axis=0) @ family**2  # where more is to be gained, a layer is to be seen far out
        wide = np.sqrt(2 * (bound or _USUAL_HARM) / least / family.shape[1])
        family = family * np.minimum(wide, _WIDEST / np.abs(family).max(axis=0))
        price = 0.0 if bound is None else _PRICE_OF_BOUND / bound
        generations: list[dict[str, float | None]] = []
        seen: list[tuple[list[np.ndarray], list[float]]] = []
        ratio = 1.0  # of harm that was measured to what the curvatures say

        def score(number: int, centroid: np.ndarray, members: Sequence[np.ndarray]) -> list[float]:
            nonlocal ratio
            split = self._part(start + number, 1)

            def measured() -> list[Any]:
                found = self.evaluator.scores([self._rounded(member) for member in members], split)
                values = [float(fitness_by_context(scores).mean()) for scores in found]
                return [values, self._divergence(self._rounded(centroid), number)]

            kept = self._once("generation", f"{name} {number}", measured)
            fitness, divergence = [to_float(value) for value in kept[0]], to_float(kept[1])
            if (expected := harm_of(centroid, curvature)) > 0:
                seen_here = float(np.clip(divergence / expected, 1 / _MOST_RATIO, _MOST_RATIO))
                ratio = _MEMORY * ratio + (1 - _MEMORY) * (seen_here if np.isfinite(seen_here) else _MOST_RATIO)
            seen.append(([np.linalg.lstsq(family, member, rcond=None)[0] for member in members], fitness))
            generations.append({"fitness": float(np.mean(fitness)), "divergence": divergence})
            self.audience.note(f"last: fitness {np.mean(fitness):.3f}, harm {divergence:.4f}")
            harms = [price * ratio * harm_of(member, curvature) for member in members]
            return [value - harm for value, harm in zip(fitness, harms, strict=True)]

        def as_far_as_allowed(ray: np.ndarray, farthest: float) -> Factors:
            if bound is not None:
                most = bound * (_READ_TO_WRITTEN if self.read else 1.0)  # on the text that is searched by
                allowed = np.sqrt(AIMED * most / max(ratio * harm_of(ray, curvature), 1e-12))
                farthest = min(farthest, float(allowed))
            return self._rounded(farthest * ray)

        resized = _RESIZED if bound is not None else 0
        with self._stage(steps_of(name), count + FINALISTS + (self.settings.max_distinct is not None) + resized):
            generated = adapt(family, count, score, self.settings.seed, self._log_limits)
            centroids = self._until_enough(name, count, generated)
            last = centroids[-max(1, round(len(centroids) * _AVERAGED_SHARE)) :]
            finalists = [as_far_as_allowed(np.mean(last, axis=0), 1.0)]
            if (parabola := fitted_parabola(*zip(*seen, strict=True))) is not None:
                slope, bend = parabola
                direction = steepest(family, slope, curvature)
                reach = max(float(np.linalg.norm(member)) for members, _ in seen for member in members)
                top = slope @ direction / (-2 * bend) if bend < 0 else reach
                finalists.append(as_far_as_allowed(family @ direction, min(top, reach)))
            split = start + count, compared_on(count)
            values = [rank_key(np.mean(seen)) for seen in self._by_context(finalists, *split)]
            best, fitness, unmerged = finalists[int(np.argmax(values))], max(values), None
            if (merged := self._merged(best)) != best:
                unmerged, fitness = fitness, float(np.mean(self._by_context([merged], *split)[0]))
                self.audience.note(f"{len(set(best))} factors {unmerged:.3f}, {len(set(merged))} {fitness:.3f}")
                best = merged
            found = self._rounded(self._within_bound(np.log(best)))
        evaluations = len(centroids) * population_of(family.shape[1])
        return MethodResult(found, fitness, evaluations, tuple(generations), unmerged=unmerged)

    def _merged(self, factors: Factors) -> Factors:
        """As few different factors as are asked for; the more harm a layer does, the less it is moved."""
        most, free = self.settings.max_distinct, list(self.space.scaled_layers)
        if most is None:
            return factors
        fixed = not set(self.space.key_sources) <= set(free)  # the factor 1 of other layers is one of them
        logs = np.zeros(len(factors))
        weights = self._curvature[:, free].mean(axis=0)
        logs[free] = np.log(merged_factors([factors[layer] for layer in free], max(1, most - fixed), weights))
        return self._rounded(logs)

    def _curve(self, schedule: Schedule, start: int) -> MethodResult:
        """Searches as the paper does: context utilisation of the accuracies of curves, all on the same contexts."""
        genome, split = BezierGenome(self.space), self._part(start, schedule.shared_contexts)
        tried = 0

        def score(number: int, vectors: Sequence[Factors]) -> list[float]:
            nonlocal tried
            tried += len(vectors)
            return self._once(
                "generation",
                f"{PER_LAYER} {number}",
                lambda: [s.utilization(self.settings.weights) for s in self.evaluator.scores(vectors, split)],
            )

        rng = random.Random(self.settings.seed)
        with self._stage(steps_of(PER_LAYER), schedule.steps):
            generated = evolve(genome, schedule.steps, schedule.population, score, rng)
            fittest = self._until_enough(PER_LAYER, schedule.steps, generated)
        values = [one.fitness.values[0] for one in fittest]
        found, points = genome.decode(fittest[-1]), genome.control_points(fittest[-1])
        generations = tuple({"fitness": value, "divergence": None} for value in values)
        return MethodResult(found, values[-1], tried, generations, points)

    def _until_enough(self, name: str, count: int, generations: Iterator[T]) -> list[T]:
        """Runs so many generations, or fewer where that is enough; as many as an interrupted search had."""
        ended, seen = self.journal.get("ended", name), []
        for one in generations:
            seen.append(one)
            if len(seen) == ended or (ended is None and len(seen) < count and self.enough()):
                break
        if len(seen) < count and ended is None:
            self.journal.append("ended", name, len(seen))
        return seen

    @cached_property
    def _curvature(self) -> np.ndarray:
        """Of the divergence by each layer's log-factor, below 1 and above, shape `(2, num_layers)`: twice what moving
        the layer alone does, by the square of how far it was moved. What rounding alone does is taken off, which in
        bfloat16 is half of what some layers seem to do, and none is much less than the mean, which noise might say. On
        Qwen2.5 0.5B some layers bear a smaller factor six times better than a larger one.
        """
        sources, free = self.space.key_sources, list(self.space.scaled_layers)

        def harm(layer: int, far: float) -> float:
            moved = self._anywhere(np.where(np.array(sources) == layer, far, 0.0))
            kept = self._once(
                "curvature", f"{layer} {far:+g}", lambda: self._divergence(moved, 0, tokens=_PROBED_TOKENS)
            )
            return to_float(kept)

        found = np.zeros((2, len(sources)))
        with self._stage(CURVATURE, 2 * len(free) + 2):
            # the earlier a layer is, the more is rounded otherwise after it
            noise = np.linspace(harm(free[0], _NOTHING), harm(free[-1], _NOTHING), len(free))
            for side, far in enumerate((-_MOVED, _MOVED)):
                found[side, free] = [harm(layer, far) for layer in free] - noise
        found = np.nan_to_num(np.maximum(found, 0), nan=1.0, posinf=1.0) * 2 / _MOVED**2
        found[:, free] += found[:, free].mean() * _LEAST_CURVATURE + 1e-9
        return found

    @torch.no_grad()
    def _divergence(self, factors: Factors, number: int, tokens: int | None = None) -> float:
        """On one of the windows that are searched by, or its first tokens."""
        windows = self.read or self._written
        window = windows[number % len(windows)][:tokens]
        unscaled = self._unscaled(self._logits, window, _FEW)
        return float(divergences(unscaled, self._logits(factors, window, _FEW)).mean())

    def _within_bound(self, log_factors: np.ndarray, grow: bool = True) -> np.ndarray:
        """Log-factors made smaller together until the harm to text is about within its bound, and as large as is found
        to keep to it; those that keep to it as they are become larger only if they may `grow`.
        """
        bound = self.settings.max_harm
        if bound is None:
            return log_factors
        size, inside, outside = 1.0, None, None  # of the largest that keeps to it and the smallest that does not
        for _ in range(_RESIZED):
            harm = self._harm_on_text(self._rounded(size * log_factors))
            rise = harm.loss_rise.value if harm.loss_rise is not None else 0.0
            share, found = allowed_share(harm.divergence.value, rise, bound), (size, max(harm.divergence.value, rise))
            inside, outside = (found, outside) if share >= 1 else (inside, found)
            following = size * share if inside is None or outside is None else between(inside, outside, bound)
            if inside is not None and (following < _RESIZED_ENOUGH * inside[0] or (inside[0] == 1.0 and not grow)):
                break
            size = following
        return (size if inside is None else inside[0]) * log_factors

    def _scored(
        self, stage: str, results: Mapping[str, MethodResult], split: Split, written: bool = False
    ) -> dict[str, PositionScores]:
        """Scores of each vector on a split of which nothing is known yet."""
        vectors = list(dict.fromkeys(found.factors for found in results.values()))
        with self._stage(stage, len(vectors)):
            kept = self._each(split.name, vectors, split, PositionScores.to_plain, written=written)
        scores = dict(zip(vectors, map(PositionScores.from_plain, kept), strict=True))
        return {name: scores[found.factors] for name, found in results.items()}

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
            return Harm(nothing, nothing if self.read else None)
        key = f"{factors}" + (f" on {windows}" if windows else "")
        kept = self._once("harm", key, lambda: self._measured_harm(factors, windows))
        return Harm(*map(Interval.from_list, kept))

    @torch.no_grad()
    def _measured_harm(self, factors: Factors, windows: int | None) -> list[list[float]]:
        """Divergence on what the unscaled model wrote, rise of the loss on people's text, with their intervals."""
        written, read = self._written[:windows], self.read[:windows]
        rises = [self._losses(factors, window) - self._unscaled(self._losses, window) for window in read]
        divergence = [
            divergences(self._unscaled(self._logits, window), self._logits(factors, window)) for window in written
        ]
        measured = [torch.cat(parts).double().cpu().numpy() for parts in (divergence, rises) if parts]
        return [[each.value, each.low, each.high] for each in map(mean_interval, measured)]

    def _logits(self, factors: Factors, window: tuple[int, ...], most: int = _COMPARED) -> torch.Tensor:
        self.model.base_model.set_layer_factors(factors)
        return window_logits(self.model, window, scored_positions(len(window), most=most))

    def _losses(self, factors: Factors, window: tuple[int, ...]) -> torch.Tensor:
        positions = scored_positions(len(window), most=LOSSES)
        return losses(self._logits(factors, window, LOSSES), window, positions)


def end_changes(scores: PositionScores, unscaled: PositionScores) -> tuple[Interval, Interval]:
    """Returns how the accuracy at the first and at the last position differs, each with its paired interval."""
    first, last = (difference_interval(scores.correct[:, i].astype(float) - unscaled.correct[:, i]) for i in (0, -1))
    return first, last
