"""Scores against `generate()`, against one-by-one evaluation, and against hand-made numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import VOCAB, build_model, logits
from fakes import LimitedMemory, token_task
from families import build_tiny
from peft import get_peft_model
from scipy import stats

from peft_layerrope import Example, KeyValueWords, LayerRopeConfig, PositionScores, Split, TaskError, evaluate
from peft_layerrope.scoring.batching import answer_logits, can_pack, check_vocabulary, judge, make_batches, with_halving
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.scoring.scores import utilization


def random_split(groups: int = 5, lengths: tuple[int, ...] = (20, 31, 26)) -> Split:
    """Examples whose contexts, queries and answers differ in length."""
    rng = np.random.default_rng(0)
    examples = []
    for g in range(groups):
        context = tuple(rng.integers(1, VOCAB, lengths[g % len(lengths)]).tolist())
        for i in range(3):
            query = tuple(rng.integers(1, VOCAB, 1 + (g + i) % 3).tolist())
            examples.append(Example(context, query, tuple(rng.integers(1, VOCAB, 1 + i % 2).tolist()), i, g))
    return Split("test", 0, (0, 9, 19), tuple(examples))


def with_greedy_answers(model: torch.nn.Module, split: Split) -> Split:
    """Gives every second example the answer that the model itself would write."""
    examples = []
    for n, example in enumerate(split.examples):
        if n % 2:
            prompt = torch.tensor([example.context_ids + example.query_ids])
            output = model.generate(
                input_ids=prompt, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            answer = tuple(output[0, prompt.shape[1] :].tolist())
            example = Example(example.context_ids, example.query_ids, answer, example.position, example.group)
        examples.append(example)
    return Split(split.name, split.seed, split.positions, tuple(examples))


@pytest.fixture(params=["plain", "linear", "dynamic"])
def model(request):
    base = build_model("llama")
    if request.param == "plain":
        return base
    config = LayerRopeConfig(rope_type=request.param, factor=2.0, layer_factors=[1.0, 1.5, 2.0, 1.2])
    if request.param == "dynamic":
        config.original_max_position_embeddings = 16
    return get_peft_model(base, config)


def one_by_one(model: torch.nn.Module, example: Example) -> tuple[bool, float]:
    """The reference: a plain forward pass of one unpadded sequence."""
    ids = torch.tensor([example.context_ids + example.query_ids + example.answer_ids])
    count = len(example.answer_ids)
    # without the last token, as `score` sees it: Dynamic-NTK depends on the length
    lines = logits(model, ids[:, :-1])[0, -count:].log_softmax(-1)
    gold = ids[0, -count:]
    values = lines[torch.arange(count), gold].clamp(min=-math.log(VOCAB))
    return bool((lines.argmax(-1) == gold).all()), float(values.sum())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_batches_equal_one_by_one(model, packed, batch_tokens):
    split = with_greedy_answers(model, random_split())
    scores = Scorer(model, batch_tokens=batch_tokens).score(split, packed=packed)
    expected = [one_by_one(model, example) for example in split.examples]
    assert scores.correct.flatten().tolist() == [hit for hit, _ in expected]
    np.testing.assert_allclose(scores.log_prob.flatten(), [value for _, value in expected], atol=2e-5)


def test_rows_of_one_length_whose_last_positions_differ_do_not_change_each_other():
    """A rotation that depends on the length takes the largest position of a batch."""
    config = LayerRopeConfig(rope_type="dynamic", factor=2.0, original_max_position_embeddings=16)
    model, rng = get_peft_model(build_model("llama"), config), np.random.default_rng(0)
    drawn = iter(rng.integers(1, VOCAB, 200).tolist())

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(next(drawn) for _ in range(count))

    contexts = [tokens(20)] * 2 + [tokens(22), tokens(22)]  # the first is asked twice: 24 tokens, and 24
    examples = tuple(Example(context, tokens(1), tokens(2), i % 2, i // 2) for i, context in enumerate(contexts))
    split = Split("test", 0, (0, 1), examples)
    found = Scorer(model).score(split, packed=True).log_prob.flatten()
    np.testing.assert_allclose(found, [one_by_one(model, example)[1] for example in examples], atol=2e-5)


def test_every_family_scores_like_one_by_one(family):
    model = get_peft_model(build_model(family), LayerRopeConfig(layer_factors=[1.0, 1.5, 2.0, 1.2]))
    split = random_split()
    expected = [one_by_one(model, example)[1] for example in split.examples]
    np.testing.assert_allclose(Scorer(model).score(split).log_prob.flatten(), expected, atol=2e-5)


def test_a_model_that_ignores_logits_to_keep_scores_the_same():
    model, split = build_model("llama"), random_split()
    expected = Scorer(model).score(split)
    forward = model.forward
    model.forward = lambda *args, logits_to_keep=0, **kwargs: forward(*args, **kwargs)
    np.testing.assert_allclose(Scorer(model).score(split).log_prob, expected.log_prob, atol=1e-6)


def test_an_answer_counts_as_the_sum_of_its_tokens_and_none_of_them_worse_than_chance():
    """A token's log-probabilities are -ln 3 and the rest; chance, in a vocabulary of 3, is -ln 3 as well."""
    values = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]).log()
    right, log_prob = judge(values, torch.tensor([0, 1]), torch.tensor([0, 0]), 1)
    assert not right.any()
    assert log_prob.item() == pytest.approx(math.log(0.5) - math.log(3))
    right, loss = judge(values, torch.tensor([0, 1]), torch.tensor([0, 0]), 1, mean=True)
    assert loss.item() == pytest.approx((math.log(0.5) + math.log(0.05)) / 2)


@pytest.mark.parametrize(
    ("family", "overrides", "possible"),
    [
        ("llama", {}, True),
        ("gemma2", {}, True),
        ("gemma2", {"sliding_window": 7}, True),
        ("mistral", {"sliding_window": 16}, True),
        ("qwen2", {}, True),
        ("llama", {"attn_implementation": "flash_attention_2"}, False),
        ("gemma2", {"layer_types": ["chunked_attention"] * 4}, False),
    ],
)
def test_what_can_be_packed(family, overrides, possible):
    model = build_model(family)
    implementation = overrides.pop("attn_implementation", None)
    for name, value in overrides.items():
        setattr(model.config, name, value)
    if implementation is not None:
        model.config._attn_implementation = implementation
    assert can_pack(model) is possible


def test_exact_match_equals_generate_on_real_prompts(demo_model, demo_tokenizer):
    """Both right and wrong answers: beyond the window, where the demo model fails at some positions."""
    split = KeyValueWords(demo_tokenizer, 512, num_positions=5, seed=11).split("validation", 6)
    scores = Scorer(demo_model).score(split)
    assert 0 < scores.correct.mean() < 1
    for example in split.examples:
        prompt = torch.tensor([example.context_ids + example.query_ids])
        output = demo_model.generate(prompt, max_new_tokens=len(example.answer_ids), do_sample=False)
        generated = tuple(output[0, prompt.shape[1] :].tolist())
        assert scores.correct[example.group, example.position] == (generated == example.answer_ids)


def test_evaluate_is_score_of_the_split(demo_model, demo_tokenizer):
    task = KeyValueWords(demo_tokenizer, 128, num_positions=3)
    seen = []
    result = evaluate(demo_model, task, split="validation", num_groups=4, progress=lambda b: seen.extend(b) or b)
    assert result.correct.shape == (4, 3)
    assert seen
    np.testing.assert_array_equal(result.correct, Scorer(demo_model).score(task.split("validation", 4)).correct)


def test_a_foreign_vocabulary_is_refused():
    example = [Example((1, 2), (VOCAB,), (3,), i, 0) for i in range(3)]
    with pytest.raises(TaskError, match=f"token id {VOCAB} is outside the model's vocabulary of {VOCAB}"):
        Scorer(build_model("llama")).score(Split("test", 0, (0, 1, 2), tuple(example)))


def test_utilisation_by_hand():
    # (1 * 0.9 + 2 * mean(0.2, 0.4) + 3 * 0.8) / 6
    assert utilization([0.9, 0.2, 0.4, 0.8], (1, 2, 3)) == pytest.approx((0.9 + 0.6 + 2.4) / 6)
    assert utilization([0.5] * 7) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("scores", "weights", "message"),
    [
        ([1.0, 1.0], (1, 2, 3), "at least 3 positions"),
        ([1.0] * 3, (1, 2), "must be three positive numbers"),
        ([1.0] * 3, (1, 0, 3), "must be three positive numbers"),
    ],
)
def test_utilisation_errors(scores, weights, message):
    with pytest.raises(TaskError, match=message):
        utilization(scores, weights)


def test_paired_difference_is_by_group():
    shape = (30, 4)
    rng = np.random.default_rng(0)
    a = PositionScores((0, 1, 2, 3), rng.random(shape) < 0.7, np.zeros(shape))
    b = PositionScores((0, 1, 2, 3), rng.random(shape) < 0.5, np.zeros(shape))
    gap = a.paired_difference(b)
    assert gap.value == pytest.approx(a.correct.mean() - b.correct.mean())
    same = PositionScores((0, 1, 2, 3), a.correct & b.correct, a.log_prob)  # one that follows the other
    assert same.paired_difference(b).high - same.paired_difference(b).low < gap.high - gap.low
    losses = [PositionScores((0, 1, 2, 3), s.correct, rng.standard_normal(shape), "loss") for s in (a, b)]
    test = stats.ttest_rel(*(s.log_prob.mean(1) for s in losses))
    gap, reference = losses[0].paired_difference(losses[1]), test.confidence_interval(0.95)
    assert (gap.low, gap.high) == pytest.approx((reference.low, reference.high))
    assert a.paired_difference(a).value == 0
    with pytest.raises(TaskError, match="cannot pair accuracy"):
        a.paired_difference(PositionScores((0, 1, 2, 3), b.correct[:5], b.log_prob[:5]))


def test_scores_leave_the_model_in_eval_mode_and_without_gradients():
    model = build_model("llama").train()
    Scorer(model).score(random_split(2))
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def no_gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def no_cpu_memory() -> None:
    torch.empty(1 << 55)  # what the allocator itself says


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("fail", [no_gpu_memory, no_cpu_memory])
def test_batches_are_halved_until_they_fit(fail, packed):
    split = random_split(12)
    expected = Scorer(build_model("llama")).score(split, packed=packed)
    model = build_model("llama")
    memory = LimitedMemory(model, 130, fail)
    found = Scorer(model, batch_tokens=1000).score(split, packed=packed)
    np.testing.assert_array_equal(found.correct, expected.correct)
    np.testing.assert_allclose(found.log_prob, expected.log_prob, atol=1e-5)
    assert max(memory.seen) > 250  # tried
    assert memory.seen[-1] <= 130


@pytest.mark.parametrize(("first", "last"), [(1000, 64), (64, 64), (100, 64), (10, 10)])
@pytest.mark.parametrize("fail", [no_gpu_memory, no_cpu_memory])
def test_too_little_memory_for_a_row_is_said(fail, first, last):
    model = build_model("llama")
    LimitedMemory(model, 5, fail)
    with pytest.raises(
        TaskError, match=f"out of memory even with --batch-tokens {last}: use shorter prompts"
    ) as caught:
        Scorer(model, batch_tokens=first).score(random_split())
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_halving_says_what_worked():
    tried = []

    def attempt(tokens: int) -> str:
        tried.append(tokens)
        if tokens > 300:
            no_gpu_memory()
        return "done"

    assert with_halving(attempt, 2000) == ("done", 250)
    assert tried == [2000, 1000, 500, 250]
    assert with_halving(attempt, 7) == ("done", 7)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("x")])
def test_other_errors_pass_through(error):
    model = build_model("llama")

    def fail() -> None:
        raise error

    memory = LimitedMemory(model, 5, fail)
    with pytest.raises(type(error)) as caught:
        Scorer(model).score(random_split())
    assert caught.value is error
    assert len(memory.seen) == 1


@pytest.mark.parametrize("objective", ["log_prob", "accuracy"])
def test_utilisation_by_group_has_the_utilisation_as_its_mean(objective):
    rng = np.random.default_rng(0)
    scores = PositionScores((0, 3, 5, 9), rng.random((20, 4)) < 0.6, -rng.random((20, 4)))
    whole = scores.utilization((1, 2, 3)) if objective == "accuracy" else scores.log_prob_utilization((1, 2, 3))
    assert scores.utilization_by_group(objective, (1, 2, 3)).mean() == pytest.approx(whole)
    single = PositionScores((0,), scores.correct[:, :1], scores.log_prob[:, :1])
    np.testing.assert_array_equal(single.utilization_by_group("log_prob"), scores.log_prob[:, 0])


def test_the_vocabulary_is_found_where_the_embeddings_have_no_weight_of_their_own():
    model = build_tiny("kyutai_speech_to_text")  # its input embeddings are a module around a table
    assert not hasattr(model.get_input_embeddings(), "weight")
    rows = model.get_input_embeddings().embed_tokens.num_embeddings
    check_vocabulary(model, one_token(rows - 1).examples)
    with pytest.raises(TaskError, match=f"token id {rows} is outside the model's vocabulary of {rows}"):
        check_vocabulary(model, one_token(rows).examples)


def one_token(token: int) -> Split:
    return Split("test", 0, (0,), (Example((1,), (2,), (token,), 0, 0),))


def test_what_several_examples_ask_alike_is_run_once():
    model = build_model("llama")
    one = token_task().split("search", 1)
    (batch,), (doubled,) = (make_batches(model, times * one.examples, 10**6, packed=True) for times in (1, 2))
    assert doubled.inputs["input_ids"].shape == batch.inputs["input_ids"].shape
    assert doubled.examples == tuple(range(2 * len(one.examples)))
    hits, values = (
        t.tolist() for t in judge(answer_logits(model, doubled), doubled.gold, doubled.owner, len(doubled.examples))
    )
    alone = Scorer(model).score(one, packed=False)
    np.testing.assert_allclose(values, [*alone.log_prob[0], *alone.log_prob[0]], atol=1e-4)
    assert hits == [*alone.correct[0], *alone.correct[0]]
