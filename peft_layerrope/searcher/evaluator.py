"""What a search asks for fitness. Every searcher sees only `Evaluator`; speed and distribution go behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

from torch import nn

from ..evaluation import score
from ..tasks import Split
from .grid import Factors

Objective = Literal["log_prob", "accuracy"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


class Evaluator(Protocol):
    """Fitness of factor vectors; higher is better."""

    def evaluate(self, vectors: Sequence[Factors]) -> list[float]:
        """Returns one fitness per vector, in order. The same vector always gets the same fitness."""


class ModelEvaluator:
    """Context utilisation of a model on one split, with the vectors applied one after the other.

    Args:
        model: a `PeftModel` with one LAYER_ROPE adapter, whose factors are changed in place.
        split: the examples, the same for every vector.
        objective: `"log_prob"` (of the gold answer, in nats; guides better) or `"accuracy"`.
        weights: λ_first, λ_middle, λ_last.
        batch_tokens: tokens per forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        *,
        objective: Objective,
        weights: tuple[float, float, float],
        batch_tokens: int,
    ) -> None:
        self._model = model
        self._split = split
        self._objective = objective
        self._weights = weights
        self._batch_tokens = batch_tokens

    def evaluate(self, vectors: Sequence[Factors]) -> list[float]:
        """See [`Evaluator`]."""
        return [self._evaluate_one(vector) for vector in vectors]

    def _evaluate_one(self, vector: Factors) -> float:
        self._model.base_model.set_layer_factors(vector)
        scores = score(self._model, self._split, batch_tokens=self._batch_tokens)
        if self._objective == "accuracy":
            return scores.utilisation(self._weights)
        return scores.log_prob_utilisation(self._weights)


class MemoEvaluator:
    """Never evaluates a vector twice.

    Attributes:
        memo: fitness of every vector evaluated so far, in order of evaluation.
        requested: how many fitnesses were asked for, repeats included.
    """

    def __init__(self, inner: Evaluator, on_evaluated: Callable[[Factors, float], None] | None = None) -> None:
        self._inner = inner
        self._on_evaluated = on_evaluated
        self.memo: dict[Factors, float] = {}
        self.requested = 0

    @property
    def evaluations(self) -> int:
        """How many distinct vectors were really evaluated."""
        return len(self.memo)

    def evaluate(self, vectors: Sequence[Factors]) -> list[float]:
        """See [`Evaluator`]."""
        self.requested += len(vectors)
        for vector in dict.fromkeys(vectors):
            if vector not in self.memo:
                self.memo[vector] = self._inner.evaluate([vector])[0]
                if self._on_evaluated is not None:
                    self._on_evaluated(vector, self.memo[vector])
        return [self.memo[vector] for vector in vectors]


class BudgetView:
    """One searcher's view of a shared memo: counts the distinct vectors that *this* searcher asked for.

    A vector another searcher has paid for costs no time, but it counts here all the same, so that searchers
    compared at equal budgets really have equal budgets.
    """

    def __init__(self, memo: MemoEvaluator) -> None:
        self._memo = memo
        self.fitness: dict[Factors, float] = {}

    @property
    def evaluations(self) -> int:
        """How many distinct vectors this searcher has asked for."""
        return len(self.fitness)

    def evaluate(self, vectors: Sequence[Factors]) -> list[float]:
        """See [`Evaluator`]."""
        values = self._memo.evaluate(vectors)
        self.fitness.update(zip(vectors, values, strict=True))
        return values

    def best(self) -> tuple[Factors, float]:
        """Returns the best vector and its fitness; of equals, the first one asked for."""
        return max(self.fitness.items(), key=lambda item: item[1])
