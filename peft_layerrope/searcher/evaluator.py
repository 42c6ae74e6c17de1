"""What a search asks of a model, here or in workers: the scores of factor vectors, on contexts that are asked much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from ..scoring.batching import can_pack, tokens_run
from ..scoring.scorer import Scorer
from ..scoring.scores import PositionScores
from ..tasks.base import Split, SplitName, Task, spread_positions
from ..tasks.kv import KeyValueMix, KeyValueRetrieval
from ..tasks.prompts import ASKED_EVERYWHERE, PromptTask
from .space import Factors

_OWN_TARGET_CONTEXTS = 24  # the most contexts of the search split whose questions are each asked for their targets
# Questions to a context, in times of the task's positions: of 100 pairs, 42 questions instead of 14 take a quarter more
# time, and four fifths of what one says are its own.
_DENSER = 8
_HEAD = 16  # tokens at the beginning of a context that a shorter one keeps


class Evaluator(Protocol):
    """Scores of factor vectors; the same vector always gets the same scores."""

    at_once: int
    """How many vectors are worked on at the same time."""

    def scores(self, vectors: Sequence[Factors], split: Split, written: bool = False) -> list[PositionScores]:
        """Returns the scores of each vector, in order: by likelihood, or where `written` of answers that the model
        writes, if the split says how they are judged.
        """


class ModelEvaluator:
    """Scores vectors in this process, one after the other, by changing the factors of the scorer's adapter in place."""

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


def contexts_to_ask(task: Task, wanted: int) -> int:
    """Returns how many different contexts of the search split there are for a search that wants so many."""
    if isinstance(task, PromptTask) and task.without_distractors("search", 0, 1, gold=True) is not None:
        wanted = min(wanted, _OWN_TARGET_CONTEXTS)
    return available(task, "search", wanted)


def densely_asked(task: Task, name: SplitName, contexts: int) -> Split:
    """Returns contexts of a split, asked at many more positions where a context is run once for all of its questions:
    they add little to it, and each says something of the factors.
    """
    if not isinstance(task, KeyValueRetrieval | KeyValueMix) or task.protocol(name) != ASKED_EVERYWHERE:
        return task.split(name, contexts)
    count = min(_DENSER * len(task.positions), task.num_items)
    positions = {*task.positions, *spread_positions(task.num_items, max(3, count))}
    return task.split(name, contexts, sorted(positions))


def kept_part(task: Task, contexts: int) -> Split:
    """Returns contexts of the validation split of a task that is to be kept, under a name of its own."""
    return replace(densely_asked(task, "validation", available(task, "validation", contexts)), name="kept")


def probes(task: Task) -> tuple[Split, Split, Split]:
    """Returns contexts to plan by: the longest and one that takes about as long as most, as a search asks them, and the
    latter as a test does.
    """
    turns = task.num_turns if isinstance(task, KeyValueMix) else 1
    asked = densely_asked(task, "search", turns)
    ones = [asked.part([number]) for number in range(turns)]
    tokens = np.array([tokens_run(one.examples) for one in ones])
    typical = int(np.argmin(abs(tokens - tokens.mean())))
    tested = task.split("search", turns).part([typical])
    return max(ones, key=lambda one: one.max_tokens), ones[typical], tested


def times_dearer(task: Task, tested: Split) -> float:
    """Returns how many times as many tokens a context of the test takes as `tested` does, which is asked as those of
    the search split are. Where the asked item moves, each prompt is a context of its own, and is run to be scored and
    again to be answered.
    """
    if not isinstance(task, PromptTask) or task.protocol("test") == task.protocol("search"):
        return 1.0
    return 2 * tokens_run(task.split("test", 1).examples) / tokens_run(tested.examples)


def shortened(split: Split, tokens: int) -> Split:
    """Returns a split whose longest prompt has about so many tokens with its answer, and as many different contexts;
    text, which is all answer, stays as it is. It is for a look at what a model takes: nothing is asked there that can
    be answered.
    """
    cut = max(0, split.max_tokens - tokens)
    # Where only the place of the answer differs, contexts would be alike if all lost the same part.
    heads = {
        context: _HEAD + number for number, context in enumerate(dict.fromkeys(e.context_ids for e in split.examples))
    }

    def without_middle(context: tuple[int, ...]) -> tuple[int, ...]:
        head = heads[context]
        return context[:head] + context[head + cut :]

    examples = (replace(e, context_ids=without_middle(e.context_ids), gold_span=None) for e in split.examples)
    return replace(split, examples=tuple(examples))


def available(task: Task, split: SplitName, wanted: int) -> int:
    """Returns how many contexts a split has, at least 1 and at most `wanted`; all that are, where a task cannot say."""
    return max(1, task.available(split, wanted)) if hasattr(task, "available") else wanted
