"""Scores on models whose rotary embeddings keep a length do not depend on what ran before: against fresh models."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, VOCAB, build_model, length_dependent_ropes, logits
from peft import get_peft_model
from test_losses import windows
from test_scorer import one_by_one, random_split

from peft_layerrope import LayerRopeConfig
from peft_layerrope.comparison import compare
from peft_layerrope.comparison.candidates import candidate_on, parse_baseline
from peft_layerrope.experiments.attention import AttentionReader
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.searcher.evaluator import ModelEvaluator

BELOW = 16  # the trained window; all prompts are longer
LONG = torch.randint(1, VOCAB, (1, 120), generator=torch.Generator().manual_seed(0))
ROPES = length_dependent_ropes(BELOW)


@pytest.fixture(params=ROPES)
def model(request):
    rope = {"rope_theta": 10000.0, **ROPES[request.param]}
    return build_model("llama", rope_parameters=rope, max_position_embeddings=BELOW)


@pytest.fixture
def split():
    return random_split(4, (20, 31, 26, 12))


def test_each_example_scores_as_on_a_fresh_model(model, split):
    expected = [one_by_one(copy.deepcopy(model), example)[1] for example in split.examples]
    scorer = Scorer(model, batch_tokens=100)
    for _ in range(2):
        logits(model, LONG)
        found = scorer.score(split)
        np.testing.assert_allclose(found.log_prob.ravel(), expected, atol=2e-4)
    again = scorer.score(split)
    np.testing.assert_array_equal(again.log_prob, found.log_prob)


def test_the_same_model_under_two_names_in_any_order(model, split):
    candidates = [parse_baseline("none"), parse_baseline("uniform:1")]
    logits(model, LONG)
    for order in (candidates, candidates[::-1]):
        scores = compare(model, split, order, batch_tokens=100).scores
        np.testing.assert_array_equal(scores["no scaling"].log_prob, scores["uniform:1"].log_prob)


def test_a_dynamic_baseline(split):
    model = build_model("llama", max_position_embeddings=BELOW)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    fresh = build_model("llama", rope_parameters=rope, max_position_embeddings=BELOW)
    expected = [one_by_one(copy.deepcopy(fresh), example)[1] for example in split.examples]
    with candidate_on(model, parse_baseline("dynamic:2")) as scaled:
        logits(scaled, LONG)
        np.testing.assert_allclose(Scorer(scaled).score(split).log_prob.ravel(), expected, atol=2e-4)


def test_losses_and_written_answers(model, split):
    texts, scorer = windows(3, 40, 20), Scorer(model)
    asked = replace(split, examples=tuple(replace(e, answer_ids=(1, 2, 3)) for e in split.examples))
    before = scorer.bucket_losses(texts, 2).log_prob, scorer.write(asked)
    logits(model, LONG)
    np.testing.assert_array_equal(scorer.bucket_losses(texts, 2).log_prob, before[0])
    assert scorer.write(asked) == before[1]


def test_attention(model):
    prompt = LONG[0, :40].tolist()
    expected = AttentionReader(copy.deepcopy(model)).read(prompt)
    reader = AttentionReader(model)
    logits(model, LONG)
    assert torch.equal(reader.read(prompt), expected)


def test_a_vector_is_measured_the_same_twice(model, split):
    adapted = get_peft_model(model, LayerRopeConfig(inference_mode=True))
    longer = random_split(2, (90, 60))
    runner = ModelEvaluator(Scorer(adapted, batch_tokens=100))
    vector = (1.0, 1.5, 2.0, 1.0)[:NUM_LAYERS]
    first = runner.scores([vector], split)[0].to_plain()
    runner.scores([vector], longer)
    with adapted.disable_adapter():
        logits(adapted, LONG)
    assert runner.scores([vector], split)[0].to_plain() == first
