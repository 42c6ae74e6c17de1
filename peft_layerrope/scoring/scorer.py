"""Scores splits on one model: by the likelihood of the answers, by what the model writes, or by the loss on text.

Likelihood is what a search climbs: one forward pass, differentiable. What is written, judged by the task's public
metric, is what figures are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..base_model import keeping_modes
from ..errors import TaskError, named, whole_number
from ..tasks.base import Example, Split, SplitName, Task, check_task
from ..tasks.targets import target_of
from ..tuner.frequencies import without_memory
from .batching import (
    ScoreSheet,
    answer_logits,
    attends_fully,
    batched_by_length,
    check_finite,
    check_vocabulary,
    judge_tokens,
    make_batches,
    rotation_depends_on_length,
    with_halving,
)
from .context_cache import (
    ContextBatch,
    can_cache_contexts,
    context_batches,
    question_logits,
    run_contexts,
    shares_contexts,
)
from .generation import AnswerWriter, Written, judge_written
from .scores import PositionScores

DEFAULT_BATCH_TOKENS = 8192
"""Tokens per forward pass unless told otherwise."""

DEFAULT_BUCKETS = 8

_USUAL_NEW_TOKENS, _USUAL_ANSWERS = 24, 4
"""Most answers are settled by so many tokens, or by so many times those of the longest one that is right: a chat model
repeats the question. The others are written again, among themselves: all rows of a batch would have to go on as long as
its longest answer.
"""

Progress = Callable[[Iterable], Iterable]
"""Wraps the list of batches, e.g. `tqdm`."""


class Scorer:
    """Scores splits on a model, which is put into eval mode, and remembers what it learns of it: how many tokens fit
    into memory, and whether questions to one context may share one run of it through the KV cache, which a trial
    decides unless `cache_contexts` does. `model` may be replaced by the same model with another adapter on it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        cache_contexts: bool | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.batch_tokens = whole_number("batch_tokens", batch_tokens, 1)  # halved for good whenever memory runs out
        self._cache_contexts = cache_contexts
        self._shown = progress or (lambda batches: batches)
        self._checked_tokens = 0  # of the longest prompt that was looked at

    def check(self, split: Split) -> None:
        """Checks, once for a scorer and prompts up to twice as long, that the model can score a split; the first scores
        do so too.

        Raises:
            TaskError: a token id is outside the model's vocabulary, or the model gives no finite score.
        """
        check_vocabulary(self.model, split.examples)
        if split.max_tokens > 2 * self._checked_tokens:
            with keeping_modes(self.model):
                self._halving(lambda: check_finite(self.model, split, self.batch_tokens))
            self._checked_tokens = split.max_tokens

    def score(self, split: Split, *, packed: bool | None = None) -> PositionScores:
        """Scores every example of `split` by the likelihood of its answer. `packed`: the queries of one context are run
        in one row with it (see `batching`), or if False every prompt by itself, instead of through the KV cache; all
        three ways give the same scores up to rounding.

        Raises:
            TaskError: see [`check`]; or memory does not suffice for a single row.
        """
        self.check(split)
        sheet = ScoreSheet(split)
        if packed is None and self._caches(split):
            self._halving(lambda: self._ask_contexts(split.examples, sheet=sheet))
        else:
            self._halving(lambda: self._score_rows(dict(enumerate(split.examples)), sheet, packed))
        return sheet.scores()

    def bucket_losses(self, split: Split, num_buckets: int | None = DEFAULT_BUCKETS) -> PositionScores:
        """Measures the loss of every scored token of every window, averaged over buckets of token positions, which are
        equal up to one token; None: 8 of them, or as many as there are scored tokens. Windows have one length; scored
        are the tokens that all have in their `answer_ids`.

        Returns:
            Scores of measure `"loss"`: `log_prob[g, b]` is the mean log-probability of window g's tokens in bucket b,
            and `positions` are the buckets' first tokens, counted from the start of the window.

        Raises:
            TaskError: not such a split, or more buckets than scored tokens.
        """
        split = aligned_windows(split)
        scored = len(split.examples[0].answer_ids)
        if num_buckets is None:
            num_buckets = min(DEFAULT_BUCKETS, scored)
        check_buckets(split, num_buckets)
        start = split.max_tokens - scored
        bounds = [bucket * scored // num_buckets for bucket in range(num_buckets + 1)]
        self.check(split)
        tokens = self._halving(lambda: self._token_log_probs(split, scored))
        sizes = np.diff(bounds)
        log_probs = np.add.reduceat(tokens, bounds[:-1], axis=1) / sizes
        positions = tuple(start + bound for bound in bounds[:-1])
        none = np.zeros(log_probs.shape, dtype=bool)
        return PositionScores(positions, none, log_probs, "loss", sizes=tuple(sizes.tolist()))

    def write(self, split: Split, sheet: ScoreSheet | None = None) -> list[Written]:
        """Has the model write an answer to every example, greedily, until nothing can change the judge's mind. With a
        sheet the teacher-forced scores go into it.

        Raises:
            TaskError: running text, examples without the answers that the judge needs, or a model that cannot write.
        """
        self.check(split)
        writer, cached = AnswerWriter(self.model, split), self._caches(split)

        def answers(writer: AnswerWriter, examples: Sequence[Example], **options: Any) -> list[Written]:
            ask = self._ask_contexts if cached else self._write_rows
            return self._halving(lambda: ask(examples, writer=writer, **options))

        if sheet is not None and not cached:
            self._halving(lambda: self._score_rows(dict(enumerate(split.examples)), sheet))
        sheets = {"sheet": sheet} if cached else {}
        longest = max(len(example.answer_ids) for example in split.examples)
        short = AnswerWriter(self.model, split, max(_USUAL_NEW_TOKENS, _USUAL_ANSWERS * longest))
        written = answers(short, split.examples, **sheets)
        long = [index for index, answer in enumerate(written) if answer.cut_off]
        if long and writer.max_new_tokens > short.max_new_tokens:
            for index, answer in zip(long, answers(writer, [split.examples[index] for index in long]), strict=True):
                written[index] = answer
        if sheet is not None and not cached:
            opened = _otherwise_opened(split, dict(enumerate(written)))
            if opened:
                self._halving(lambda: self._score_rows(opened, sheet, again=True))
        return written

    def generate(self, split: Split) -> PositionScores:
        """Judges what the model writes; see [`write`].

        Returns:
            Scores whose `correct` is judged on what was written, whose `log_prob` is the teacher-forced one, and whose
            `written` says more about both: its `forced` is after the opening that was written, and false of a wrong
            answer that begins in no known way.
        """
        sheet = ScoreSheet(split)
        written = self.write(split, sheet)
        opened = _as_opened(split, dict(enumerate(written)))
        sheet.mark_wrong([index for index, example in opened.items() if example is None])
        return judge_written(split, written, sheet.scores())

    def measure(self, split: Split, *, num_buckets: int | None = None) -> PositionScores:
        """Returns what figures are made of: of running text the loss; of a split with a judge the written answers; of
        any other whether every token of the answer is the most probable one. `num_buckets`: see [`bucket_losses`].
        """
        if split.measure == "loss":
            return self.bucket_losses(split, num_buckets)
        return self.score(split) if split.judge is None else self.generate(split)

    def _halving(self, attempt: Callable[[], object]) -> object:
        """Returns what `attempt()` does; whenever memory runs out, it is called again with half the tokens."""

        def sized(batch_tokens: int) -> object:
            self.batch_tokens = batch_tokens
            self.model.eval()
            with without_memory(self.model):
                return attempt()

        return with_halving(sized, self.batch_tokens)[0]

    def _caches(self, split: Split) -> bool:
        # the length matters for some adapters and not for others: that is asked anew for each
        if not shares_contexts(split) or rotation_depends_on_length(self.model):
            return False
        if self._cache_contexts is None:
            self._cache_contexts = can_cache_contexts(self.model)
        return self._cache_contexts

    @torch.no_grad()
    def _score_rows(
        self,
        examples: Mapping[int, Example],
        sheet: ScoreSheet,
        packed: bool | None = None,
        again: bool = False,
    ) -> None:
        indices = list(examples)
        batches = make_batches(self.model, list(examples.values()), self.batch_tokens, packed)
        for batch in self._shown(batches):
            members = [indices[index] for index in batch.examples]
            sheet.add(members, answer_logits(self.model, batch), batch.gold, batch.owner, again)

    def _write_rows(self, examples: Sequence[Example], *, writer: AnswerWriter) -> list[Written]:
        found: dict[int, Written] = {}
        lengths = [len(example.prompt_ids) + writer.max_new_tokens for example in examples]
        alike = rotation_depends_on_length(self.model)
        batches = batched_by_length(range(len(examples)), lengths.__getitem__, self.batch_tokens, same_length=alike)
        for batch in self._shown(list(batches)):
            found |= zip(batch, writer.after_prompts([examples[index] for index in batch]), strict=True)
        return [found[index] for index in range(len(examples))]

    @torch.no_grad()
    def _ask_contexts(
        self,
        examples: Sequence[Example],
        *,
        sheet: ScoreSheet | None = None,
        writer: AnswerWriter | None = None,
    ) -> list[Written]:
        """Runs each context once: scores its questions into `sheet`, and has answers to them written by `writer`."""
        found: dict[int, Written] = {}
        batches = list(context_batches(examples, writer.max_new_tokens if writer is not None else 0, self.batch_tokens))
        for batch in self._shown(batches):
            contexts = run_contexts(self.model, [context for context, _ in batch])
            rows = [(row, index) for row, (_, members) in enumerate(batch) for index in members]
            if sheet is not None:
                self._score_questions(sheet, contexts, rows, examples)
            if writer is not None:
                written = self._write_answers(writer, contexts, rows, examples)
                found |= written
                if sheet is not None and (opened := _otherwise_opened(sheet.split, written)):
                    again = [(row, index) for row, index in rows if index in opened]
                    self._score_questions(sheet, contexts, again, opened, again=True)
        return [found[index] for index in sorted(found)]

    def _score_questions(
        self,
        sheet: ScoreSheet,
        contexts: ContextBatch,
        rows: list[tuple[int, int]],
        examples: Sequence[Example] | Mapping[int, Example],
        again: bool = False,
    ) -> None:
        for part in batched_by_length(rows, lambda row: contexts.ids.shape[1], self.batch_tokens):
            asked = [examples[index] for _, index in part]
            ids = [example.asked_ids + example.answer_ids[:-1] for example in asked]
            logits = question_logits(self.model, contexts.rows([row for row, _ in part]), ids)
            answers = [
                (row, len(example.asked_ids) - 1 + place, token)
                for row, example in enumerate(asked)
                for place, token in enumerate(example.answer_ids)
            ]
            owner, columns, gold = torch.tensor(answers, device=logits.device).T
            sheet.add([index for _, index in part], logits[owner, columns], gold, owner, again)

    def _write_answers(
        self, writer: AnswerWriter, contexts: ContextBatch, rows: list[tuple[int, int]], examples: Sequence[Example]
    ) -> dict[int, Written]:
        found: dict[int, Written] = {}
        lengths = {index: len(examples[index].query_ids) for _, index in rows}
        if attends_fully(self.model):  # else a window counts the padding before a shorter question
            lengths = dict.fromkeys(lengths, max(lengths.values()))
        width = contexts.ids.shape[1] + writer.max_new_tokens
        for part in batched_by_length(rows, lambda row: width + lengths[row[1]], self.batch_tokens, same_length=True):
            copied, members = contexts.rows([row for row, _ in part]), [index for _, index in part]
            found |= zip(members, writer.after_contexts(copied, [examples[index] for index in members]), strict=True)
        return found

    @torch.no_grad()
    def _token_log_probs(self, split: Split, scored: int) -> np.ndarray:
        """Shape `(windows, scored)`, float64, in the order of the split's examples."""
        found = np.empty((len(split.examples), scored))
        batches = make_batches(self.model, split.examples, self.batch_tokens, packed=False)
        for batch in self._shown(batches):
            log_probs, _ = judge_tokens(answer_logits(self.model, batch), batch.gold)
            found[list(batch.examples)] = log_probs.view(len(batch.examples), scored).double().cpu().numpy()
        return found


def _as_opened(split: Split, written: Mapping[int, Written]) -> dict[int, Example | None]:
    """Some examples with the openings that their answers were written after; None for a wrong answer that begins in no
    known way.
    """
    opened = {index: split.examples[index].opened_as(answer.ids) for index, answer in written.items()}
    for index in [index for index, example in opened.items() if example is None and split.judge is not None]:
        example = split.examples[index]
        target = target_of(written[index].ids, example.answers, split.judge)
        opened[index] = replace(example, **target._asdict()) if target is not None else None
    return opened


def _otherwise_opened(split: Split, written: Mapping[int, Written]) -> dict[int, Example]:
    """Those of some examples whose answer was written after another opening than their own, with that one."""
    opened = _as_opened(split, written)
    return {index: example for index, example in opened.items() if example not in (None, split.examples[index])}


def evaluate(
    model: nn.Module,
    task: Task,
    *,
    split: SplitName = "test",
    num_groups: int = 100,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: Progress | None = None,
) -> PositionScores:
    """Evaluates a causal language model, with or without an adapter, at every gold position of a task.

    Of a task with a public metric the answers that the model writes are judged; otherwise an answer is right where
    every token of it is the most probable one.

    Args:
        model: a transformers model or `PeftModel`; put into eval mode.
        task: see [`Task`].
        split: which split; report figures from `"test"`.
        num_groups: independent contexts; each is asked at every position.
        batch_tokens: tokens per forward pass.
        progress: see [`Progress`].

    Returns:
        The scores.

    Raises:
        TaskError: no task, the split cannot be made, or a token id is outside the model's vocabulary.
    """
    check_task(task)
    if progress is not None and not callable(progress):
        raise TaskError(f"progress={named(progress)} must be a function, or None.")
    examples, scorer = task.split(split, num_groups), Scorer(model, batch_tokens=batch_tokens, progress=progress)
    return scorer.score(examples) if examples.measure == "loss" else scorer.measure(examples)


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
    examples = []
    for example in split.examples:
        ids = example.context_ids + example.query_ids + example.answer_ids
        parts = {"context_ids": ids[: start - 1], "query_ids": ids[start - 1 : start], "answer_ids": ids[start:]}
        examples.append(replace(example, **parts))
    return replace(split, examples=tuple(examples))


def check_buckets(split: Split, num_buckets: int) -> None:
    """Raises TaskError if aligned windows score fewer tokens than there are buckets."""
    scored = len(split.examples[0].answer_ids)
    if not 1 <= whole_number("num_buckets", num_buckets) <= scored:
        raise TaskError(f"num_buckets={num_buckets} must be from 1 to the {scored} scored tokens of a window.")
