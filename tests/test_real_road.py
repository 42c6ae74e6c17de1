"""The main road on a real pretrained model: what it writes, by which tokens, a few steps of search, save and load.

SmolLM2 answers little but the first position, and less the more pairs there are: four leave something to measure.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_layerrope import KeyValueRetrieval, LayerRopeConfig, search
from peft_layerrope.comparison.candidates import Candidate, candidate_on
from peft_layerrope.scoring.preflight import TaskError, find_difficulty, preflight, with_targets
from peft_layerrope.scoring.scorer import Scorer

SETTINGS = {"steps": 1, "test_groups": 2, "preflight_groups": 3, "progress": False}


def task_of(tokenizer, num_keys: int = 4, max_new_tokens: int = 12, **settings) -> KeyValueRetrieval:
    settings |= {"num_positions": 3, "keys": "syllables", "max_new_tokens": max_new_tokens, "chat_template": False}
    return KeyValueRetrieval(tokenizer, num_keys=num_keys, **settings)


def by_plain_generate(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """A loop of its own: text in, text out."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
        )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_written_answers_are_those_of_a_plain_generate_loop(smollm2_model, smollm2_tokenizer):
    task = task_of(smollm2_tokenizer)
    split, prompts = task.split("test", 3), task.prompts("test", 3)
    found = Scorer(smollm2_model).generate(split)
    expected = [
        prompt.answers[0] in by_plain_generate(smollm2_model, smollm2_tokenizer, prompt.text, 12) for prompt in prompts
    ]
    assert 0 < sum(expected) < len(expected)
    assert found.correct.flatten().tolist() == expected


def test_targets_are_what_the_model_writes_and_make_likelihood_agree_with_writing(smollm2_model, smollm2_tokenizer):
    task, scorer = task_of(smollm2_tokenizer), Scorer(smollm2_model)
    found = preflight(scorer, task, num_groups=4)
    assert found.targets.opening == ' "'
    bare = task.split("test", 6)
    split = with_targets(bare, found, task)
    scores = scorer.generate(split)
    assert np.mean(scores.written.forced == scores.written.strict) >= 0.9
    # without the opening the answer stands where the model writes a quote
    assert not scorer.score(bare).correct.any()
    assert scores.log_prob.mean() > scorer.score(bare).log_prob.mean() + 1


def test_a_factor_that_hurts_shows_in_writing_and_in_likelihood(smollm2_model, smollm2_tokenizer):
    task, scorer = task_of(smollm2_tokenizer), Scorer(smollm2_model)
    found = preflight(scorer, task, num_groups=4)
    split = with_targets(task.split("test", 4), found, task)
    before = scorer.generate(split)
    with candidate_on(smollm2_model, Candidate.of_config("hurts", LayerRopeConfig(layer_factors=[2.0] * 30))) as hurt:
        scorer.model = hurt
        after = scorer.generate(split)
    assert after.correct.mean() < before.correct.mean()
    assert after.log_prob.mean() < before.log_prob.mean() - 1


def test_search_saves_an_adapter_that_peft_loads(smollm2_model, smollm2_tokenizer, smollm2, tmp_path):
    result = search(smollm2_model, task_of(smollm2_tokenizer), folder=tmp_path / "run", **SETTINGS)
    result.save_pretrained(tmp_path / "adapter")
    report = json.loads((tmp_path / "adapter" / "search.json").read_text())
    assert report["preflight"]["targets"]["opening"] == ' "'
    test = next(split for split in report["splits"] if split["name"] == "test")
    assert test["targets"]["agreeing"] >= 3
    assert report["table"][0]["test"]["mean_answer_tokens"] > 1
    texts = (tmp_path / "run" / "preflight.json").read_text()
    question = task_of(smollm2_tokenizer).split("search", 1).examples[0].question
    assert question in texts
    assert question not in json.dumps(report)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    split = task_of(smollm2_tokenizer).split("test", 2)
    again = Scorer(loaded).generate(split)
    np.testing.assert_array_equal(again.correct, result.table[result.chosen].scores.correct)


def test_a_model_that_never_answers_is_refused_with_what_it_wrote(smollm2_model, smollm2_tokenizer, tmp_path):
    task = task_of(smollm2_tokenizer, num_keys=60, max_new_tokens=8)
    with pytest.raises(TaskError) as caught:
        search(smollm2_model, task, folder=tmp_path / "run", **SETTINGS)
    found = preflight(Scorer(smollm2_model), task, num_groups=3)
    assert all(sample["answers"][0] in str(caught.value) for sample in found.samples)
    assert "num_keys" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_difficulty_that_is_found_leaves_something_to_mend(smollm2_model, smollm2_tokenizer):
    task = task_of(smollm2_tokenizer, num_keys=12, max_new_tokens=8)
    curve: dict[int, float] = {}
    found = find_difficulty(Scorer(smollm2_model), task, num_groups=3, tell=curve.__setitem__)
    assert 0.4 <= curve[found.num_items] <= 0.9
    assert 3 <= found.num_items <= 12
