"""A whole search on a tiny model: honest splits, reproducible, nothing left behind."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, VOCAB, build_model, logits
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from peft_layerrope import Example, SearchError, TaskError, TokenTask, UnsupportedModelError, search
from peft_layerrope.evaluation import score
from peft_layerrope.families import build_tiny

SMALL = {
    "population": 6,
    "generations": 2,
    "refine_evaluations": 12,
    "search_groups": 4,
    "test_groups": 6,
    "progress": False,
}
ROWS = ["none", "uniform", "first_layers_alone", "first_and_rest", "random", "curve", "refined"]


def token_task(groups: int = 20, length: int = 24, vocab: int = VOCAB) -> TokenTask:
    rng = np.random.default_rng(0)
    examples = []
    for g in range(groups):
        context = tuple(rng.integers(1, vocab, length).tolist())
        for i, at in enumerate((2, length // 2, length - 3)):
            examples.append(Example(context, context[at : at + 1], context[at + 1 : at + 3], i, g))
    return TokenTask(examples)


@pytest.fixture(scope="module")
def result():
    return search(build_model("llama"), token_task(), **SMALL, seed=1)


def test_table_has_every_method_on_the_same_test_split(result):
    assert [row.name for row in result.table] == ROWS
    model = build_model("llama")
    split = token_task().split("test", SMALL["test_groups"])
    for row in result.table:
        peft_model = get_peft_model(model, result.settings.adapter_config(list(row.factors)))
        np.testing.assert_array_equal(row.scores.log_prob, score(peft_model, split).log_prob)
        peft_model.unload()


def test_controls_have_the_searchs_budget_or_exhaust_their_family(result):
    budget = result.evaluations["per_layer_search"]
    assert budget == result.table["refined"].evaluations
    assert result.table["random"].evaluations == budget
    for name in ("first_layers_alone", "first_and_rest"):
        assert result.table[name].exhaustive
    assert result.table["uniform"].exhaustive


def test_refinement_is_never_worse_on_the_search_split(result):
    assert result.table["refined"].fitness >= result.table["curve"].fitness >= result.table["uniform"].fitness
    assert result.config.layer_factors == list(result.table["refined"].factors)


def test_search_is_reproducible_and_depends_on_its_seed(result):
    torch.manual_seed(99)
    again = search(build_model("llama"), token_task(), **SMALL, seed=1)
    other = search(build_model("llama"), token_task(), **SMALL, seed=2)

    def outcome(r):
        return {key: value for key, value in r.to_dict().items() if key != "seconds"}

    assert outcome(again) == outcome(result)
    assert outcome(other)["history"] != outcome(result)["history"]


def test_leaving_the_controls_out_does_not_change_the_factors(result):
    alone = search(build_model("llama"), token_task(), **SMALL, seed=1, controls=False)
    assert alone.config.layer_factors == result.config.layer_factors
    assert [row.name for row in alone.table] == ["none", "uniform", "curve", "refined"]


def test_without_refinement_the_curve_is_chosen():
    found = search(build_model("llama"), token_task(), **SMALL, refine=False, controls=False)
    assert found.chosen == "curve"
    assert "refined" not in found.table


@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
@pytest.mark.parametrize("objective", ["log_prob", "accuracy"])
def test_other_rope_types_and_objectives(rope_type, objective):
    found = search(
        build_model("llama"),
        token_task(),
        **SMALL,
        controls=False,
        rope_type=rope_type,
        factor=2.0,
        objective=objective,
    )
    assert (found.config.rope_type, found.config.factor) == (rope_type, 2.0)
    assert found.config.original_max_position_embeddings == (64 if rope_type == "dynamic" else None)


def test_the_model_is_left_as_it_was(ids):
    model = build_model("llama")
    before, structure = logits(model, ids), repr(model)
    search(model, token_task(), **SMALL, controls=False)
    assert torch.equal(logits(model, ids), before)
    assert repr(model) == structure
    assert all(p.requires_grad for p in model.parameters())


def test_saved_folder_is_complete_and_loads(result, ids, tmp_path):
    result.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "search.json",
        "accuracy_by_position.png",
        "factors_by_depth.png",
    }
    expected = get_peft_model(build_model("llama"), result.settings.adapter_config(result.config.layer_factors))
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    assert torch.equal(logits(loaded, ids), logits(expected, ids))
    for plot in tmp_path.glob("*.png"):
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_report_says_what_it_stands_on(result, tmp_path):
    result.save(tmp_path)
    report = json.loads((tmp_path / "search.json").read_text())
    assert [row["name"] for row in report["table"]] == ROWS
    assert report["layer_factors"] == result.config.layer_factors
    assert [split["name"] for split in report["splits"]] == ["search", "test"]
    assert report["splits"][0]["fingerprint"] != report["splits"][1]["fingerprint"]
    assert report["settings"]["seed"] == 1
    refined = report["table"][-1]
    assert set(refined["average_accuracy_minus"]) == set(ROWS) - {"refined"}
    for gap, low, high in refined["average_accuracy_minus"].values():
        assert low <= gap <= high


def test_card_is_valid_and_shows_the_import(result, tmp_path):
    result.save(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model_relation == "adapter"
    assert "layer-rope" in card.data.tags
    assert "import peft_layerrope" in card.text
    assert card.data.eval_results[0].metric_value == round(result.table["refined"].scores.average().value, 4)


def test_a_shared_kv_cache_is_refused_before_any_work():
    with pytest.raises(SearchError) as caught:
        search(build_tiny("gemma3n_text"), token_task(), **SMALL)
    assert str(caught.value) == (
        "layers [2, 3] of gemma3n_text attend to the keys of other layers (a shared KV cache) and need their factors, "
        "which no searcher keeps to yet. A LayerRopeConfig that keeps to it works."
    )


def test_errors_come_before_any_work():
    gpt2 = AutoConfig.for_model("gpt2", n_layer=2, n_embd=32, n_head=2, vocab_size=VOCAB)
    with pytest.raises(UnsupportedModelError):
        search(AutoModelForCausalLM.from_config(gpt2), token_task(), **SMALL)
    with pytest.raises(TaskError, match="split 'search' has 8 groups, 50 were asked for"):
        search(build_model("llama"), token_task(), search_groups=50)
    with pytest.raises(SearchError, match="distinct layer indices from 0 to 3"):
        search(build_model("llama"), token_task(), **SMALL, scaled_layers=(NUM_LAYERS,))
    with pytest.raises(TaskError, match="outside the model's vocabulary"):
        search(build_model("llama"), token_task(vocab=10 * VOCAB), **SMALL)
