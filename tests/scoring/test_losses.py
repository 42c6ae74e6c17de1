"""Losses by bucket against transformers' own `model(ids, labels=ids).loss`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import VOCAB, build_model
from peft import get_peft_model

from peft_layerrope import Example, LayerRopeConfig, PositionScores, Split, TaskError
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.tasks.kv import KeyValueWords

IGNORED = -100


def windows(count: int = 5, length: int = 41, read: int = 1, seed: int = 0) -> Split:
    """Windows of `length` tokens, of which all but the first `read` are scored."""
    rows = np.random.default_rng(seed).integers(0, VOCAB, (count, length)).tolist()
    examples = [
        Example(tuple(r[: read - 1]), tuple(r[read - 1 : read]), tuple(r[read:]), 0, g) for g, r in enumerate(rows)
    ]
    return Split("test", seed, (0,), tuple(examples), "loss")


def whole(example: Example) -> torch.Tensor:
    return torch.tensor([example.context_ids + example.query_ids + example.answer_ids])


@torch.no_grad()
def reference(model: torch.nn.Module, example: Example, start: int, stop: int) -> float:
    """transformers' loss of the tokens from `start` to before `stop`."""
    ids = whole(example)
    labels = torch.full_like(ids, IGNORED)
    labels[:, start:stop] = ids[:, start:stop]
    return model(ids, labels=labels).loss.item()


@pytest.fixture(params=["llama", "gemma2", "dynamic"])
def model(request):
    if request.param != "dynamic":
        return build_model(request.param)
    config = LayerRopeConfig(rope_type="dynamic", factor=2.0, original_max_position_embeddings=16)
    return get_peft_model(build_model("llama"), config)


@pytest.mark.parametrize("batch_tokens", [1, 90, 10_000])
def test_one_bucket_is_the_loss_of_transformers(model, batch_tokens):
    split = windows()
    scores = Scorer(model, batch_tokens=batch_tokens).bucket_losses(split, 1)
    assert (scores.positions, scores.measure, scores.correct.any()) == ((1,), "loss", False)
    for example, found in zip(split.examples, -scores.log_prob[:, 0], strict=True):
        ids = whole(example)[:, :-1]  # the last token is not fed: Dynamic-NTK depends on the length
        with torch.no_grad():
            lines = model(ids).logits[0].log_softmax(-1)
        expected = -lines[torch.arange(ids.shape[1]), whole(example)[0, 1:]].mean().item()
        assert found == pytest.approx(expected, abs=2e-5)
        if not hasattr(model, "peft_config"):
            assert found == pytest.approx(model(whole(example), labels=whole(example)).loss.item(), abs=2e-5)


@pytest.mark.parametrize("num_buckets", [1, 3, 7])
def test_the_average_is_over_tokens_however_they_are_cut(num_buckets):
    model, split = build_model("llama"), windows()
    scores = Scorer(model).bucket_losses(split, num_buckets)
    expected = np.mean([reference(model, example, 0, whole(example).shape[1]) for example in split.examples])
    for found in (scores, PositionScores.from_plain(json.loads(json.dumps(scores.to_plain())))):
        assert -PositionScores.joined([found, found]).average().value == pytest.approx(expected, abs=2e-5)
        assert -found.utilization() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(("read", "num_buckets"), [(1, 8), (21, 3), (40, 1)])
def test_buckets_are_parts_of_the_scored_tokens(read, num_buckets):
    model, split = build_model("llama"), windows(read=read)
    scores = Scorer(model).bucket_losses(split, num_buckets)
    assert scores.log_prob.shape == (5, num_buckets)
    assert scores.positions[0] == read
    ends = [*scores.positions[1:], 41]
    sizes = [end - start for start, end in zip(scores.positions, ends, strict=True)]
    assert max(sizes) - min(sizes) <= 1
    for row, example in enumerate(split.examples):
        expected = [-reference(model, example, *bounds) for bounds in zip(scores.positions, ends, strict=True)]
        np.testing.assert_allclose(scores.log_prob[row], expected, atol=2e-5)


def test_rows_follow_the_examples_whatever_the_batches(model):
    split = windows(9)
    seen = []
    one = Scorer(model, batch_tokens=1, progress=lambda b: seen.extend(b) or b).bucket_losses(split, 4)
    assert len(seen) == 9
    np.testing.assert_allclose(one.log_prob, Scorer(model).bucket_losses(split, 4).log_prob, atol=2e-5)
    part = Scorer(model).bucket_losses(split.part([3, 4]), 4)
    np.testing.assert_allclose(one.log_prob[3:5], part.log_prob, atol=2e-5)


def test_other_splits_are_refused(demo_tokenizer):
    model = build_model("llama")
    with pytest.raises(TaskError, match="num_buckets=41 must be from 1 to the 40 scored tokens"):
        Scorer(model).bucket_losses(windows(), 41)
    questions = KeyValueWords(demo_tokenizer, 128, num_positions=3).split("test", 2)
    with pytest.raises(TaskError, match="'test' holds questions and answers, not windows of text"):
        Scorer(model).bucket_losses(questions)
    mixed = (*windows().examples, Example((), (1,), (2, 3), 0, 99))
    with pytest.raises(TaskError, match="windows of different lengths: 3 to 41 tokens"):
        Scorer(model).bucket_losses(Split("test", 0, (0,), mixed, "loss"))


def test_of_overlapping_windows_the_part_that_all_score_counts():
    """As with a stride: the first window scores all its tokens, the others only their last ones."""
    late = windows(read=21)
    first = windows(1, read=1).examples
    mixed = Split("test", 0, (0,), first + late.examples[1:], "loss")
    model = build_model("llama")
    found, expected = Scorer(model).bucket_losses(mixed, 4), Scorer(model).bucket_losses(late, 4)
    assert found.positions == expected.positions
    np.testing.assert_array_equal(found.log_prob, expected.log_prob)
