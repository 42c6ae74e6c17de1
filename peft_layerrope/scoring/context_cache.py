"""Runs a context once and goes on from it with several questions: for any attention, through the model's KV cache.

The rows of one batch are contexts, padded on the left: a question's tokens then follow its context's last one without a
gap, which a sliding window would count.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..tasks.base import Example, Split
from ..tuner.sites import embedding_table
from .batching import agrees, batched_by_length, padded, rotation_depends_on_length, whole_rows


@dataclass(frozen=True, eq=False)
class ContextBatch:
    """Contexts that were run."""

    cache: dict[str, Any]  # the model's KV cache, a row for each context, under the name by which the model takes it
    ids: torch.Tensor  # shape `(contexts, width)`, padded on the left
    mask: torch.Tensor  # of that shape: 1 where there is a token, 0 where there is padding

    def rows(self, contexts: Sequence[int]) -> ContextBatch:
        """Returns a copy with a row for each of `contexts`, which may repeat; it may be written into."""
        index = torch.tensor(contexts, device=self.ids.device)
        cache = copy.deepcopy(self.cache)
        for state in cache.values():
            state.batch_select_indices(index)
        return ContextBatch(cache, self.ids[index], self.mask[index])


def shares_contexts(split: Split) -> bool:
    """Whether several examples ask about one context."""
    contexts = [example.context_ids for example in split.examples if example.context_ids]
    return len(set(contexts)) < len(contexts)


def context_batches(
    examples: Sequence[Example], new_tokens: int, batch_tokens: int
) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
    """Yields batches of contexts, in order of length, each with the indices of the examples that ask about it. All
    questions' rows together, their contexts and the `new_tokens` that may be written included, have at most
    `batch_tokens`; a context whose questions have more has a batch to itself.
    """
    owners: dict[tuple[int, ...], list[int]] = {}
    for index, example in enumerate(examples):
        owners.setdefault(example.context_ids, []).append(index)
    longest = max(len(e.asked_ids) + len(e.answer_ids) for e in examples) + new_tokens
    return batched_by_length(
        list(owners.items()), lambda item: len(item[0]) + longest, batch_tokens, rows=lambda item: len(item[1])
    )


def run_contexts(model: nn.Module, contexts: Sequence[Sequence[int]]) -> ContextBatch:
    """Runs contexts, each of at least one token, and keeps their keys and values."""
    device = embedding_table(model).device
    ids, mask = (tensor.to(device) for tensor in padded(contexts, "left"))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with whole_rows(model):
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    name = "cache" if "cache" in output.keys() else "past_key_values"  # noqa: SIM118  # older versions' name
    return ContextBatch({name: output[name]}, ids, mask)


def question_logits(model: nn.Module, contexts: ContextBatch, questions: Sequence[Sequence[int]]) -> torch.Tensor:
    """Returns the logits of questions, one for each row of `contexts`, whose cache they are written into: shape
    `(questions, longest, vocabulary)`; a shorter question's logits stand at the beginning.
    """
    device = contexts.ids.device
    ids, mask = (tensor.to(device) for tensor in padded(questions))
    lengths = contexts.mask.sum(-1, keepdim=True)
    return model(
        input_ids=ids,
        attention_mask=torch.cat([contexts.mask, mask], dim=-1),
        position_ids=lengths + torch.arange(ids.shape[1], device=device),
        use_cache=True,
        **contexts.cache,
    ).logits


def can_cache_contexts(model: nn.Module) -> bool:
    """Whether a question asked of a context in the cache gets what the whole prompt gives, by a trial of a few tokens.
    Its rows are of another number and order than the contexts: some families keep states that do not follow.

    Never where the rotation depends on the length: the cached keys would be rotated for another one.
    """
    context, question = tuple(range(1, 9)), tuple(range(9, 12))

    def cached() -> torch.Tensor:
        contexts = run_contexts(model, [context[1:], context]).rows([1, 0, 1])
        return question_logits(model, contexts, [question, question[:1], question])[0]

    ids = torch.tensor([context + question], device=embedding_table(model).device)
    return not rotation_depends_on_length(model) and agrees(model, ids, cached)
