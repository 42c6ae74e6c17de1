"""Evaluators made of a formula, and a task made of random tokens, for the searcher's tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from peft_layerrope import Example, TokenTask
from peft_layerrope.runs import JOURNAL_NAME
from peft_layerrope.searcher import FactorGrid, Guards
from peft_layerrope.searcher.evaluator import Heats, HeatScores
from peft_layerrope.searcher.memo import BudgetView, Memo
from peft_layerrope.searcher.space import Factors, FactorSpace

NO_GUARDS = Guards(None, None)
ONE_HEAT = Heats((1,))
SMALL_SEARCH = {
    "algorithm": "genetic",
    "population": 6,
    "generations": 2,
    "gradient_steps": 3,
    "refine_evaluations": 12,
    "search_groups": 4,
    "validation_groups": 4,
    "test_groups": 6,
    "short_groups": 3,
    "grid": FactorGrid(1.0, 2.0, 0.25),
    "progress": False,
}
"""Of `search`: every stage, on a task of a few tokens."""
LEAST_SEARCH = {"algorithm": "genetic", "population": 4, "generations": 0, "refine": False, "controls": False}
"""Of `search`: the shortest there is."""
LEAST_OPTIONS = (
    *("--algorithm", "genetic", "--population", "4", "--generations", "0", "--refine-evaluations", "1"),
    *("--search-groups", "2", "--validation-groups", "1", "--test-groups", "2", "--no-controls"),
    *("--preflight-groups", "2", "--anyway"),
)
"""Of the command `search`: the shortest there is with a refinement, whatever the model answers."""

EVENTS = ("plan", "stage", "generation", "skipped", "ended", "contender")
"""Entries of a journal that a resumed run has again."""


def journal_of(folder: Path) -> list:
    """Everything in a journal on which a run goes on, in order: its identity, and entries without their times."""
    head, *entries = [json.loads(line) for line in (folder / JOURNAL_NAME).read_text().splitlines()]
    return [head, *([e["kind"], e["key"], e["value"]] for e in entries if e["kind"] not in EVENTS)]


class Formula:
    """An evaluator: group g of vector v has utilisation `value(v, g)` and accuracy `tail(v, g)` at the last position.

    Attributes:
        asked: every (vector, heat) that was measured, in order.
    """

    def __init__(
        self,
        value: Callable[[Factors, int], float],
        plan: Heats = ONE_HEAT,
        tail: Callable[[Factors, int], float] = lambda vector, group: 1.0,
        short: Callable[[Factors], float] = lambda vector: 0.0,
    ) -> None:
        self.plan = plan
        self.asked: list[tuple[Factors, int]] = []
        self._value, self._tail, self._short = value, tail, short

    def measure(self, vectors: Sequence[Factors], heat: int) -> list[HeatScores]:
        self.asked += [(vector, heat) for vector in vectors]
        return [self._one(vector, heat) for vector in vectors]

    def _one(self, vector: Factors, heat: int) -> HeatScores:
        if heat == len(self.plan.sizes):
            return HeatScores((self._short(vector),), (0.0,))
        groups = range(sum(self.plan.sizes[:heat]), sum(self.plan.sizes[: heat + 1]))
        return HeatScores(
            tuple(self._value(vector, g) for g in groups), tuple(float(self._tail(vector, g)) for g in groups)
        )


def minus_distance(target: Sequence[float]) -> Callable[[Factors, int], float]:
    """Minus the squared distance to `target`, the same for every group."""
    return lambda vector, group: -sum((a - b) ** 2 for a, b in zip(vector, target, strict=True))


def view_of(value: Callable[[Factors, int], float]) -> BudgetView:
    """A view of a fitness without heats or guards."""
    return BudgetView(Memo(Formula(value), ONE_HEAT, NO_GUARDS))


def space_of(
    num_layers: int,
    scaled: Sequence[int] | None = None,
    grid: FactorGrid | None = None,
    sources: Sequence[int] | None = None,
) -> FactorSpace:
    """A space of `num_layers` layers, by default all free on the default grid."""
    return FactorSpace(
        grid or FactorGrid(),
        tuple(range(num_layers) if scaled is None else scaled),
        tuple(range(num_layers) if sources is None else sources),
    )


def token_task(groups: int = 20, length: int = 24, vocab: int = 99, seed: int = 0) -> TokenTask:
    """Random contexts, of which tokens at the beginning, the middle and the end are asked for."""
    rng = np.random.default_rng(seed)
    examples = []
    for g in range(groups):
        context = tuple(rng.integers(1, vocab, length).tolist())
        for i, at in enumerate((2, length // 2, length - 3)):
            examples.append(Example(context, context[at : at + 1], context[at + 1 : at + 3], i, g))
    return TokenTask(examples)


class TaskWithShortPrompts(TokenTask):
    """[`token_task`] that can be asked for shorter prompts, as the guard of that name does."""

    def __init__(self, **arguments: int) -> None:
        examples = token_task(**arguments)._groups.values()
        super().__init__([example for groups in examples for group in groups for example in group])

    def shortened(self, length: int) -> TokenTask:
        return token_task(length=length // 2, seed=9)
