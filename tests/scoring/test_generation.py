"""What is generated, judged by its tokens, is what the teacher-forced pass says; and judged by a metric, its text."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build_model
from peft import LoraConfig, get_peft_model
from test_scorer import random_split, with_greedy_answers

from peft_layerrope import Example, KeyValueWords, LayerRopeConfig, PositionScores, Split, TaskError
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.tasks.metrics import Judge

SIZES = pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])  # one example at a time, a few, all together


@pytest.fixture
def beyond(demo_tokenizer) -> Split:
    """Beyond the demo model's window, where it is right at some positions and wrong at others; mixed lengths."""
    long = KeyValueWords(demo_tokenizer, 480, num_positions=4, seed=11).split("validation", 5)
    short = KeyValueWords(demo_tokenizer, 400, num_positions=4, seed=12).split("validation", 3)
    return replace(long, examples=long.examples + tuple(replace(e, group=e.group + 5) for e in short.examples))


@pytest.mark.parametrize("batch_tokens", [1, 2000, 20_000])
def test_judged_by_tokens_it_equals_the_teacher_forced_score(demo_model, beyond, batch_tokens):
    expected = Scorer(demo_model).score(beyond)
    assert 0.1 < expected.correct.mean() < 0.9
    found = Scorer(demo_model, batch_tokens=batch_tokens).generate(beyond)
    np.testing.assert_array_equal(found.correct, expected.correct)
    np.testing.assert_allclose(found.log_prob, expected.log_prob, atol=1e-4)  # of sums of two tokens
    assert (found.positions, found.measure) == (expected.positions, "accuracy")


@SIZES
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_tiny_models_with_an_adapter(family, batch_tokens):
    model = get_peft_model(build_model(family), LayerRopeConfig(layer_factors=[1.0, 1.5, 2.0, 1.2]))
    split = with_greedy_answers(model, random_split())
    found = Scorer(model, batch_tokens=batch_tokens).generate(split)
    assert found.correct.any()
    np.testing.assert_array_equal(found.correct, Scorer(model).score(split).correct)


@SIZES
def test_dynamic_ntk_does_not_depend_on_the_batch(batch_tokens):
    """Its rotation follows the longest row, so that rows of other lengths must not stand beside it."""
    config = LayerRopeConfig(rope_type="dynamic", factor=4.0, original_max_position_embeddings=16)
    model = get_peft_model(build_model("llama"), config)
    split = with_greedy_answers(model, random_split())  # one by one, with a cache
    found = Scorer(model, batch_tokens=batch_tokens).generate(split)
    written = [bool(n % 2) for n in range(len(split.examples))]
    assert found.correct.flatten()[written].all()


def test_an_answer_may_hold_an_end_of_text():
    model = build_model("llama")
    prompt = Example((5, 6, 7), (8,), (1,), 0, 0)
    ids = torch.tensor([[5, 6, 7, 8]])
    answer = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 4:].tolist()
    model.generation_config.eos_token_id = answer[1]
    split = Split("test", 0, (0,), (replace(prompt, answer_ids=tuple(answer)),))
    assert Scorer(model).generate(split).correct.all()


@pytest.mark.parametrize("batch_tokens", [100, 10_000])
def test_the_output_layer_gets_its_rows_in_one_piece(batch_tokens):
    """With a frozen weight, PyTorch multiplies other rows only after copying the weight for each of them."""
    model = get_peft_model(build_model("llama"), LayerRopeConfig(layer_factors=[1.0, 1.5, 2.0, 1.2]))
    head, strides = model.get_output_embeddings(), []
    assert not head.weight.requires_grad
    split = with_greedy_answers(model, random_split())
    head.register_forward_hook(lambda module, args, logits: strides.append((args[0].shape, args[0].stride())))
    Scorer(model, batch_tokens=batch_tokens).generate(split)
    assert strides
    assert all(stride == torch.empty(shape).stride() for shape, stride in strides)
    assert not head._forward_pre_hooks


def test_the_models_own_generation_settings_do_not_matter_and_stay(demo_model, beyond):
    settings = demo_model.generation_config
    settings.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=2)
    before = settings.to_dict()
    found = Scorer(demo_model).generate(beyond)
    np.testing.assert_array_equal(found.correct, Scorer(demo_model).score(beyond).correct)
    assert demo_model.generation_config is settings
    assert settings.to_dict() == before


def test_the_settings_of_a_model_below_a_lora_stay_too(demo_model, beyond):
    settings = demo_model.generation_config
    lora = get_peft_model(demo_model, LoraConfig(target_modules=["q_proj"]))
    rope = get_peft_model(lora, LayerRopeConfig(layer_factors=[1.2] * 6), adapter_name="rope")
    written = [answer.ids for answer in Scorer(rope).write(beyond)]
    assert demo_model.generation_config is settings
    assert "generation_config" not in vars(lora)
    plain = get_peft_model(rope.unload().unload(), LayerRopeConfig(layer_factors=[1.2] * 6))
    assert written == [answer.ids for answer in Scorer(plain).write(beyond)]


def answered(split: Split, tokenizer, wrong: bool = False) -> Split:
    """The same examples with their answers as text, in capitals; or with one that is nowhere."""
    texts = [tokenizer.decode(e.answer_ids).strip().upper() for e in split.examples]
    return replace(
        split,
        examples=tuple(
            replace(e, answers=("XYZ" if wrong else t,)) for e, t in zip(split.examples, texts, strict=True)
        ),
    )


def judged(split: Split, metric: str, tokenizer, max_new_tokens: int = 2) -> Split:
    return replace(split, judge=Judge(metric, tokenizer, max_new_tokens))


@pytest.mark.parametrize("metric", ["best_subspan_em", "contains_value"])
def test_a_metric_judges_the_text(demo_model, demo_tokenizer, beyond, metric):
    expected = Scorer(demo_model).score(beyond)
    right, wrong = (
        Scorer(demo_model).generate(judged(answered(beyond, demo_tokenizer, w), metric, demo_tokenizer))
        for w in (False, True)
    )
    np.testing.assert_array_equal(right.correct, expected.correct)
    np.testing.assert_allclose(right.log_prob, expected.log_prob, atol=2e-5)
    assert not wrong.correct.any()


def test_a_metric_finds_the_answer_later_in_the_text(demo_model, demo_tokenizer, beyond):
    """The answer's second word is written second; so it is within two new tokens and not within one."""
    second = tuple(
        replace(e, answers=(demo_tokenizer.decode(e.answer_ids[1:]).strip(),), answer_ids=e.answer_ids[1:])
        for e in beyond.examples
    )
    split = replace(beyond, examples=second)
    one, two = (Scorer(demo_model).generate(judged(split, "contains_value", demo_tokenizer, n)).correct for n in (1, 2))
    assert two.mean() > one.mean() + 0.3


def test_text_ends_at_the_end_of_text(demo_model, demo_tokenizer, beyond):
    """With the first token of every answer as an end of text, nothing of it is left to judge."""
    split = judged(answered(beyond, demo_tokenizer), "contains_value", demo_tokenizer)
    demo_model.generation_config.eos_token_id = sorted({e.answer_ids[0] for e in split.examples})
    found = Scorer(demo_model).generate(split)
    assert not found.correct.any()
    ended = [w for w in Scorer(demo_model).write(split) if not w.ids]
    assert ended
    assert not any(w.cut_off for w in ended)


@pytest.mark.parametrize("metric", ["best_subspan_em", "contains_value"])
def test_writing_stops_once_the_metric_is_settled(demo_model, demo_tokenizer, beyond, metric):
    """A right answer has two words, whatever could be written after it; a wrong one goes on to the limit."""
    split = answered(beyond, demo_tokenizer)
    demo_model.generation_config.eos_token_id = demo_tokenizer.eos_token_id = None
    written = Scorer(demo_model).write(judged(split, metric, demo_tokenizer, 6))
    found = Scorer(demo_model).generate(judged(split, metric, demo_tokenizer, 6))
    lengths = np.array([len(w.ids) for w in written])
    right = found.correct.flatten()
    assert 0 < right.mean() < 1
    assert (lengths[right] <= 6).all()
    assert lengths[right].min() == 2
    assert (lengths[~right] == 6).all()
    np.testing.assert_array_equal(found.written.num_tokens.flatten(), lengths)
    np.testing.assert_array_equal(found.written.cut_off.flatten(), ~right)


def test_answers_that_go_on_are_what_a_plain_loop_writes(demo_model, demo_tokenizer):
    """Some are settled after two words, others go on to the limit."""
    task = KeyValueWords(demo_tokenizer, 480, num_positions=4, seed=11)
    split = answered(task.split("validation", 2), demo_tokenizer)
    demo_model.generation_config.eos_token_id = demo_tokenizer.eos_token_id = None
    limit = 30
    written = Scorer(demo_model).write(judged(split, "contains_value", demo_tokenizer, limit))
    assert {w.cut_off for w in written} == {True, False}
    for example, answer in zip(split.examples, written, strict=True):
        ids = torch.tensor([example.prompt_ids])
        expected = demo_model.generate(ids, max_new_tokens=limit, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert answer.ids == tuple(expected.tolist())[: len(answer.ids)]
        assert answer.cut_off == (example.answers[0] not in demo_tokenizer.decode(expected).upper())


def test_what_was_written_is_told_beside_the_metric(demo_model, demo_tokenizer, beyond):
    split = judged(answered(beyond, demo_tokenizer), "contains_value", demo_tokenizer)
    found = Scorer(demo_model).generate(split)
    assert found.written.forced is None  # nothing was learnt of how the model writes
    np.testing.assert_array_equal(found.written.strict, found.correct)
    known = Scorer(demo_model).generate(replace(split, targets={"opening": ""}))
    np.testing.assert_array_equal(known.written.forced, Scorer(demo_model).score(beyond).correct)
    plain = Scorer(demo_model).generate(judged(split, "best_subspan_em", demo_tokenizer))
    assert plain.written.strict is None
    for scores in (found, known, plain):
        again = PositionScores.from_plain(json.loads(json.dumps(scores.to_plain())))
        assert again.to_plain() == scores.to_plain()
        assert again.to_dict() == scores.to_dict()


@pytest.mark.parametrize("cache_contexts", [True, False])
def test_an_answer_is_forced_after_the_opening_that_was_written(demo_model, demo_tokenizer, beyond, cache_contexts):
    """The likelihood stays that of the common opening, which half of the examples do not write. An answer that begins
    in no known way is forced after its own beginning where it is right, and not right where it is wrong.
    """
    split = judged(answered(beyond, demo_tokenizer), "contains_value", demo_tokenizer)
    split = replace(split, targets={"opening": ""})
    own = Scorer(demo_model).score(split)
    unwritten = [replace(e, opening_ids=(7, 8), other_targets=(((), e.answer_ids),)) for e in split.examples[::2]]
    examples = [unwritten[n // 2] if n % 2 == 0 else example for n, example in enumerate(split.examples)]
    right, wrong = int(own.correct.flatten().argmax()), int(own.correct.flatten().argmin())
    for unknown in (right, wrong):
        examples[unknown] = replace(examples[unknown], opening_ids=(7, 8), other_targets=())
    forced = demo_model(input_ids=torch.tensor([[*examples[wrong].prompt_ids, 7, 8]])).logits[0, -1].argmax()
    examples[wrong] = replace(examples[wrong], answer_ids=(int(forced),))  # as the common opening would have it
    split = replace(split, examples=tuple(examples))
    found = Scorer(demo_model, batch_tokens=2000, cache_contexts=cache_contexts).generate(split)
    common = Scorer(demo_model).score(split)
    assert (common.correct != own.correct).any()
    np.testing.assert_array_equal(found.written.forced, own.correct)
    np.testing.assert_allclose(found.log_prob, common.log_prob, atol=1e-4)


def test_figures_are_made_of_what_the_split_is_judged_by(demo_model, demo_tokenizer, beyond):
    split = judged(answered(beyond, demo_tokenizer, wrong=True), "contains_value", demo_tokenizer)
    measured, forced = Scorer(demo_model).measure(split), Scorer(demo_model).measure(replace(split, judge=None))
    assert not measured.correct.any()
    assert measured.written is not None
    np.testing.assert_array_equal(forced.correct, Scorer(demo_model).score(beyond).correct)
    assert forced.written is None


def test_memory_that_runs_out_halves_the_batch(beyond, demo_model):
    expected = Scorer(demo_model).generate(beyond).correct
    generate, seen = demo_model.generate, []

    def limited(ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
        seen.append(ids.numel())
        if ids.numel() > 3000:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(ids, **kwargs)

    demo_model.generate = limited
    np.testing.assert_array_equal(Scorer(demo_model, batch_tokens=8000).generate(beyond).correct, expected)
    assert max(seen) > 3000
    assert seen[-1] <= 3000


@pytest.mark.parametrize(
    ("metric", "measure", "message"),
    [
        ("contains_value", "accuracy", "metric='contains_value' needs accepted answers, and split 'test' has examples"),
        ("contains_value", "loss", "running text has no answers to generate"),
        (None, "loss", "running text has no answers to generate"),
    ],
)
def test_what_cannot_be_judged_is_refused(demo_tokenizer, metric, measure, message):
    judge = Judge(metric, demo_tokenizer) if metric is not None else None
    split = Split("test", 0, (0,), (Example((1,), (2,), (3,), 0, 0),), measure, judge)
    with pytest.raises(TaskError, match=message):
        Scorer(build_model("llama")).generate(split)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rouge",), r"metric='rouge' is unknown, expected one of best_subspan_em, contains_value\."),
        (("contains_value", 0), "max_new_tokens=0 must be at least 1"),
        (("contains_value", 1.5), "max_new_tokens=1.5 must be"),
        (("contains_value", 10**9), "max_new_tokens=1000000000 must be at most"),
    ],
)
def test_a_judge_that_cannot_be(demo_tokenizer, arguments, message):
    metric, *limit = arguments
    with pytest.raises(TaskError, match=message):
        Judge(metric, demo_tokenizer, *limit)
