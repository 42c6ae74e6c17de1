"""Turns a split into the forward passes that score it: rows, batches, masks, and where the answers are read.

Built once for a split and used for every factor vector. Shapes: B = rows of a batch, S = its width in tokens,
N = answer tokens that the batch scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import TaskError, UnsupportedModelError
from ..tasks import Example, Split
from ..tuner.frequencies import is_length_dependent
from ..tuner.rotary import BakedLayerRope, LayerRopeLayer
from ..tuner.sites import embedding_table, model_type
from .memory import is_out_of_memory

_PACKABLE_ATTENTION = ("eager", "sdpa")  # implementations that take a dense 4-D mask
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward pass, and which of its logits are answers.

    Attributes:
        inputs: `input_ids` and `position_ids`, `(B, S)` int64, and an `attention_mask`: `(B, S)` int64, or additive
            `(B, 1, S, S)` where a row packs several queries, by layer type where layers differ.
        columns: sorted columns whose logits are needed, for `logits_to_keep`.
        rows: shape `(N,)`: the row of each answer token.
        kept: shape `(N,)`: its place in `columns`.
        gold: shape `(N,)`: its token id.
        owner: shape `(N,)`: which of `examples` it belongs to, as an index into them.
        examples: indices into the split's examples.
    """

    inputs: dict[str, Any]
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
    embeddings, windows = embedding_table(model), _windows(model) or {}
    return [
        _batch(split.examples, group, embeddings.dtype, embeddings.device, windows)
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
    ids = [f(e.context_ids + e.asked_ids + e.answer_ids) for e in split.examples for f in (min, max)]
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
        if is_length_dependent(module):
            return True
    return False


def attends_fully(model: nn.Module) -> bool:
    """Whether every token attends to all before it in every layer: no sliding window, no chunks, no recurrence."""
    return _windows(model) == {"": None}


def can_pack(model: nn.Module) -> bool:
    """Whether several queries may share one row: needs dense masks, one for each kind of layer."""
    windows = _windows(model)
    if windows is None or model.config.get_text_config(decoder=True)._attn_implementation not in _PACKABLE_ATTENTION:
        return False
    return set(windows) == {""} or _takes_masks_by_layer_type(model, windows)


def _windows(model: nn.Module) -> dict[str, int | None] | None:
    """How far the layers of each type attend, in tokens (None: to the beginning); under `""` where all are of one type
    and share one mask. None where a type is of another kind.
    """
    config = model.config.get_text_config(decoder=True)
    layer_types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if not layer_types <= {_FULL, _SLIDING} or (_SLIDING in layer_types and window is None):
        return None
    if _SLIDING in layer_types:
        return {name: window if name == _SLIDING else None for name in sorted(layer_types)}
    return {"": window if not layer_types else None}


@torch.no_grad()
def _takes_masks_by_layer_type(model: nn.Module, windows: dict[str, int | None]) -> bool:
    """Whether a model takes a dict of masks, by a trial of a few tokens."""
    embeddings = embedding_table(model)
    ids = torch.arange(1, 6, device=embeddings.device)[None]
    places = torch.arange(ids.shape[1], device=embeddings.device)[None]
    try:
        masks = _masks(torch.zeros_like(ids), places, embeddings.dtype, windows)
        found = model(input_ids=ids, position_ids=places, attention_mask=masks, use_cache=False).logits
    except Exception as error:  # whatever a family raises that wants one tensor
        if is_out_of_memory(error):
            raise
        return False
    expected = model(input_ids=ids, position_ids=places, use_cache=False).logits.float()
    return bool((found.float() - expected).abs().max() <= 0.1 * expected.std())  # False where they are not numbers


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


def _batch(
    examples: Sequence[Example],
    rows: list[list[int]],
    dtype: torch.dtype,
    device: torch.device,
    windows: dict[str, int | None],
) -> Batch:
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
            tokens = example.asked_ids + example.answer_ids[:-1]
            end = start + len(tokens)
            input_ids[r, start:end] = torch.tensor(tokens)
            position_ids[r, start:end] = len(context) + torch.arange(len(tokens))
            segment[r, start:end] = q + 1
            owner = sum(map(len, rows[:r])) + q
            first = end - len(example.answer_ids)
            answers += [(r, first + i, token, owner) for i, token in enumerate(example.answer_ids)]
            start = end
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
    if all(len(row) == 1 for row in rows):
        inputs["attention_mask"] = (segment >= 0).long()
    else:
        inputs["attention_mask"] = _masks(segment, position_ids, dtype, windows)
    answer_rows, columns, gold, owners = (torch.tensor(part) for part in zip(*answers, strict=True))
    wanted, kept = columns.unique(return_inverse=True)  # sorted
    return Batch(
        {name: _on(device, value) for name, value in inputs.items()},
        *(tensor.to(device) for tensor in (wanted, answer_rows, kept, gold, owners)),
        examples=tuple(index for row in rows for index in row),
    )


def _masks(
    segment: torch.Tensor, places: torch.Tensor, dtype: torch.dtype, windows: dict[str, int | None]
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive masks `(B, 1, S, S)`, by layer type where there are several: causal, and a query is seen only by itself.

    Args:
        segment: shape `(B, S)`: -1 for padding, 0 for the context, 1 and more for queries.
        places: shape `(B, S)`: positions, by which a window counts.
        dtype: of the masks.
        windows: see [`_windows`].
    """
    width = segment.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segment.device).tril()
    own = segment[:, :, None] == segment[:, None, :]
    context = segment[:, None, :] == 0
    visible = causal & (own | context)
    distance = places[:, :, None] - places[:, None, :]
    masks = {}
    for name, window in windows.items():
        seen = visible if window is None else visible & (distance < window)
        masks[name] = torch.zeros(seen.shape, dtype=dtype, device=segment.device)
        masks[name] = masks[name].masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
    return masks.get("", masks)


def _on(device: torch.device, value: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor]:
    return {k: v.to(device) for k, v in value.items()} if isinstance(value, dict) else value.to(device)
