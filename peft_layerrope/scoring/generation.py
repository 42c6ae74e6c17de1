"""What a model really writes: greedy `generate()`, stopped as soon as the metric can no longer change.

With Dynamic-NTK it can differ from the teacher-forced pass: a KV cache keeps keys that were rotated at an earlier
length, a forward pass over everything does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ..errors import TaskError
from ..tasks.base import Example, Split
from ..tasks.metrics import METRICS, Judge
from ..tuner.sites import embedding_table
from .batching import cells, padded, whole_rows
from .context_cache import ContextBatch
from .scores import PositionScores, WrittenAnswers


@dataclass(frozen=True)
class Written:
    """An answer that was written."""

    ids: tuple[int, ...]  # up to the end of the text or to where the metric was settled
    text: str  # the same as text; empty where there is no judge
    cut_off: bool  # stopped by the limit, neither ended nor settled


def writing_model(model: nn.Module) -> nn.Module:
    """Returns the model whose `generate()` writes, by settings of its own: the one whose layers hold the adapters."""
    while isinstance(model, PeftModel) and not model.active_peft_config.is_prompt_learning:
        model = model.get_base_model()
    return model


@contextmanager
def generating_by(model: nn.Module, settings: GenerationConfig) -> Iterator[None]:
    """Has a transformers model write by these settings alone. Passed to `generate()`, they would be mixed with its own,
    such as a repetition penalty.
    """
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


class AnswerWriter:
    """Has a model write at most `max_new_tokens` tokens after examples of a split: as many as its judge says, or as the
    longest answer has, but no more than `most`. Without a judge, right is what begins with an example's own
    `answer_ids`.

    Raises:
        TaskError: what is written could not be judged, or the model cannot write.
    """

    def __init__(self, model: nn.Module, split: Split, most: int | None = None) -> None:
        check_judged(split)
        model = writing_model(model)
        if not hasattr(model, "generate"):
            raise TaskError(f"{type(model).__name__} has no generate(), which its answers are judged by.")
        self._model = model
        self._judge = split.judge
        longest = max(len(example.answer_ids) for example in split.examples)
        wanted = split.judge.max_new_tokens if split.judge is not None else longest
        self.max_new_tokens = wanted if most is None else min(most, wanted)
        self._ends: set[int] = set()
        if split.judge is not None:  # otherwise the answer's own tokens may hold an end of text
            ends = self._model.generation_config.eos_token_id
            listed = ends if isinstance(ends, (list, tuple)) else [ends]
            self._ends = {token for token in (*listed, split.judge.tokenizer.eos_token_id) if token is not None}

    def after_prompts(self, examples: Sequence[Example]) -> list[Written]:
        """Writes after whole prompts, padded on the left to one length."""
        return self._write(examples, *padded([example.prompt_ids for example in examples], "left"))

    def after_contexts(self, contexts: ContextBatch, examples: Sequence[Example]) -> list[Written]:
        """Writes after questions, one for each row of `contexts`; a shorter question is padded on the left."""
        ids, mask = padded([example.query_ids for example in examples], "left")
        ids = torch.cat([contexts.ids, ids.to(contexts.ids)], dim=-1)
        mask = torch.cat([contexts.mask, mask.to(contexts.mask)], dim=-1)
        return self._write(examples, ids, mask, **contexts.cache)

    @torch.no_grad()
    def _write(self, examples: Sequence[Example], ids: torch.Tensor, mask: torch.Tensor, **cache: Any) -> list[Written]:
        device = embedding_table(self._model).device
        until = _Settled(self._judge, examples, ids.shape[1], self._ends)
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=min(self._ends, default=0),
        )
        inputs = {"attention_mask": mask.to(device), **cache}
        with whole_rows(self._model), generating_by(self._model, settings):
            criteria = StoppingCriteriaList([until])
            return until.written(self._model.generate(ids.to(device), stopping_criteria=criteria, **inputs))


class _Settled(StoppingCriteria):
    """Ends each row where its text ends or its metric can no longer change."""

    def __init__(self, judge: Judge | None, examples: Sequence[Example], start: int, ends: set[int]) -> None:
        self._judge, self._examples, self._start, self._ends = judge, examples, start, ends
        self._done: dict[int, Written] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, ids in enumerate(input_ids[:, self._start :].tolist()):
            if row not in self._done and self._is_settled(row, ids):
                self._done[row] = self._as_written(ids, cut_off=False)
        return torch.tensor([row in self._done for row in range(len(self._examples))], device=input_ids.device)

    def written(self, output: torch.Tensor) -> list[Written]:
        """What each row wrote, given what `generate()` returned."""
        rows = output[:, self._start :].tolist()
        return [self._done.get(row) or self._as_written(ids, cut_off=True) for row, ids in enumerate(rows)]

    def _is_settled(self, row: int, ids: list[int]) -> bool:
        if ids[-1] in self._ends:
            return True
        example = self._examples[row]
        if self._judge is None:
            return len(ids) >= len(example.answer_ids) or tuple(ids) != example.answer_ids[: len(ids)]
        return self._judge.is_settled(self._judge.text(ids), example.answers)

    def _as_written(self, ids: list[int], cut_off: bool) -> Written:
        end = next((place for place, token in enumerate(ids) if token in self._ends), len(ids))
        return Written(tuple(ids[:end]), self._judge.text(ids[:end]) if self._judge is not None else "", cut_off)


def judge_written(split: Split, written: Sequence[Written], forced: PositionScores) -> PositionScores:
    """Judges what was written for each example of a split, beside the same examples' teacher-forced scores."""
    shape, judge = forced.correct.shape, split.judge
    correct, cut_off = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    num_tokens = np.zeros(shape, dtype=np.int64)
    strict = np.zeros(shape, dtype=bool) if judge is not None and METRICS[judge.metric].is_strictly_right else None
    for cell, example, answer in zip(cells(split), split.examples, written, strict=True):
        if judge is None:
            correct[cell] = answer.ids[: len(example.answer_ids)] == example.answer_ids
        else:
            correct[cell] = judge.is_right(answer.text, example.answers)
        if strict is not None:
            strict[cell] = judge.is_strictly_right(answer.text, example.answers, example.question)
        cut_off[cell], num_tokens[cell] = answer.cut_off, len(answer.ids)
    known = forced.correct if split.targets is not None else None
    answers = WrittenAnswers(known, strict, num_tokens, cut_off)
    return PositionScores(forced.positions, correct, forced.log_prob, forced.measure, answers)


def check_judged(split: Split) -> None:
    """Raises TaskError if what is written for `split` could not be judged."""
    if split.measure == "loss":
        raise TaskError("running text has no answers to generate: its loss is measured without.")
    if split.judge is not None and not all(example.answers for example in split.examples):
        raise TaskError(
            f"metric={split.judge.metric!r} needs accepted answers, and split {split.name!r} has examples without."
        )
