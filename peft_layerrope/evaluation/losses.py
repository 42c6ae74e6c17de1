"""The loss on running text, by how far into the window a token stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ..checks import whole_number
from ..errors import TaskError
from ..tasks import Example, Split
from .batching import Batch, make_batches
from .scores import PositionScores
from .scoring import DEFAULT_BATCH_TOKENS, answer_logits, judge_tokens, with_halving

DEFAULT_BUCKETS = 8


def bucket_losses(
    model: nn.Module,
    split: Split,
    num_buckets: int = DEFAULT_BUCKETS,
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> PositionScores:
    """Measures the loss of every scored token of every window, averaged over buckets of token positions.

    Args:
        model: a causal language model, with or without an adapter; put into eval mode.
        split: windows of one length, one example for each. Scored are the tokens that all windows have in their
            `answer_ids`.
        num_buckets: parts of the scored tokens, equal up to one token.
        batch_tokens: tokens per forward pass; halved, and the split begun again, when memory runs out.
        progress: wraps the list of batches, e.g. `tqdm`.

    Returns:
        Scores of measure `"loss"`: `log_prob[g, b]` is the mean log-probability of window g's tokens in bucket b, and
        `positions` are the buckets' first tokens, counted from the start of the window.

    Raises:
        TaskError: not such a split, or more buckets than scored tokens.
    """
    split = aligned_windows(split)
    check_buckets(split, num_buckets)
    scored = len(split.examples[0].answer_ids)
    start = split.max_tokens - scored
    bounds = [bucket * scored // num_buckets for bucket in range(num_buckets + 1)]

    def attempt(batch_tokens: int) -> np.ndarray:
        batches = make_batches(model, split, batch_tokens, packed=False)
        tokens = _token_log_probs(model, split, scored, progress(batches) if progress is not None else batches)
        return np.add.reduceat(tokens, bounds[:-1], axis=1) / np.diff(bounds)

    log_probs, _ = with_halving(attempt, batch_tokens)
    positions = tuple(start + bound for bound in bounds[:-1])
    return PositionScores(positions, np.zeros(log_probs.shape, dtype=bool), log_probs, "loss")


def aligned_windows(split: Split) -> Split:
    """Returns the same windows with the tokens scored that all of them score: of windows that overlap, the first one
    scores more than the others.

    Raises:
        TaskError: not windows of text, or of different lengths.
    """
    if split.measure != "loss" or len(split.positions) != 1:
        raise TaskError(f"split {split.name!r} holds questions and answers, not windows of text.")
    lengths = sorted({example.num_tokens for example in split.examples})
    if len(lengths) > 1:
        raise TaskError(f"split {split.name!r} has windows of different lengths: {lengths[0]} to {lengths[-1]} tokens.")
    start = max(example.num_tokens - len(example.answer_ids) for example in split.examples)
    return replace(split, examples=tuple(_scored_from(start, example) for example in split.examples))


def _scored_from(start: int, example: Example) -> Example:
    ids = example.context_ids + example.query_ids + example.answer_ids
    return replace(example, context_ids=ids[: start - 1], query_ids=ids[start - 1 : start], answer_ids=ids[start:])


def check_buckets(split: Split, num_buckets: int) -> None:
    """Raises TaskError if aligned windows score fewer tokens than there are buckets."""
    scored = len(split.examples[0].answer_ids)
    if not 1 <= whole_number("num_buckets", num_buckets) <= scored:
        raise TaskError(f"num_buckets={num_buckets} must be from 1 to the {scored} scored tokens of a window.")


@torch.inference_mode()
def _token_log_probs(model: nn.Module, split: Split, scored: int, batches: Iterable[Batch]) -> np.ndarray:
    """Shape `(windows, scored)`, float64, in the order of the split's examples."""
    model.eval()
    found = np.empty((len(split.examples), scored))
    for batch in batches:
        log_probs, _ = judge_tokens(answer_logits(model, batch), batch.gold)
        found[list(batch.examples)] = log_probs.view(len(batch.examples), scored).double().cpu().numpy()
    return found
