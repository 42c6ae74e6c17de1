"""Turns a split into the forward passes that score it: rows, batches, masks, and where the answers are read.

Built once for a split and used for every factor vector. Shapes: B = rows of a batch, S = its width in tokens,
N = answer tokens that the batch scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import TaskError, UnsupportedModelError
from ..tasks import Example, Split
from ..tuner.rotary import BakedLayerRope, LayerRopeLayer, inv_freq_names, is_length_dependent
from ..tuner.sites import embedding_table, model_type

_PACKABLE_ATTENTION = ("eager", "sdpa")  # implementations that take a dense 4-D mask


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward pass, and which of its logits are answers.

    Attributes:
        inputs: `input_ids` and `position_ids`, `(B, S)` int64, and an `attention_mask`: `(B, S)` int64, or additive
            `(B, 1, S, S)` where a row packs several queries.
        columns: sorted columns whose logits are needed, for `logits_to_keep`.
        rows: shape `(N,)`: the row of each answer token.
        kept: shape `(N,)`: its place in `columns`.
        gold: shape `(N,)`: its token id.
        owner: shape `(N,)`: which of `examples` it belongs to, as an index into them.
        examples: indices into the split's examples.
    """

    inputs: dict[str, torch.Tensor]
    columns: torch.Tensor
    rows: torch.Tensor
    kept: torch.Tensor
    gold: torch.Tensor
    owner: torch.Tensor
    examples: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the forward pass runs, padding included."""
        return self.inputs["input_ids"].numel()


def make_batches(model: nn.Module, split: Split, batch_tokens: int, packed: bool | None = None) -> list[Batch]:
    """Plans the forward passes that score `split`, in order of length.

    Args:
        model: decides what may share a row or a batch; not run.
        split: the examples.
        batch_tokens: padded tokens per forward pass; a longer row has one to itself.
        packed: run the context that several queries share once; default: where the model allows it. Both ways give
            the same scores up to rounding.

    Raises:
        TaskError: a token id is outside the model's vocabulary.
    """
    check_vocabulary(model, split)
    if packed is None:
        packed = can_pack(model)
    same_length = rotation_depends_on_length(model)
    rows = _packed_rows(split, same_length) if packed else [[i] for i in range(len(split.examples))]
    embeddings = embedding_table(model)
    return [
        _batch(split.examples, group, embeddings.dtype, embeddings.device)
        for group in _batched_rows(rows, split.examples, batch_tokens, same_length)
    ]


def check_vocabulary(model: nn.Module, split: Split) -> None:
    """Checks that a model can be given a split.

    Raises:
        TaskError: a token id is outside the model's vocabulary.
        UnsupportedModelError: not a transformers model.
    """
    if not hasattr(model, "get_input_embeddings"):
        raise UnsupportedModelError(f"{model_type(model)}: not a transformers model.")
    ids = [f(e.context_ids + e.query_ids + e.answer_ids) for e in split.examples for f in (min, max)]
    vocabulary = embedding_table(model).shape[0]
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocabulary:
            raise TaskError(f"token id {token} is outside the model's vocabulary of {vocabulary}.")


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
        shared = example.context_ids or index  # nothing is nothing to share
        rows.setdefault((shared, example.num_tokens if same_length else 0), []).append(index)
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


def _batch(examples: Sequence[Example], rows: list[list[int]], dtype: torch.dtype, device: torch.device) -> Batch:
    """Builds one forward pass: each row is a context followed by the queries that share it.

    A query's tokens see the context and themselves, and their positions continue the context's, so each query
    gets what it would get alone. Rows with one query use an ordinary causal mask with padding on the right.
    """
    width = max(_row_length(row, examples) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    position_ids = torch.zeros(len(rows), width, dtype=torch.long)
    segment = torch.full((len(rows), width), -1)  # -1 padding, 0 context, 1.. queries
    answers: list[tuple[int, int, int, int]] = []  # row, column, token id, owner
    for r, row in enumerate(rows):
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
            owner = sum(map(len, rows[:r])) + q
            first = end - len(example.answer_ids)
            answers += [(r, first + i, token, owner) for i, token in enumerate(example.answer_ids)]
            start = end
    inputs = {"input_ids": input_ids, "position_ids": position_ids}
    if all(len(row) == 1 for row in rows):
        inputs["attention_mask"] = (segment >= 0).long()
    else:
        inputs["attention_mask"] = _segment_mask(segment, dtype)
    answer_rows, columns, gold, owners = (torch.tensor(part) for part in zip(*answers, strict=True))
    wanted, kept = columns.unique(return_inverse=True)  # sorted
    return Batch(
        {name: tensor.to(device) for name, tensor in inputs.items()},
        *(tensor.to(device) for tensor in (wanted, answer_rows, kept, gold, owners)),
        examples=tuple(index for row in rows for index in row),
    )


def _segment_mask(segment: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask `(B, 1, S, S)`: causal, and a query is seen only by itself."""
    width = segment.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    own = segment[:, :, None] == segment[:, None, :]
    context = segment[:, None, :] == 0
    visible = causal & (own | context)
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
