"""Accuracy and gold log-probability by position, from one teacher-forced pass.

Feeding the prompt with the gold answer, the argmax at each answer position equals what greedy decoding would
write as long as it has been right so far; so "every argmax is right" is exactly "`generate()` begins with the
answer". One forward pass replaces a loop of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from ..checks import check_callable, whole_number
from ..errors import NotEnoughMemoryError
from ..tasks import Split, SplitName, Task
from ..tasks.base import check_task
from .batching import Batch, make_batches
from .device_memory import free_cached_memory, is_out_of_memory
from .scores import PositionScores

DEFAULT_BATCH_TOKENS = 8192
"""Tokens per forward pass unless told otherwise."""

MIN_BATCH_TOKENS = 64
"""Memory that does not suffice for this many tokens is not worth halving on."""

_JUDGED_AT_ONCE = 4096  # rows of logits in float32: a long text of a large vocabulary would fill the memory

T = TypeVar("T")


def evaluate(
    model: nn.Module,
    task: Task,
    *,
    split: SplitName = "test",
    num_groups: int = 100,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> PositionScores:
    """Evaluates a causal language model, with or without an adapter, at every gold position of a task.

    Args:
        model: a transformers model or `PeftModel`; put into eval mode.
        task: see [`Task`].
        split: which split; report figures from `"test"`.
        num_groups: independent contexts; each is asked at every position.
        batch_tokens: tokens per forward pass.
        progress: wraps the list of batches, e.g. `tqdm`.

    Returns:
        The scores.

    Raises:
        TaskError: no task, the split cannot be made, or a token id is outside the model's vocabulary.
    """
    check_task(task)
    check_callable("progress", progress)
    return score(model, task.split(split, num_groups), batch_tokens=batch_tokens, progress=progress)


def score(
    model: nn.Module,
    split: Split,
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: Callable[[Iterable], Iterable] | None = None,
    packed: bool | None = None,
) -> PositionScores:
    """Scores every example of `split`.

    Args:
        model: see [`evaluate`].
        split: the examples.
        batch_tokens: see [`evaluate`]; halved, and the split begun again, when memory runs out.
        progress: see [`evaluate`].
        packed: run the context that several queries share once (see `batching`); default: where the model allows
            it. Both ways give the same scores up to rounding.
    """

    def attempt(batch_tokens: int) -> PositionScores:
        batches = make_batches(model, split, batch_tokens, packed)
        return _score_batches(model, split, progress(batches) if progress is not None else batches)

    return with_halving(attempt, batch_tokens)[0]


@torch.inference_mode()
def _score_batches(model: nn.Module, split: Split, batches: Iterable[Batch]) -> PositionScores:
    model.eval()
    sheet = ScoreSheet(split)
    for batch in batches:
        sheet.add(batch, answer_logits(model, batch))
    return sheet.scores()


class ScoreSheet:
    """Collects the scores of one split, batch by batch."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._rows = {group: row for row, group in enumerate(dict.fromkeys(e.group for e in split.examples))}
        shape = (split.num_groups, len(split.positions))
        self._correct, self._log_prob = np.zeros(shape, dtype=bool), np.zeros(shape)

    def add(self, batch: Batch, logits: torch.Tensor) -> None:
        """Enters a batch, given its answer tokens' logits as [`answer_logits`] returns them."""
        clamp = self._split.measure == "accuracy"
        hits, values = (tensor.tolist() for tensor in judge(logits, batch, clamp))
        for index, hit, value in zip(batch.examples, hits, values, strict=True):
            example = self._split.examples[index]
            cell = self._rows[example.group], example.position
            self._correct[cell], self._log_prob[cell] = hit, value

    def scores(self) -> PositionScores:
        """The scores, once every batch is in."""
        return PositionScores(self._split.positions, self._correct, self._log_prob, self._split.measure)


def answer_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Runs one batch and returns the logits that its answer tokens are read from, in the model's dtype:
    `(N, vocabulary)`.
    """
    logits = model(**batch.inputs, use_cache=False, logits_to_keep=batch.columns).logits
    if logits.shape[1] != len(batch.columns):  # a model that does not know `logits_to_keep` returns every column
        logits = logits[:, batch.columns]
    return logits[batch.rows, batch.kept]


def judge(logits: torch.Tensor, batch: Batch, clamp: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Judges each example of a batch from its answer tokens' logits, shape `(N, vocabulary)`.

    Args:
        logits: see [`answer_logits`].
        batch: the batch that they are of.
        clamp: whether a token counts no worse than chance.

    Returns:
        Shape `(examples,)` each: whether every token is the most probable one; and the mean log-probability in nats.
        Differentiable in the logits.
    """
    gold, right = judge_tokens(logits, batch.gold)
    if clamp:
        gold = gold.clamp(min=-math.log(logits.shape[-1]))
    count = len(batch.examples)
    tokens = torch.bincount(batch.owner, minlength=count)
    sums = gold.new_zeros(count).index_add(0, batch.owner, gold)
    hits = torch.zeros_like(tokens).index_add(0, batch.owner, right.long())
    return hits == tokens, sums / tokens


def judge_tokens(logits: torch.Tensor, gold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Judges single tokens: logits of shape `(N, vocabulary)` against token ids of shape `(N,)`.

    Returns:
        Shape `(N,)` each: log-probability of the gold token in nats, float32; and whether it is the most probable.
    """
    log_probs, right = [], []
    for part, ids in zip(logits.split(_JUDGED_AT_ONCE), gold.split(_JUDGED_AT_ONCE), strict=True):
        log_probs.append(part.float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1))
        right.append(part.argmax(-1) == ids)
    return torch.cat(log_probs), torch.cat(right)


def with_halving(attempt: Callable[[int], T], batch_tokens: int) -> tuple[T, int]:
    """Calls `attempt(batch_tokens)`, again with half as many tokens whenever memory runs out.

    Returns:
        The result and the number of tokens that worked.

    Raises:
        TaskError: `batch_tokens` is no whole number of at least 1.
        NotEnoughMemoryError: memory does not suffice for a single row.
    """
    whole_number("batch_tokens", batch_tokens, 1)
    while True:
        try:
            return attempt(batch_tokens), batch_tokens
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if batch_tokens <= MIN_BATCH_TOKENS:
                raise NotEnoughMemoryError(
                    f"out of memory even with --batch-tokens {batch_tokens}: use shorter prompts, a smaller dtype "
                    "or a larger device."
                ) from error
        batch_tokens = max(batch_tokens // 2, MIN_BATCH_TOKENS)  # outside `except`: its traceback holds the tensors
        free_cached_memory()
