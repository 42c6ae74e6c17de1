"""Exported checkpoints, opened by transformers alone, against the adapter on models of many families."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import IS_OLDER, NUM_LAYERS, VOCAB, build_model, logits
from families import build_tiny
from peft import get_peft_model
from scipy.special import rel_entr
from test_rope_scaling import gemma3
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from typer.testing import CliRunner

from peft_layerrope import AdapterMismatchError, LayerRopeConfig, LayerRopeError, demo_model_path
from peft_layerrope.cli import app
from peft_layerrope.serving import export as module
from peft_layerrope.serving.export import export
from peft_layerrope.tuner.artifacts import save_adapter

FACTORS = [1.0, 1.3, 2.0, 1.6]
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "layer_factors": FACTORS, "target_length": 128}
PLAIN = {"layer_factors": FACTORS}
UNIFORM = {"layer_factors": [1.5] * NUM_LAYERS}
TWO = {"layer_factors": [1.0, 2.0, 2.0, 1.0]}
BIASED = {"attention_bias": True}

GOOD = [
    ("granite-swa", "llama", DYNAMIC, {}),
    ("granite-swa", "llama", DYNAMIC, BIASED),
    ("granite-swa", "llama", DYNAMIC, {"head_dim": 32}),
    ("granite-swa", "llama", DYNAMIC, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}),
    ("granite-swa", "llama", UNIFORM, {"tie_word_embeddings": True}),
    ("granite-swa", "mistral", DYNAMIC, {"sliding_window": None}),
    ("granite-swa", "qwen2", DYNAMIC, {}),
    ("mellum", "qwen3", TWO, {}),
    ("mellum", "qwen3", {**TWO, "rope_type": "linear", "factor": 2.0}, {}),
    ("mellum", "qwen3", UNIFORM, {"attention_bias": True}),
    ("layer-types", "llama", UNIFORM, {}),
    ("layer-types", "gpt_neox", {**DYNAMIC, "layer_factors": [2.0] * NUM_LAYERS}, {}),
    ("remote-code", "llama", PLAIN, {}),
    ("remote-code", "llama", {**DYNAMIC, "target_length": None}, {}),
    ("remote-code", "qwen3", DYNAMIC, {}),
    ("remote-code", "gemma2", {**PLAIN, "rope_type": "linear", "factor": 1.5}, {}),
]
BAD = [
    ("granite-swa", "llama", PLAIN, "[1, 2, 3]"),
    ("granite-swa", "qwen3", DYNAMIC, "qwen3"),
    ("mellum", "qwen3", PLAIN, "[2, 3]"),
    ("mellum", "llama", TWO, "llama"),
    ("layer-types", "llama", TWO, "[1, 2]"),
]


def needs(form: str) -> None:
    family = {"granite-swa": "granite_swa", "mellum": "mellum"}.get(form)
    if family is not None and family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")


def reopened(folder, form: str):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=form == "remote-code", attn_implementation="eager"
    ).eval()


def tokens(model, ids) -> list[int]:
    asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(input_ids=ids, **asked).tolist()


@pytest.mark.parametrize(("form", "family", "fields", "overrides"), GOOD)
def test_transformers_alone_answers_as_the_adapter_does(
    tmp_path, demo_tokenizer, long_ids, form, family, fields, overrides
):
    needs(form)
    if IS_OLDER and family == "gpt_neox":
        pytest.skip("an older transformers opens it otherwise, and the export says so and is not kept")
    config = LayerRopeConfig(**fields)
    export(build_model(family, **overrides), demo_tokenizer, config, form, tmp_path / "out")
    found = reopened(tmp_path / "out", form)
    adapter = get_peft_model(build_model(family, attn_implementation="eager", **overrides), config).eval()
    wanted = logits(adapter, long_ids)
    torch.testing.assert_close(logits(found, long_ids), wanted, atol=1e-3, rtol=0)
    assert (logits(adapter.unload(), long_ids) - wanted).abs().max() > 0.1  # the factors do something
    adapter = get_peft_model(build_model(family, **overrides), config).eval()
    assert tokens(found, long_ids[:1, :100]) == tokens(adapter, long_ids[:1, :100])


@pytest.mark.parametrize(("form", "family", "fields", "told"), BAD)
def test_what_a_form_cannot_say_is_refused_with_the_layers(tmp_path, demo_tokenizer, form, family, fields, told):
    needs(form)
    with pytest.raises(AdapterMismatchError) as caught:
        export(build_model(family), demo_tokenizer, LayerRopeConfig(**fields), form, tmp_path / "out")
    assert told in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_neox"])
def test_weights_that_have_other_names_on_disk_reach_the_exported_model(tmp_path, demo_tokenizer, family):
    """transformers knows those names of the family's type, and the export has a type of its own."""
    model = build_tiny(family).eval()
    config = LayerRopeConfig(layer_factors=[1.0, *[1.5] * (model.config.num_hidden_layers - 1)])
    wanted = logits(get_peft_model(build_tiny(family), config).eval(), ids := torch.arange(3, 40)[None])
    export(model, demo_tokenizer, config, "remote-code", tmp_path / "out")
    torch.testing.assert_close(logits(reopened(tmp_path / "out", "remote-code"), ids), wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", ["gpt_oss", "falcon", "cohere"])
def test_tables_that_the_code_cannot_make_are_refused_before_weights_are_written(tmp_path, demo_tokenizer, family):
    model = build_tiny(family).eval()
    config = LayerRopeConfig(layer_factors=[1.5] * model.config.num_hidden_layers)
    with pytest.raises(AdapterMismatchError, match=family):
        export(model, demo_tokenizer, config, "remote-code", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fields", [{}, {"rope_type": "linear", "factor": 2.0}])
def test_sliding_and_full_layers_may_differ(tmp_path, demo_tokenizer, fields):
    model = gemma3()
    kinds = model.config.layer_types
    factors = [1.4 if kind == "sliding_attention" else 2.0 for kind in kinds]
    config = LayerRopeConfig(layer_factors=factors, **fields)
    ids = torch.randint(VOCAB, (1, 60), generator=torch.Generator().manual_seed(0))
    wanted = logits(get_peft_model(gemma3(), config).eval(), ids)
    export(model, demo_tokenizer, config, "layer-types", tmp_path / "out")
    torch.testing.assert_close(logits(reopened(tmp_path / "out", ""), ids), wanted, atol=1e-3, rtol=0)
    with pytest.raises(AdapterMismatchError):
        export(gemma3(), demo_tokenizer, config, "remote-code", tmp_path / "other")


def test_a_checkpoint_that_differs_is_not_written(tmp_path, demo_tokenizer, monkeypatch):
    monkeypatch.setitem(module.FORMATS, "layer-types", lambda model, config: (model.config, {}))
    with pytest.raises(LayerRopeError, match="differs"):
        export(build_model("llama"), demo_tokenizer, LayerRopeConfig(**PLAIN), "layer-types", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_divergence_between_two_adapters_is_that_of_the_formula(long_ids):
    configs = [LayerRopeConfig(layer_factors=factors) for factors in (FACTORS, [1.3, 1.3, 1.8, 1.8])]
    expected, found = (
        logits(get_peft_model(build_model("llama"), config).eval(), long_ids[:1]).double().softmax(-1).numpy()
        for config in configs
    )
    divergence = module.divergence_between(build_model("llama"), *configs, long_ids[:1].tolist())
    assert divergence == pytest.approx(rel_entr(expected, found).sum(-1).mean(), rel=1e-3)


def test_the_command_merges_factors_and_says_what_that_does(tmp_path):
    save_adapter(LayerRopeConfig(layer_factors=[1.5, 1.2, 1.5, 2.0, 1.0, 1.2]), tmp_path)
    out, asked = tmp_path / "out", ["--format", "remote-code", "--max-distinct", "2"]
    done = CliRunner().invoke(app, ["export", str(tmp_path), *asked, "--output", str(out)])
    assert done.exit_code == 0, done.output
    factors = json.loads((out / "config.json").read_text())["layer_rope_scaling"]["layer_factors"]
    upper, lower = (1.5 * 1.5 * 2.0) ** (1 / 3), (1.2 * 1.0 * 1.2) ** (1 / 3)
    assert factors == pytest.approx([upper, lower, upper, upper, lower, lower])
    assert "divergence 0.0 nats" not in done.output
    assert "nats" in done.output


def test_the_command_writes_a_model_that_transformers_opens(tmp_path):
    save_adapter(LayerRopeConfig(layer_factors=[1.5, 1.2, 1.5, 2.0, 1.0, 1.2]), tmp_path)
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", str(tmp_path), "--format", "remote-code", "--output", str(out)])
    assert done.exit_code == 0, done.output
    config = json.loads((out / "config.json").read_text())
    assert config["layer_rope_scaling"]["layer_factors"][3] == 2.0
    # by these names `transformers serve` and vLLM would load the model without its factors
    assert config["model_type"] not in CONFIG_MAPPING
    assert not hasattr(transformers, config["architectures"][0])
    demo = AutoModelForCausalLM.from_pretrained(demo_model_path()).eval()
    ids = torch.arange(4, 100)[None]
    wanted = logits(get_peft_model(demo, LayerRopeConfig(layer_factors=[1.5, 1.2, 1.5, 2.0, 1.0, 1.2])).eval(), ids)
    torch.testing.assert_close(logits(reopened(out, "remote-code"), ids), wanted, atol=1e-3, rtol=0)
