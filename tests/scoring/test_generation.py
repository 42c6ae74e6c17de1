"""What is generated, judged by its tokens, is what the teacher-forced pass says; and judged by a metric, its text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build_model
from peft import get_peft_model
from test_scorer import random_split, with_greedy_answers

from peft_layerrope import Example, KeyValueWords, LayerRopeConfig, Split, TaskError
from peft_layerrope.scoring.generation import generated_scores
from peft_layerrope.scoring.scoring import score

SIZES = pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])  # one example at a time, a few, all together


@pytest.fixture
def beyond(demo_tokenizer) -> Split:
    """Beyond the demo model's window, where it is right at some positions and wrong at others; mixed lengths."""
    long = KeyValueWords(demo_tokenizer, 480, num_positions=4, seed=11).split("validation", 5)
    short = KeyValueWords(demo_tokenizer, 400, num_positions=4, seed=12).split("validation", 3)
    return replace(long, examples=long.examples + tuple(replace(e, group=e.group + 5) for e in short.examples))


@pytest.mark.parametrize("batch_tokens", [1, 2000, 20_000])
def test_judged_by_tokens_it_equals_the_teacher_forced_score(demo_model, beyond, batch_tokens):
    expected = score(demo_model, beyond)
    assert 0.1 < expected.correct.mean() < 0.9
    found = generated_scores(demo_model, beyond, batch_tokens=batch_tokens)
    np.testing.assert_array_equal(found.correct, expected.correct)
    np.testing.assert_allclose(found.log_prob, expected.log_prob, atol=1e-5)
    assert (found.positions, found.measure) == (expected.positions, "accuracy")


@SIZES
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_tiny_models_with_an_adapter(family, batch_tokens):
    model = get_peft_model(build_model(family), LayerRopeConfig(layer_factors=[1.0, 1.5, 2.0, 1.2]))
    split = with_greedy_answers(model, random_split())
    found = generated_scores(model, split, batch_tokens=batch_tokens)
    assert found.correct.any()
    np.testing.assert_array_equal(found.correct, score(model, split).correct)


@SIZES
def test_dynamic_ntk_does_not_depend_on_the_batch(batch_tokens):
    """Its rotation follows the longest row, so that rows of other lengths must not stand beside it."""
    config = LayerRopeConfig(rope_type="dynamic", factor=4.0, original_max_position_embeddings=16)
    model = get_peft_model(build_model("llama"), config)
    split = with_greedy_answers(model, random_split())  # one by one, with a cache
    found = generated_scores(model, split, batch_tokens=batch_tokens)
    written = [bool(n % 2) for n in range(len(split.examples))]
    assert found.correct.flatten()[written].all()


def test_an_answer_may_hold_an_end_of_text():
    model = build_model("llama")
    prompt = Example((5, 6, 7), (8,), (1,), 0, 0)
    ids = torch.tensor([[5, 6, 7, 8]])
    answer = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 4:].tolist()
    model.generation_config.eos_token_id = answer[1]
    split = Split("test", 0, (0,), (replace(prompt, answer_ids=tuple(answer)),))
    assert generated_scores(model, split).correct.all()


def test_the_models_own_generation_settings_do_not_matter_and_stay(demo_model, beyond):
    settings = demo_model.generation_config
    settings.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=2)
    before = settings.to_dict()
    found = generated_scores(demo_model, beyond)
    np.testing.assert_array_equal(found.correct, score(demo_model, beyond).correct)
    assert demo_model.generation_config is settings
    assert settings.to_dict() == before


def answered(split: Split, tokenizer, wrong: bool = False) -> Split:
    """The same examples with their answers as text, in capitals; or with one that is nowhere."""
    texts = [tokenizer.decode(e.answer_ids).strip().upper() for e in split.examples]
    return replace(
        split,
        examples=tuple(
            replace(e, answers=("XYZ" if wrong else t,)) for e, t in zip(split.examples, texts, strict=True)
        ),
    )


@pytest.mark.parametrize("metric", ["best_subspan_em", "contains_value"])
def test_a_metric_judges_the_text(demo_model, demo_tokenizer, beyond, metric):
    expected = score(demo_model, beyond).correct
    found = generated_scores(demo_model, answered(beyond, demo_tokenizer), demo_tokenizer, metric)
    np.testing.assert_array_equal(found.correct, expected)
    assert not generated_scores(
        demo_model, answered(beyond, demo_tokenizer, True), demo_tokenizer, metric
    ).correct.any()


def test_a_metric_finds_the_answer_later_in_the_text(demo_model, demo_tokenizer, beyond):
    """The answer's second word is written second; so it is within two new tokens and not within one."""
    second = tuple(
        replace(e, answers=(demo_tokenizer.decode(e.answer_ids[1:]).strip(),), answer_ids=e.answer_ids[1:])
        for e in beyond.examples
    )
    split = replace(beyond, examples=second)
    one, two = (
        generated_scores(demo_model, split, demo_tokenizer, "contains_value", max_new_tokens=n).correct for n in (1, 2)
    )
    assert two.mean() > one.mean() + 0.3


def test_text_ends_at_the_end_of_text(demo_model, demo_tokenizer, beyond):
    """With the first token of every answer as an end of text, nothing of it is left to judge."""
    split = answered(beyond, demo_tokenizer)
    demo_model.generation_config.eos_token_id = sorted({e.answer_ids[0] for e in split.examples})
    assert not generated_scores(demo_model, split, demo_tokenizer, "contains_value").correct.any()


def test_memory_that_runs_out_halves_the_batch(beyond, demo_model):
    expected = generated_scores(demo_model, beyond).correct
    generate, seen = demo_model.generate, []

    def limited(ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
        seen.append(ids.numel())
        if ids.numel() > 3000:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(ids, **kwargs)

    demo_model.generate = limited
    np.testing.assert_array_equal(generated_scores(demo_model, beyond, batch_tokens=8000).correct, expected)
    assert max(seen) > 3000
    assert seen[-1] <= 3000


@pytest.mark.parametrize(
    ("metric", "with_tokenizer", "measure", "message"),
    [
        ("rouge", True, "accuracy", "metric='rouge' is unknown, expected one of best_subspan_em, contains_value."),
        ("contains_value", False, "accuracy", "judges text: pass the tokenizer"),
        ("contains_value", True, "accuracy", "needs accepted answers, and split 'test' has examples without"),
        (None, True, "loss", "running text has no answers to generate"),
    ],
)
def test_what_cannot_be_judged_is_refused(demo_tokenizer, metric, with_tokenizer, measure, message):
    split = Split("test", 0, (0,), (Example((1,), (2,), (3,), 0, 0),), measure)
    with pytest.raises(TaskError, match=message):
        generated_scores(build_model("llama"), split, demo_tokenizer if with_tokenizer else None, metric)
