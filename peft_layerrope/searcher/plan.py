"""What a search is going to do, how long that takes, and what it says while it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from ..errors import SearchError
from ..report import duration, printable, times
from .algorithms import population_of
from .harm import NUM_WINDOWS, NUM_WRITTEN
from .result import BOUNDED, DECAY, FIRST_REST, LABELS, PER_LAYER, UNIFORM
from .settings import SearchSettings


class SearchProgress(AbstractContextManager):
    """What a search tells its audience. This one hears and says nothing."""

    def __exit__(self, *exc: object) -> None:
        return None

    def expect(self, seconds: Mapping[str, float]) -> None:
        """All stages that are going to be, by name, and how long each may take; told before the first, if known."""

    def stage(self, name: str, total: int) -> None:
        """A stage of at most `total` steps begins; the one before is over."""

    def advance(self) -> None:
        """One step is done."""

    def note(self, text: str) -> None:
        """Something worth showing beside the bar, e.g. the best fitness so far."""


_TRUSTED = 60.0  # expected seconds that count as if they had been kept, before it is known how fast a machine is


class RichProgress(SearchProgress):
    """One line on stderr for each stage that is over, and in a terminal a bar below them: of all stages where it is
    known how long they take, else of the one that runs.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.percentage:3.0f} %"),
            BarColumn(bar_width=12, table_column=Column(min_width=12)),
            TextColumn("{task.fields[left]:>11}", table_column=Column(min_width=11, no_wrap=True)),
            TextColumn(
                "{task.description}",
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
                markup=False,
            ),
            console=self._console,
            transient=True,
            expand=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=1.0, left="")
        self._seconds: dict[str, float] = {}
        self._name, self._note = "", ""
        self._total = self._done = 0
        self._over = 0.0  # expected seconds of the stages that are over
        self._paced = np.full(2, _TRUSTED)  # seconds that stages took, and that were expected of them
        self._began = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._finish_stage()
        self._bar.stop()

    def expect(self, seconds: Mapping[str, float]) -> None:
        self._seconds = dict(seconds)

    def stage(self, name: str, total: int) -> None:
        self._finish_stage()
        self._name, self._note, self._total, self._done = name, "", total, 0
        self._began = time.perf_counter()
        self._bar.start()  # not before: what is told of the plan would be drawn over
        self._show()

    def advance(self) -> None:
        self._done += 1
        self._show()

    def note(self, text: str) -> None:
        self._note = text
        self._show()

    def _show(self) -> None:
        share = min(1.0, self._done / max(self._total, 1))
        if self._seconds:
            total = sum(self._seconds.values())
            done = self._over + share * self._seconds.get(self._name, 0.0)
            left = (total - done) * self._paced[0] / self._paced[1]
        else:
            total, done = 1.0, share
            left = (time.perf_counter() - self._began) * (1 - share) / share if share > 0 else None
        count = f" {self._done}/{self._total}" if self._total > 1 else ""
        text = printable(f"{self._name}{count}" + (f" · {self._note}" if self._note else ""))
        told = f"{duration(left)} left" if left is not None else ""
        self._bar.update(self._task, total=total, completed=done, description=text, left=told)

    def _finish_stage(self) -> None:
        if not self._name:
            return
        took, expected = time.perf_counter() - self._began, self._seconds.get(self._name, 0.0)
        if took > expected / 10:  # what an earlier run did takes no time
            self._paced += took, expected
        self._over += expected
        note = f"  {self._note}" if self._note else ""
        line = printable(f"{self._name:<34} {duration(took):>6}{note}")
        self._console.print(line, highlight=False, no_wrap=True, overflow="ellipsis", markup=False)
        self._name = ""


def since(started: float) -> float:
    """Seconds since a reading of `time.perf_counter()`, which no step of the clock makes negative."""
    return max(0.0, time.perf_counter() - started)


# Stages of a search.
PREFLIGHT = "preflight"
WRITTEN = "text that the model writes"
UNIFORM_HARM = "harm of uniform factors"
CURVATURE = "harm of each layer"
VALIDATION = "choice on the validation split"
HARM = "harm to ordinary text"
KEPT = "task that is to be kept"
TEST = "held-out test"


def race_of(name: str) -> str:
    """Returns the name of the stage in which the factors of a method race."""
    return f"race: {LABELS[name]}"


def steps_of(name: str) -> str:
    """Returns the name of the stage in which a method has its generations."""
    return f"steps: {LABELS[name]}"


def check_length(settings: SearchSettings, length: int, window: int | None) -> None:
    """Raises SearchError for prompts of so many tokens if no factor of the range could bring them back into the model's
    trained window, which is None if its config does not say.
    """
    if window is None:
        return
    largest = settings.factor_limits[1]
    reach = window * largest * settings.factor
    if length > reach:
        raise SearchError(
            f"prompts of {length} tokens: with a window of {window}, factor={settings.factor:g} and "
            f"max_factor={largest:g} the largest scaling reaches {reach:.0f} tokens. Use shorter "
            "prompts, a larger range, or rope_type 'linear' or 'dynamic' with a factor."
        )


MAX_STEPS = 400
FINALISTS = 2  # vectors that generations may end with
_UNIFORM_VALUES, _FINER = 11, 32  # uniform factors that race, and generations for which there are ten more
BOUNDED_VALUES = 7
CONTROLS = (FIRST_REST, DECAY)
"""Choices of two numbers."""
_NUMBERS = 2
_PROBED = 3  # beside what is found: the unscaled model, and a uniform factor on each side
_PROBED_SHARE = 1 / 3  # of a window, on which a layer's harm is measured
KEPT_CONTEXTS = 6  # of a task that is to be kept
_KEPT_VECTORS = 2  # that are usually measured there: the unscaled model, and what is chosen
_WRITTEN_COST = 8  # what the unscaled model writes, in contexts of the same length


def compared_on(generations: int) -> int:
    """Returns the contexts on which the two vectors that generations ended with are compared."""
    return max(1, generations // 4)


def contexts_of(generations: int) -> int:
    """Returns the contexts of so many generations, one for each, and of the choice that follows them."""
    return generations + compared_on(generations)


@dataclass(frozen=True)
class Rates:
    """Seconds that one thing of each kind takes."""

    context: float  # scoring the questions of one context
    window: float  # a pass over a window of text
    written: float  # a context of the held-out test
    kept: float = 0.0  # scoring one of a task that is to be kept; 0: there is none


def grown(tokens: int, measured: Sequence[tuple[int, float]]) -> float:
    """Returns the seconds for so many tokens, of those for two smaller numbers of them: one part grows with the tokens,
    as layers do, and one with their square, as attention does, and neither is below 0.
    """
    (few, first), (more, second) = measured
    square = (second / more - first / few) / (more - few)
    square = min(max(square, 0.0), second / more**2)
    return tokens * (second / more + square * (tokens - more))


@dataclass(frozen=True)
class Schedule:
    """What a search does, all of it a function of the number of steps."""

    steps: int  # generations of the search for a factor for each layer
    population: int  # vectors in each of them
    shared_contexts: int | None  # that all generations are judged on; None: each has a fresh context
    num_parameters: int  # layers whose factors are free
    full_controls: bool = False  # each control gets as many generations as that

    @classmethod
    def of(cls, settings: SearchSettings, steps: int, num_parameters: int) -> Schedule:
        """Returns that of a search for so many factors."""
        paper = settings.algorithm == "paper"
        population = settings.population if paper else population_of(num_parameters)
        contexts = settings.search_groups if paper else None
        return cls(steps, population, contexts, num_parameters, settings.full_controls)

    @property
    def control_steps(self) -> int:
        """Generations of each control of two numbers."""
        return self.steps if self.full_controls else max(1, round(self.steps / 4))

    @property
    def rounds(self) -> tuple[int, ...]:
        """Contexts of the rounds of the race of uniform factors; after each the better third goes on."""
        unit = max(1, self.steps // 8)
        return (unit, unit)

    @property
    def uniform_values(self) -> int:
        """Uniform factors that race, from one end of the range to the other."""
        return _UNIFORM_VALUES + 10 * (self.steps // _FINER)

    def running(self, values: int) -> list[int]:
        """Returns how many of so many factors run in each round of a race."""
        return [-(-values // 3**number) for number in range(len(self.rounds))]

    @property
    def validation_contexts(self) -> int:
        """Contexts on which what the methods found is compared."""
        return max(6, self.steps * 2 // 3)

    @property
    def search_contexts(self) -> int:
        """Contexts of the search split, each of them for one purpose."""
        return sum(self.rounds) + self.own_contexts + len(CONTROLS) * contexts_of(self.control_steps)

    @property
    def own_contexts(self) -> int:
        """Of these, those of the search for a factor for each layer."""
        return self.shared_contexts or contexts_of(self.steps)

    def seconds(self, rates: Rates) -> dict[str, float]:
        """How long each stage takes, without the preflight and the held-out test."""
        control = self._search(self.control_steps, population_of(_NUMBERS), rates)
        finalists = len(CONTROLS) + 3  # beside them none, a uniform one, and the per-layer vector
        checked = (NUM_WINDOWS + NUM_WRITTEN) * rates.window
        own = self._search(self.steps, self.population, rates)
        if self.shared_contexts is not None:  # a curve is judged without a look at ordinary text
            own = self.steps * self.population * self.shared_contexts * rates.context
        return {
            WRITTEN: _WRITTEN_COST * rates.context,
            UNIFORM_HARM: _PROBED * 2 * rates.window,  # one of each kind of text
            race_of(UNIFORM): (sum(self.rounds) + self._raced(self.uniform_values - 1)) * rates.context,
            race_of(BOUNDED): self._raced(BOUNDED_VALUES - 1) * rates.context,
            CURVATURE: 2 * self.num_parameters * rates.window * _PROBED_SHARE,
            steps_of(PER_LAYER): own,
            **{steps_of(name): control for name in CONTROLS},
            VALIDATION: finalists * self.validation_contexts * rates.context,
            HARM: finalists * checked,  # the unscaled model does none; a vector may be made smaller and measured again
            **({KEPT: _KEPT_VECTORS * KEPT_CONTEXTS * rates.kept} if rates.kept else {}),
        }

    def _search(self, steps: int, population: int, rates: Rates) -> float:
        """Generations with the divergence at each centroid, and the choice of a vector."""
        return steps * (population * rates.context + rates.window) + FINALISTS * compared_on(steps) * rates.context

    def _raced(self, values: int) -> int:
        """Contexts on which so many factors are scored in a race."""
        return sum(contexts * running for contexts, running in zip(self.rounds, self.running(values), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for a report."""
        names = ("steps", "population", "control_steps", "validation_contexts", "search_contexts")
        return {**{name: getattr(self, name) for name in names}, "rounds": list(self.rounds)}


def schedule_for(seconds: float, rates: Rates, shortest: Schedule) -> Schedule:
    """Returns the longest schedule that fits into a time, or the shortest there is."""
    schedule = shortest
    while schedule.steps < MAX_STEPS:
        longer = replace(schedule, steps=schedule.steps + 1)
        if sum(longer.seconds(rates).values()) > seconds:
            break
        schedule = longer
    return schedule


@dataclass(frozen=True)
class Plan:
    """What a search is going to do."""

    schedule: Schedule
    seconds: dict[str, float]  # that each stage takes, by name, the held-out test included
    test_groups: int  # contexts of the held-out test
    prompt_tokens: int  # of a prompt with its questions
    text_tokens: int  # of a window of text

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        names = ("test_groups", "prompt_tokens", "text_tokens")
        seconds = {"seconds": self.search_seconds, "test_seconds": self.seconds[TEST]}
        return {**self.schedule.to_dict(), **seconds, **{name: getattr(self, name) for name in names}}

    @property
    def search_seconds(self) -> float:
        """Everything but the held-out test."""
        return sum(self.seconds.values()) - self.seconds[TEST]

    def sentence(self) -> str:
        """Says it to people."""
        schedule = self.schedule
        return (
            f"{times(schedule.steps, 'generation')} of {schedule.population} candidates for a factor for each layer, "
            f"{schedule.control_steps} for each of {len(CONTROLS)} choices of two numbers, "
            f"{schedule.validation_contexts} contexts of {self.prompt_tokens:,} tokens to choose by: "
            f"about {duration(self.search_seconds)}. The held-out test on {self.test_groups} contexts: about "
            f"{duration(self.seconds[TEST])} more. steps={schedule.steps} repeats this plan on any machine."
        )
