"""From logits to scores: is every token of an answer the most probable one, and how probable is the whole answer?

Feeding the prompt with the gold answer, the argmax at each answer position equals what greedy decoding would write as
long as it has been right so far; so "every argmax is right" is exactly "`generate()` begins with the answer".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import TaskError
from ..tasks import Split
from ..tuner.sites import embedding_table
from .batching import Batch, make_batches
from .scores import PositionScores

_JUDGED_AT_ONCE = 4096  # rows of logits in float32: a long text of a large vocabulary would fill the memory


def answer_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Runs one batch and returns the logits that its answer tokens are read from, in the model's dtype:
    `(N, vocabulary)`.
    """
    return logits_at(model, batch.columns, **batch.inputs)[batch.rows, batch.kept]


def logits_at(model: nn.Module, columns: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Runs a model and returns its logits at some columns, in its dtype: `(batch, len(columns), vocabulary)`."""
    logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    if logits.shape[1] != len(columns):  # a model that does not know `logits_to_keep` returns every column
        logits = logits[:, columns]
    return logits


def check_finite(model: nn.Module, split: Split, batch_tokens: int) -> None:
    """Runs the first example of a split, whose scores must be numbers: no figure can be made of others.

    Raises:
        TaskError: no token of its answer has a finite log-probability. The message names the dtype, and the
            weights that are not finite if any are.
    """
    first = next(example for example in split.examples if example.position == 0)
    alone = replace(split, positions=split.positions[:1], examples=(first,))
    with torch.no_grad():
        for batch in make_batches(model, alone, batch_tokens, packed=False):
            if judge_tokens(answer_logits(model, batch), batch.gold)[0].isfinite().any():
                return
    dtype = str(embedding_table(model).dtype).removeprefix("torch.")
    # there is no isfinite() for one-byte floats, and nothing to look at on the meta device
    weights = {name: w for name, w in model.named_parameters() if w.dtype.itemsize > 1 and not w.is_meta}
    broken = [name for name, values in weights.items() if not values.isfinite().all()]
    reason, advice = f"its numbers leave the range of {dtype}", "use"
    if broken:
        more = f" and {len(broken) - 1} more weights" if len(broken) > 1 else ""
        reason, advice = f"NaN or infinity stands in {broken[0]}{more}", "use another copy of the weights, or"
    other = " or ".join(name for name in ("bfloat16", "float32") if name != dtype)
    raise TaskError(f"the model gives no finite score in {dtype}: {reason}; {advice} --dtype {other}.")


def judge(
    logits: torch.Tensor, gold: torch.Tensor, owner: torch.Tensor, count: int, mean: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Judges each example of a batch from its answer tokens' logits.

    Args:
        logits: shape `(N, vocabulary)`; see [`answer_logits`].
        gold: shape `(N,)`: the answer tokens' ids.
        owner: shape `(N,)`: which example each token belongs to, from 0 to before `count`.
        count: number of examples.
        mean: average over an example's tokens, each as it is: the loss on text. Otherwise their sum is the answer's
            log-probability, in which a token counts no worse than chance.

    Returns:
        Shape `(count,)` each: whether every token is the most probable one; and the log-probability in nats.
        Differentiable in the logits.
    """
    values, right = judge_tokens(logits, gold)
    if not mean:
        values = values.clamp(min=-math.log(logits.shape[-1]))
    tokens = torch.bincount(owner, minlength=count)
    sums = values.new_zeros(count).index_add(0, owner, values)
    hits = torch.zeros_like(tokens).index_add(0, owner, right.long())
    return hits == tokens, sums / tokens if mean else sums


def judge_tokens(logits: torch.Tensor, gold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Judges single tokens: logits of shape `(N, vocabulary)` against token ids of shape `(N,)`.

    Returns:
        Shape `(N,)` each: log-probability of the gold token in nats, float32; and whether it is the most probable,
        which it never is where the log-probability is not a number.
    """
    log_probs, right = [], []
    for part, ids in zip(logits.split(_JUDGED_AT_ONCE), gold.split(_JUDGED_AT_ONCE), strict=True):
        log_probs.append(part.float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1))
        right.append((part.argmax(-1) == ids) & ~log_probs[-1].isnan())
    return torch.cat(log_probs), torch.cat(right)


class ScoreSheet:
    """Collects the scores of one split, batch by batch."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._cells = cells(split)
        shape = (split.num_groups, len(split.positions))
        self._correct, self._log_prob = np.zeros(shape, dtype=bool), np.zeros(shape)

    def add(self, examples: Sequence[int], logits: torch.Tensor, gold: torch.Tensor, owner: torch.Tensor) -> None:
        """Enters some examples, given as indices into the split's, by their answer tokens; see [`judge`]."""
        mean = self._split.measure == "loss"
        hits, values = (tensor.tolist() for tensor in judge(logits, gold, owner, len(examples), mean))
        for index, hit, value in zip(examples, hits, values, strict=True):
            self._correct[self._cells[index]], self._log_prob[self._cells[index]] = hit, value

    def scores(self) -> PositionScores:
        """The scores, once every example is in."""
        return PositionScores(self._split.positions, self._correct, self._log_prob, self._split.measure)


def cells(split: Split) -> list[tuple[int, int]]:
    """Returns where each example stands in an array of shape `(groups, positions)`."""
    rows = {group: row for row, group in enumerate(dict.fromkeys(e.group for e in split.examples))}
    return [(rows[example.group], example.position) for example in split.examples]
