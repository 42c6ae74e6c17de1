"""What the tests of experiments share: a task that the demo model gets half right, and scores by hand."""

from __future__ import annotations

import numpy as np

from peft_layerrope import LayerRopeConfig, PositionScores
from peft_layerrope.base_model import adapted
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.tasks.kv import KeyValueWords

LENGTH, GROUPS = 320, 3  # beyond the demo model's window of 256, so that factors matter
FACTORS = [1.5, 1.9, 1.6, 1.7, 1.4, 1.3]


def short_task(tokenizer, length: int = LENGTH, num_positions: int = 4) -> KeyValueWords:
    return KeyValueWords(tokenizer, length, num_positions=num_positions)


def by_hand(model, task, factors=None, groups: int = GROUPS, **settings) -> PositionScores:
    """Scores of the test split, one forward pass after the other, without any of the experiments' code."""
    split = task.split("test", groups)
    if factors is None:
        return Scorer(model).score(split)
    with adapted(model, LayerRopeConfig(layer_factors=list(factors), **settings)) as peft_model:
        return Scorer(peft_model).score(split)


def scores_of(rows, log_prob=None) -> PositionScores:
    """Scores of given hits, one row for each group."""
    correct = np.array(rows, dtype=bool)
    values = np.where(correct, -0.1, -3.0) if log_prob is None else np.array(log_prob, dtype=float)
    return PositionScores(tuple(range(correct.shape[1])), correct, values)


class Audience:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.stages: list[list] = []

    def stage(self, name: str, total: int) -> None:
        self.stages.append([name, total, 0])

    def advance(self) -> None:
        self.stages[-1][2] += 1

    def note(self, text: str) -> None:
        pass
