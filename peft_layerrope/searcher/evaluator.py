"""The scores of factor vectors on a split: what a search asks of a model, here or in workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..scoring.batching import can_pack
from ..scoring.scorer import Scorer
from ..scoring.scores import PositionScores
from ..tasks import Split
from .space import Factors


class Evaluator(Protocol):
    """Scores of factor vectors; the same vector always gets the same scores.

    Attributes:
        at_once: how many vectors are worked on at the same time.
    """

    at_once: int

    def scores(self, vectors: Sequence[Factors], split: Split, written: bool = False) -> list[PositionScores]:
        """Returns the scores of each vector, in order.

        Args:
            vectors: one factor per layer.
            split: the examples.
            written: of answers that the model writes, where the split says how they are judged; else by likelihood.
        """


class ModelEvaluator:
    """Scores vectors in this process, one after the other.

    Args:
        scorer: of a `PeftModel` with one LAYER_ROPE adapter, whose factors are changed in place.
    """

    at_once = 1

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def scores(self, vectors: Sequence[Factors], split: Split, written: bool = False) -> list[PositionScores]:
        """See [`Evaluator`]."""
        found = []
        for vector in vectors:
            self.scorer.model.base_model.set_layer_factors(vector)
            found.append(self.scorer.measure(split) if written else densely_scored(self.scorer, split))
        return found


def densely_scored(scorer: Scorer, split: Split) -> PositionScores:
    """Scores by likelihood, a context in one row with its many questions: quicker than through the KV cache."""
    return scorer.score(split, packed=can_pack(scorer.model) or None)


def fitness_by_context(scores: PositionScores) -> np.ndarray:
    """Returns the mean probability of each context's targets, or minus its loss."""
    return (scores.log_prob if scores.measure == "loss" else np.exp(scores.log_prob)).mean(axis=1)
