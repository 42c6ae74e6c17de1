"""Accuracy and gold log-probability by position, and context utilisation, from one teacher-forced pass.

Feeding the prompt with the gold answer, the argmax at each answer position equals what greedy decoding would
write as long as it has been right so far; so "every argmax is right" is exactly "`generate()` begins with the
answer". One forward pass replaces a loop of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import nn

from .batching import Batch, make_batches
from .errors import TaskError
from .statistics import Interval, mean_interval, wilson_interval
from .tasks import Split, SplitName, Task

DEFAULT_WEIGHTS = (0.8, 1.0, 1.2)
"""λ_first, λ_middle, λ_last of context utilisation. The paper's values are not public; these are ours: in the
paper's order, and close enough to each other that no single position decides."""

DEFAULT_BATCH_TOKENS = 8192
"""Tokens per forward pass unless told otherwise."""

MIN_BATCH_TOKENS = 64
"""Memory that does not suffice for this many tokens is not worth halving on."""

Objective = Literal["log_prob", "accuracy"]
"""What context utilisation is taken of."""
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

T = TypeVar("T")


def utilisation(by_position: Sequence[float], weights: Sequence[float] = DEFAULT_WEIGHTS) -> float:
    """Returns context utilisation U (arXiv 2503.04355): a weighted mean over first, middle and last position.

    Args:
        by_position: one score per gold position, first to last; at least three. All inner ones are averaged
            into "middle".
        weights: `(λ_first, λ_middle, λ_last)`, all positive.

    Returns:
        `(λ_first·first + λ_middle·mean(middle) + λ_last·last) / (λ_first + λ_middle + λ_last)`, in the
        scores' unit.

    Raises:
        TaskError: fewer than three positions, or weights that are not three positive numbers.
    """
    check_weights(weights)
    scores = np.asarray(by_position, dtype=np.float64)
    if scores.size < 3:
        raise TaskError(f"utilisation needs at least 3 positions (first, middle, last), got {scores.size}.")
    parts = (scores[0], scores[1:-1].mean(), scores[-1])
    return float(np.dot(weights, parts) / np.sum(weights))


def check_weights(weights: Sequence[float]) -> None:
    """Raises TaskError unless `weights` are three positive finite numbers."""
    if len(weights) != 3 or not all(np.isfinite(w) and w > 0 for w in weights):
        raise TaskError(f"weights={tuple(weights)} must be three positive numbers (first, middle, last).")


@dataclass(frozen=True)
class PositionScores:
    """Scores of one model on one split.

    Attributes:
        positions: the split's gold positions, P of them.
        correct: bool array of shape `(groups, P)`: would greedy decoding begin with the answer?
        log_prob: float64 array of shape `(groups, P)`: mean log-probability of the answer's tokens, in nats. A
            token counts no worse than chance (minus the log of the vocabulary size), or a few hopeless tokens
            would outweigh everything else that a search could improve.
    """

    positions: tuple[int, ...]
    correct: np.ndarray
    log_prob: np.ndarray

    @property
    def accuracy_by_position(self) -> np.ndarray:
        """Shape `(P,)`, from 0 to 1."""
        return self.correct.mean(axis=0)

    @property
    def log_prob_by_position(self) -> np.ndarray:
        """Shape `(P,)`, in nats."""
        return self.log_prob.mean(axis=0)

    @property
    def average_by_group(self) -> np.ndarray:
        """Accuracy averaged over positions, per group: shape `(groups,)`. The unit of paired comparisons."""
        return self.correct.mean(axis=1)

    def average(self) -> Interval:
        """Accuracy averaged over all positions, with a 95 % interval over groups."""
        return mean_interval(self.average_by_group)

    def intervals(self) -> list[Interval]:
        """Accuracy at each position with its 95 % Wilson interval."""
        groups = self.correct.shape[0]
        return [wilson_interval(int(hits), groups) for hits in self.correct.sum(axis=0)]

    def utilisation(self, weights: Sequence[float] = DEFAULT_WEIGHTS) -> float:
        """Context utilisation of the accuracies, from 0 to 1."""
        return utilisation(self.accuracy_by_position, weights)

    def log_prob_utilisation(self, weights: Sequence[float] = DEFAULT_WEIGHTS) -> float:
        """Context utilisation of the gold log-probabilities, in nats."""
        return utilisation(self.log_prob_by_position, weights)

    def utilisation_by_group(
        self, objective: Objective = "accuracy", weights: Sequence[float] = DEFAULT_WEIGHTS
    ) -> np.ndarray:
        """Shape `(groups,)`: each group's share in the utilisation, whose mean over groups is [`utilisation`].

        A split with fewer than three positions (perplexity has one) has no first, middle and last: there it is the
        plain mean.
        """
        values = self.log_prob if objective == "log_prob" else self.correct.astype(np.float64)
        if len(self.positions) < 3:
            return values.mean(axis=1)
        return np.array([utilisation(row, weights) for row in values])

    def paired_difference(self, other: PositionScores) -> Interval:
        """This average accuracy minus `other`'s on the same examples, with a paired 95 % interval over groups.

        Raises:
            TaskError: the two were not scored on splits of one shape.
        """
        if self.correct.shape != other.correct.shape:
            raise TaskError(f"cannot pair scores of shapes {self.correct.shape} and {other.correct.shape}.")
        return mean_interval(self.average_by_group - other.average_by_group)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers for a JSON report."""
        average = self.average()
        return {
            "positions": list(self.positions),
            "accuracy_by_position": [round(float(v), 6) for v in self.accuracy_by_position],
            "accuracy_intervals": [[round(i.low, 6), round(i.high, 6)] for i in self.intervals()],
            "average_accuracy": round(average.value, 6),
            "average_accuracy_interval": [round(average.low, 6), round(average.high, 6)],
            "utilisation": round(self.utilisation(), 6),
            "log_prob_by_position": [round(float(v), 6) for v in self.log_prob_by_position],
        }


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
        TaskError: the split cannot be made, or a token id is outside the model's vocabulary.
    """
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
        hits, values = (tensor.tolist() for tensor in judge(logits, batch))
        for index, hit, value in zip(batch.examples, hits, values, strict=True):
            example = self._split.examples[index]
            cell = self._rows[example.group], example.position
            self._correct[cell], self._log_prob[cell] = hit, value

    def scores(self) -> PositionScores:
        """The scores, once every batch is in."""
        return PositionScores(self._split.positions, self._correct, self._log_prob)


def answer_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Runs one batch and returns the logits that its answer tokens are read from: float32, `(N, vocabulary)`."""
    logits = model(**batch.inputs, use_cache=False, logits_to_keep=batch.columns).logits
    if logits.shape[1] != len(batch.columns):  # a model that does not know `logits_to_keep` returns every column
        logits = logits[:, batch.columns]
    return logits[batch.rows, batch.kept].float()


def judge(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Judges each example of a batch from its answer tokens' logits, shape `(N, vocabulary)`.

    Returns:
        Shape `(examples,)` each: whether every token is the most probable one; and the mean log-probability in nats,
        each token no worse than chance. Differentiable in the logits.
    """
    gold = logits.log_softmax(-1).gather(-1, batch.gold[:, None]).squeeze(-1).clamp(min=-math.log(logits.shape[-1]))
    count = len(batch.examples)
    tokens = torch.bincount(batch.owner, minlength=count)
    sums = gold.new_zeros(count).index_add(0, batch.owner, gold)
    right = (logits.argmax(-1) == batch.gold).long()
    hits = torch.zeros_like(tokens).index_add(0, batch.owner, right)
    return hits == tokens, sums / tokens


def with_halving(attempt: Callable[[int], T], batch_tokens: int) -> tuple[T, int]:
    """Calls `attempt(batch_tokens)`, again with half as many tokens whenever memory runs out.

    Returns:
        The result and the number of tokens that worked.

    Raises:
        TaskError: memory does not suffice for a single row.
    """
    while True:
        try:
            return attempt(batch_tokens), batch_tokens
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if batch_tokens <= MIN_BATCH_TOKENS:
                raise TaskError(
                    f"out of memory even with --batch-tokens {batch_tokens}: use shorter prompts, a smaller dtype "
                    "or a larger device."
                ) from error
        batch_tokens = max(batch_tokens // 2, MIN_BATCH_TOKENS)  # outside `except`: its traceback holds the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_out_of_memory(error: RuntimeError) -> bool:
    # the CPU allocator has no exception type of its own
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
