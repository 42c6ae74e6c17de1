"""Accuracy of what a model really writes: greedy `generate()`, judged by a metric or by the answer's own tokens.

Slower than the teacher-forced `score`, and needed where an answer may be worded in several ways. With Dynamic-NTK the
two can differ: a KV cache keeps keys that were rotated at an earlier length, a forward pass over everything does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import TaskError
from ..tasks import Example, Split
from ..tasks.metrics import METRICS
from ..tuner.sites import embedding_table
from .batching import rotation_depends_on_length
from .scores import PositionScores
from .scoring import DEFAULT_BATCH_TOKENS, score, with_halving

Metric = Callable[[str, Sequence[str]], bool]


def generated_scores(
    model: nn.Module,
    split: Split,
    tokenizer: PreTrainedTokenizerBase | None = None,
    metric: str | None = None,
    *,
    max_new_tokens: int | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> PositionScores:
    """Has a model write an answer to every example, greedily, and judges it.

    Args:
        model: a transformers model or `PeftModel`; put into eval mode.
        split: the examples.
        tokenizer: decodes what was written, for the metric.
        metric: name of a metric in `tasks.metrics.METRICS`, which compares the text with the example's `answers`;
            None: right is what begins with the example's `answer_ids`.
        max_new_tokens: tokens to write; default: those of the split's longest answer.
        batch_tokens: tokens at once, those to be written included; halved, and the split begun again, when memory
            runs out.
        progress: wraps the list of batches, e.g. `tqdm`.

    Returns:
        Scores whose `correct` is judged on what was written, and whose `log_prob` is the teacher-forced one.

    Raises:
        TaskError: an unknown metric, one without a tokenizer or without accepted answers, or a model that cannot write.
    """
    judge = _judge(split, tokenizer, metric)
    writer = _writer(model)
    longest = max_new_tokens or longest_answer(split)
    scores = score(model, split, batch_tokens=batch_tokens)
    same_length = rotation_depends_on_length(model)
    # the answer's own tokens may hold an end of text; text ends there
    ends = set() if metric is None else _end_tokens(writer, tokenizer)

    def attempt(batch_tokens: int) -> np.ndarray:
        correct = np.zeros_like(scores.correct)
        rows = {group: row for row, group in enumerate(dict.fromkeys(e.group for e in split.examples))}
        batches = list(_batches(split.examples, longest, batch_tokens, same_length))
        for batch in progress(batches) if progress is not None else batches:
            for example, written in zip(batch, _write(writer, batch, longest, ends), strict=True):
                correct[rows[example.group], example.position] = judge(example, written)
        return correct

    correct, _ = with_halving(attempt, batch_tokens)
    return PositionScores(scores.positions, correct, scores.log_prob, scores.measure)


def longest_answer(split: Split) -> int:
    """Tokens of the longest answer."""
    return max(len(example.answer_ids) for example in split.examples)


def check_metric(split: Split, tokenizer: PreTrainedTokenizerBase | None, metric: str | None) -> None:
    """Raises TaskError if what is written for `split` could not be judged by `metric`; see [`generated_scores`]."""
    if split.measure == "loss":
        raise TaskError("running text has no answers to generate: its loss is measured without.")
    if metric is None:
        return
    if metric not in METRICS:
        raise TaskError(f"metric={metric!r} is unknown, expected one of {', '.join(METRICS)}.")
    if tokenizer is None:
        raise TaskError(f"metric={metric!r} judges text: pass the tokenizer.")
    if not all(example.answers for example in split.examples):
        raise TaskError(f"metric={metric!r} needs accepted answers, and split {split.name!r} has examples without.")


def _judge(
    split: Split, tokenizer: PreTrainedTokenizerBase | None, metric: str | None
) -> Callable[[Example, list[int]], bool]:
    check_metric(split, tokenizer, metric)
    if metric is None:
        return lambda example, written: tuple(written[: len(example.answer_ids)]) == example.answer_ids
    return lambda example, written: METRICS[metric](
        tokenizer.decode(written, skip_special_tokens=True), example.answers
    )


def _writer(model: nn.Module) -> PreTrainedModel:
    """The transformers model, whose layers hold the adapter."""
    if isinstance(model, PeftModel) and not model.active_peft_config.is_prompt_learning:
        model = model.get_base_model()
    if not hasattr(model, "generate"):
        raise TaskError(f"{type(model).__name__} has no generate(): judge it without --generate.")
    return model


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, (list, tuple)) else [ends]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _batches(
    examples: Sequence[Example], new_tokens: int, batch_tokens: int, same_length: bool
) -> Iterator[list[Example]]:
    """Yields batches in order of length, of at most `batch_tokens` padded tokens (one example at least)."""
    batch: list[Example] = []
    for example in sorted(examples, key=_prompt_length):
        length = _prompt_length(example)
        too_long = (len(batch) + 1) * (length + new_tokens) > batch_tokens
        if batch and (too_long or (same_length and length != _prompt_length(batch[0]))):
            yield batch
            batch = []
        batch.append(example)
    yield batch


def _prompt_length(example: Example) -> int:
    return len(example.context_ids) + len(example.query_ids)


@torch.inference_mode()
def _write(model: PreTrainedModel, batch: Sequence[Example], new_tokens: int, ends: set[int]) -> list[list[int]]:
    """Returns the new tokens of each example, up to the first of `ends`."""
    device = embedding_table(model).device
    width = max(map(_prompt_length, batch))
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(batch):
        prompt = torch.tensor(example.context_ids + example.query_ids)
        ids[row, width - len(prompt) :] = prompt  # on the right, where writing goes on
        mask[row, width - len(prompt) :] = 1
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    model.eval()
    with _settings(model, settings):
        output = model.generate(ids.to(device), attention_mask=mask.to(device))
    return [_until(row, ends) for row in output[:, width:].tolist()]


@contextmanager
def _settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Sets all of a model's generation settings: passed to `generate()`, they would be mixed with its own, such as a
    repetition penalty.
    """
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:end]
