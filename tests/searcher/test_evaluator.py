"""The evaluator against plain scoring of a fresh model."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from conftest import NUM_LAYERS, build_model
from fakes import LimitedMemory, token_task
from peft import PeftModel, get_peft_model
from tiny_tokenizer import tiny_bpe
from transformers import PreTrainedModel

from peft_layerrope import LayerRopeConfig, Split, TaskError
from peft_layerrope.scoring.batching import tokens_run
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.searcher.evaluator import (
    ModelEvaluator,
    densely_asked,
    fitness_by_context,
    probes,
    shortened,
)
from peft_layerrope.searcher.space import Factors
from peft_layerrope.tasks.kv import KeyValueMix, KeyValueRetrieval

ROPE = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 1.7},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16},
}


def random_vectors(count: int, seed: int = 0, num_layers: int = NUM_LAYERS) -> list[Factors]:
    rng = random.Random(seed)
    return [tuple(rng.choice((1.0, 1.5, 2.0)) for _ in range(num_layers)) for _ in range(count)]


def split(name: str = "search", groups: int = 2) -> Split:
    return token_task().split(name, groups)


def with_adapter(base: PreTrainedModel, **fields: object) -> PeftModel:
    return get_peft_model(base, LayerRopeConfig(task_type="CAUSAL_LM", inference_mode=True, **fields)).eval()


def evaluator(model: PeftModel, batch_tokens: int = 100) -> ModelEvaluator:
    return ModelEvaluator(Scorer(model, batch_tokens=batch_tokens))


@pytest.mark.parametrize("rope_type", ROPE)
def test_scores_are_those_of_a_fresh_model_in_the_order_of_the_request(rope_type):
    vectors = random_vectors(6)
    runner = evaluator(with_adapter(build_model("llama"), **ROPE[rope_type]))
    found = runner.scores(vectors + vectors[:2], split())
    for vector, scores in zip(vectors + vectors[:2], found, strict=True):
        fresh = with_adapter(build_model("llama"), **ROPE[rope_type], layer_factors=list(vector))
        np.testing.assert_allclose(scores.log_prob, Scorer(fresh).score(split()).log_prob, rtol=1e-4)
    assert runner.scores([], split()) == []


def test_the_fitness_is_the_mean_probability_of_a_contexts_targets():
    model = with_adapter(build_model("llama"))
    (scores,) = evaluator(model).scores(random_vectors(1), split(groups=4))
    expected = [np.exp(row).mean() for row in Scorer(model).score(split(groups=4)).log_prob]
    np.testing.assert_allclose(fitness_by_context(scores), expected, rtol=1e-4)


def test_running_out_of_memory_halves_the_batches_for_good():
    vectors, examples = random_vectors(4), split(groups=8)
    expected = evaluator(with_adapter(build_model("llama")), 1000).scores(vectors, examples)
    model = with_adapter(build_model("llama"))
    memory = LimitedMemory(model.get_base_model(), 120)
    runner = evaluator(model, 1000)
    for one, other in zip(runner.scores(vectors, examples), expected, strict=True):
        np.testing.assert_allclose(one.log_prob, other.log_prob, atol=1e-5)
    assert runner.scorer.batch_tokens == 125
    memory.seen.clear()
    runner.scores(vectors, examples)
    assert max(memory.seen) <= 120


def test_too_little_memory_for_a_row_is_said():
    model = with_adapter(build_model("llama"))
    LimitedMemory(model.get_base_model(), 10)
    with pytest.raises(TaskError, match="out of memory even with --batch-tokens 64"):
        evaluator(model).scores(random_vectors(2), split())


def test_contexts_of_a_mix_are_asked_at_many_more_positions():
    task = KeyValueMix(tiny_bpe(), length=2600, num_positions=3)
    few, many = task.split("search", 4), densely_asked(task, "search", 4)
    assert len(many.positions) >= 8 * len(few.positions)
    assert set(few.positions) < set(many.positions)
    asked = {(e.context_ids, e.query_ids, e.answer_ids) for e in many.examples}
    assert {(e.context_ids, e.query_ids, e.answer_ids) for e in few.examples} < asked


def test_a_plan_knows_that_contexts_of_a_mix_differ_in_length():
    tokenizer = tiny_bpe()
    task = KeyValueMix(tokenizer, length=2600, num_positions=3)
    longest, typical, tested = probes(task)
    contexts = [densely_asked(task, "search", 9).part([number]) for number in range(9)]

    def tokens(one):  # a context and its different questions
        return len(one.examples[0].context_ids) + sum(map(len, {e.asked_ids + e.answer_ids[:-1] for e in one.examples}))

    assert longest.max_tokens == max(one.max_tokens for one in contexts)
    distances = [abs(tokens(one) - np.mean([tokens(one) for one in contexts])) for one in contexts]
    assert abs(tokens(typical) - np.mean([tokens(one) for one in contexts])) == min(distances)
    assert tested.positions == tuple(task.positions)
    assert {example.group for example in tested.examples} == {example.group for example in typical.examples}
    assert probes(token_task()) == 3 * (densely_asked(token_task(), "search", 1),)


@pytest.mark.parametrize("moved", [False, True], ids=["one context is asked much", "the asked pair moves"])
def test_a_shortened_split_keeps_its_beginning_and_as_many_different_contexts(tmp_path, moved):
    task = KeyValueRetrieval(tiny_bpe(), num_keys=40)
    if moved:
        path = tmp_path / "pairs.jsonl"
        records = [
            list(json.loads(p.text[p.text.index("{") : p.text.index("}") + 1]).items()) for p in task.prompts("test", 8)
        ]
        lines = [{"ordered_kv_records": pairs, "key": pairs[3][0], "value": pairs[3][1]} for pairs in records[::5]]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        task = KeyValueRetrieval(tiny_bpe(), data=path)
    long = task.split("search", 2)
    short = shortened(long, long.max_tokens // 3)
    assert abs(short.max_tokens - long.max_tokens // 3) <= 10  # contexts differ by some tokens

    def numbers(split):
        contexts = [example.context_ids for example in split.examples]
        return [contexts.index(context) for context in contexts]

    assert numbers(short) == numbers(long)
    assert (len(set(numbers(long))) > 2) == moved
    for one, other in zip(short.examples, long.examples, strict=True):
        assert one.context_ids[:16] == other.context_ids[:16]
        assert (one.query_ids, one.answer_ids) == (other.query_ids, other.answer_ids)
    distinct = {example.context_ids for example in long.examples}
    asked = {(e.context_ids, e.query_ids + e.answer_ids) for e in long.examples}
    assert tokens_run(long.examples) == sum(map(len, distinct)) + sum(len(tokens) - 1 for _, tokens in asked)
