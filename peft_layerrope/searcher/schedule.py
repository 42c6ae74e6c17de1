"""How the time that a search has is spent: a fixed schedule, made from a few timed passes before it begins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

CONTEXTS_PER_STEP = 2
"""Fresh contexts that a step's gradient is taken on."""
MIN_STEPS, MAX_STEPS = 4, 400
UNIFORM_VALUES = 11  # factors of the coarse grid from one end of the range to the other
BOUNDED_VALUES = 7
_FAMILIES, _NUMBERS = 2, 2  # controls of two numbers each
_CHECKED_WINDOWS = 3  # as far as time goes, in gradients of a window
_WRITTEN_COST = 8  # what the unscaled model writes, in contexts of the same length


@dataclass(frozen=True)
class Rates:
    """Seconds that one thing of each kind takes.

    Attributes:
        context: scoring the questions of one context.
        context_gradient: the same with its gradient.
        text_gradient: the divergence on a window of text, with its gradient.
    """

    context: float
    context_gradient: float
    text_gradient: float


@dataclass(frozen=True)
class Schedule:
    """What a search does, all of it a function of the number of steps.

    Attributes:
        steps: of the per-layer search.
        full_controls: each control gets as many steps as that.
    """

    steps: int
    full_controls: bool = False

    @property
    def control_steps(self) -> int:
        """Steps of its own of each control of two numbers."""
        return self.steps if self.full_controls else 0

    @property
    def rounds(self) -> tuple[int, ...]:
        """Contexts of the rounds of the race of uniform factors; after each the better half goes on."""
        unit = max(1, self.steps // 24)
        return (unit, unit, 2 * unit, 4 * unit)

    def running(self, values: int) -> list[int]:
        """Returns how many of so many factors run in each round of a race."""
        return [-(-values // 2**number) for number in range(len(self.rounds))]

    @property
    def validation_contexts(self) -> int:
        """Contexts on which what the methods found is compared."""
        return max(8, self.steps * 2 // 3)

    @property
    def search_contexts(self) -> int:
        """Contexts of the search split, each of them for one purpose."""
        return sum(self.rounds) + (self.steps + _FAMILIES * self.control_steps) * CONTEXTS_PER_STEP

    def seconds(self, rates: Rates) -> float:
        """How long it takes, without the preflight and the held-out test."""
        step = CONTEXTS_PER_STEP * rates.context_gradient + rates.text_gradient
        raced = sum(
            contexts * running
            for values in (1, UNIFORM_VALUES - 1, BOUNDED_VALUES - 1)
            for contexts, running in zip(self.rounds, self.running(values), strict=True)
        )
        finalists = _FAMILIES + 3  # beside them none, a uniform one, and the per-layer vector
        own = self.control_steps * step if self.full_controls else _NUMBERS * rates.text_gradient
        return (
            self.steps * step
            + _FAMILIES * own
            + (_WRITTEN_COST + raced + finalists * self.validation_contexts) * rates.context
            + (3 + finalists + 1) * _CHECKED_WINDOWS * rates.text_gradient
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for a report."""
        names = ("steps", "control_steps", "rounds", "validation_contexts", "search_contexts")
        return {"contexts_per_step": CONTEXTS_PER_STEP, **{name: getattr(self, name) for name in names}}


def schedule_for(seconds: float, rates: Rates, full_controls: bool = False) -> Schedule:
    """Returns the longest schedule that fits into a time, or the shortest there is."""
    schedule = Schedule(MIN_STEPS, full_controls)
    while schedule.steps < MAX_STEPS:
        longer = replace(schedule, steps=schedule.steps + 1)
        if longer.seconds(rates) > seconds:
            break
        schedule = longer
    return schedule
