"""Accuracy and gold log-probability by position, and context utilisation, from one teacher-forced pass.

Feeding the prompt with the gold answer, the argmax at each answer position equals what greedy decoding would
write as long as it has been right so far; so "every argmax is right" is exactly "`generate()` begins with the
answer". One forward pass replaces a loop of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import TaskError
from .rotary import BakedLayerRope, LayerRopeLayer, inv_freq_names, is_length_dependent
from .statistics import Interval, mean_interval, wilson_interval
from .tasks import Example, Split, SplitName, Task

DEFAULT_WEIGHTS = (0.8, 1.0, 1.2)
"""λ_first, λ_middle, λ_last of context utilisation. The paper's values are not public; these are ours: in the
paper's order, and close enough to each other that no single position decides."""

DEFAULT_BATCH_TOKENS = 8192
"""Tokens per forward pass unless told otherwise."""

_PACKABLE_ATTENTION = ("eager", "sdpa")  # implementations that take a dense 4-D mask


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


@torch.inference_mode()
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
        batch_tokens: see [`evaluate`].
        progress: see [`evaluate`].
        packed: run the context that several queries share once (see `_packed_batch`); default: where the model
            allows it. Both ways give the same scores up to rounding.
    """
    check_vocabulary(model, split)
    model.eval()
    if packed is None:
        packed = can_pack(model)
    same_length = rotation_depends_on_length(model)
    rows = _packed_rows(split, same_length) if packed else [[i] for i in range(len(split.examples))]
    batches = list(_batched_rows(rows, split.examples, batch_tokens, same_length))
    groups = {group: index for index, group in enumerate(dict.fromkeys(e.group for e in split.examples))}
    shape = (split.num_groups, len(split.positions))
    correct, log_prob = np.zeros(shape, dtype=bool), np.zeros(shape)
    for batch in progress(batches) if progress is not None else batches:
        for index, hit, value in _score_batch(model, split.examples, batch):
            example = split.examples[index]
            cell = groups[example.group], example.position
            correct[cell], log_prob[cell] = hit, value
    return PositionScores(split.positions, correct, log_prob)


def check_vocabulary(model: nn.Module, split: Split) -> None:
    """Raises TaskError if a token id of `split` is outside the model's vocabulary."""
    largest = max(max(e.context_ids + e.query_ids + e.answer_ids) for e in split.examples)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if largest >= vocabulary:
        raise TaskError(f"token id {largest} is outside the model's vocabulary of {vocabulary}.")


def rotation_depends_on_length(model: nn.Module) -> bool:
    """Whether a token's rotation depends on how long its batch is (Dynamic-NTK, longrope)."""
    for module in model.modules():
        scaling = module.active_scaling() if isinstance(module, (LayerRopeLayer, BakedLayerRope)) else None
        if scaling is not None and scaling.depends_on_length:
            return True
        if inv_freq_names(module) and is_length_dependent(module):
            return True
    return False


def can_pack(model: nn.Module) -> bool:
    """Whether several queries may share one row: needs a dense mask that all layers read alike."""
    config = model.config.get_text_config(decoder=True)
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return layer_types == {"full_attention"} and not sliding and config._attn_implementation in _PACKABLE_ATTENTION


def _packed_rows(split: Split, same_length: bool) -> list[list[int]]:
    """Groups examples that share a context (and, for a length-dependent rotation, their length)."""
    rows: dict[tuple, list[int]] = {}
    for index, example in enumerate(split.examples):
        rows.setdefault((example.context_ids, example.num_tokens if same_length else 0), []).append(index)
    return list(rows.values())


def _row_length(row: Sequence[int], examples: Sequence[Example]) -> int:
    context = len(examples[row[0]].context_ids)
    return context + sum(examples[i].num_tokens - context - 1 for i in row)


def _batched_rows(
    rows: list[list[int]], examples: Sequence[Example], batch_tokens: int, same_length: bool
) -> Iterator[list[list[int]]]:
    """Yields length-sorted batches of at most `batch_tokens` padded tokens (one row at least)."""
    rows = sorted(rows, key=lambda row: _row_length(row, examples))  # stable: ties keep their order
    batch: list[list[int]] = []
    for row in rows:
        length = _row_length(row, examples)
        too_long = (len(batch) + 1) * length > batch_tokens
        differs = same_length and batch and length != _row_length(batch[0], examples)
        if batch and (too_long or differs):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _score_batch(
    model: nn.Module, examples: Sequence[Example], batch: list[list[int]]
) -> Iterator[tuple[int, bool, float]]:
    """Runs one batch and yields `(example index, all tokens right, mean log-probability)`."""
    device = model.get_input_embeddings().weight.device
    dtype = model.get_input_embeddings().weight.dtype
    inputs, slots = _packed_batch(examples, batch, dtype)
    wanted = sorted({column for _, _, columns in slots for column in columns})
    column_of = {column: i for i, column in enumerate(wanted)}
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    logits = model(**inputs, use_cache=False, logits_to_keep=torch.tensor(wanted, device=device)).logits
    if logits.shape[1] != len(wanted):  # a model that does not know `logits_to_keep` returns every column
        logits = logits[:, wanted]
    log_probs = logits.float().log_softmax(-1)
    chance = -math.log(log_probs.shape[-1])
    for index, row, columns in slots:
        gold = torch.tensor(examples[index].answer_ids, device=device)
        lines = log_probs[row, [column_of[c] for c in columns]]
        gold_log_probs = lines.gather(-1, gold[:, None])
        yield index, bool((lines.argmax(-1) == gold).all()), float(gold_log_probs.clamp(min=chance).mean())


def _packed_batch(
    examples: Sequence[Example], batch: list[list[int]], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], list[tuple[int, int, list[int]]]]:
    """Builds the model's inputs: each row is a context followed by the queries that share it.

    A query's tokens see the context and themselves, and their positions continue the context's, so each query
    gets what it would get alone. Rows with one query use an ordinary causal mask with padding on the right.

    Returns:
        `input_ids`, `position_ids` of shape `(B, S)` and an `attention_mask`, `(B, 1, S, S)` additive where a
        row packs several queries; and, per example, its row and the columns that predict its answer.
    """
    width = max(_row_length(row, examples) for row in batch)
    input_ids = torch.zeros(len(batch), width, dtype=torch.long)
    position_ids = torch.zeros(len(batch), width, dtype=torch.long)
    segment = torch.full((len(batch), width), -1)  # -1 padding, 0 context, 1.. queries
    slots: list[tuple[int, int, list[int]]] = []
    for r, row in enumerate(batch):
        context = examples[row[0]].context_ids
        start = len(context)
        input_ids[r, :start] = torch.tensor(context, dtype=torch.long)
        position_ids[r, :start] = torch.arange(start)
        segment[r, :start] = 0
        for q, index in enumerate(row):
            example = examples[index]
            tokens = example.query_ids + example.answer_ids[:-1]
            end = start + len(tokens)
            input_ids[r, start:end] = torch.tensor(tokens)
            position_ids[r, start:end] = len(context) + torch.arange(len(tokens))
            segment[r, start:end] = q + 1
            slots.append((index, r, list(range(end - len(example.answer_ids), end))))
            start = end
    inputs = {"input_ids": input_ids, "position_ids": position_ids}
    if all(len(row) == 1 for row in batch):
        inputs["attention_mask"] = (segment >= 0).long()
    else:
        inputs["attention_mask"] = _segment_mask(segment, dtype)
    return inputs, slots


def _segment_mask(segment: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask `(B, 1, S, S)`: causal, and a query is seen only by itself."""
    width = segment.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    own = segment[:, :, None] == segment[:, None, :]
    context = segment[:, None, :] == 0
    visible = causal & (own | context)
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
