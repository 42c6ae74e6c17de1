"""Each candidate against a model built that way from the start; and the model afterwards."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from conftest import FAMILIES, IS_OLDER, NUM_LAYERS, VOCAB, WINDOW, build_model, logits
from families import build_tiny
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from reference import hand_patched
from safetensors.torch import load_file, save_file

from peft_layerrope import AdapterMismatchError, InvalidConfigError, LayerRopeConfig, LayerRopeError, TaskError
from peft_layerrope.comparison.candidates import BASELINES, Candidate, candidate_on, parse_baseline
from peft_layerrope.tuner.artifacts import save_adapter

THETA = 10_000.0
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW}


def scored(model: torch.nn.Module, candidate: Candidate, ids: torch.Tensor) -> torch.Tensor:
    with candidate_on(model, candidate) as subject:
        return logits(subject, ids)


def trained_lora(folder, model: torch.nn.Module, **settings: object) -> None:
    """Saves a LoRA that changes something."""
    peft_model = get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"], **settings}))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    peft_model.save_pretrained(str(folder))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_linear_and_dynamic_are_those_of_transformers(family, ids, long_ids):
    for rope_type in ("linear", "dynamic"):
        rope = {"rope_type": rope_type, "factor": 2.0, "rope_theta": THETA}
        for prompt in (ids, long_ids):
            expected = logits(build_model(family, rope_parameters=rope), prompt)
            found = scored(build_model(family), parse_baseline(f"{rope_type}:2"), prompt)
            assert torch.equal(found, expected)
    assert not torch.equal(expected, logits(build_model(family), long_ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_yarn_is_that_of_transformers(family, ids, long_ids):
    model = build_model(family)
    own = model.config.rope_parameters
    twin = build_model(family, rope_parameters={**own, **YARN})
    for prompt in (ids, long_ids):
        expected = logits(twin, prompt)
        assert not torch.equal(expected, logits(model, prompt))
        assert torch.equal(scored(model, parse_baseline("yarn:4"), prompt), expected)


def test_uniform_and_first_and_rest_are_what_they_say(ids):
    for text, factors in (("uniform:1.5", [1.5] * NUM_LAYERS), ("first_and_rest:1.5,2", [1.5, 2.0, 2.0, 2.0])):
        expected = logits(hand_patched(build_model("llama"), factors), ids)
        torch.testing.assert_close(scored(build_model("llama"), parse_baseline(text), ids), expected, atol=1e-5, rtol=0)


def test_none_is_the_model_itself(ids):
    model = build_model("llama")
    with candidate_on(model, parse_baseline("none")) as subject:
        assert subject is model


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("none", "no scaling"),
        (" uniform:1.50 ", "uniform:1.5"),
        ("first_and_rest:1.5,2.0", "first_and_rest:1.5,2"),
        ("yarn:2", "yarn:2"),
    ],
)
def test_labels_are_canonical(text, label):
    assert parse_baseline(text).label == label


@pytest.mark.parametrize(
    "text",
    [
        *("", "ntk:2", "none:1", "uniform", "uniform:", "uniform:x", "uniform:1,2", "uniform:0"),
        *("first_and_rest:1", "linear:-2", "dynamic:inf", "dynamic:nan", "yarn:1", "yarn"),
    ],
)
def test_other_baselines_are_refused_with_the_known_ones(text):
    with pytest.raises(TaskError) as caught:
        parse_baseline(text)
    assert repr(text) in str(caught.value)
    assert all(example in str(caught.value) for example in BASELINES.values())


def test_a_factor_out_of_range_is_named():
    with pytest.raises(InvalidConfigError, match=r"layer_factors\[0\]=1000000000.0 must be at most 10000"):
        parse_baseline("uniform:1e9")


@pytest.fixture
def candidates(tmp_path):
    """One of every kind."""
    save_adapter(LayerRopeConfig(layer_factors=[1.0, 1.2, 1.4, 2.0]), tmp_path)
    trained_lora(tmp_path / "lora", build_model("llama"), modules_to_save=["lm_head"])
    return [
        *map(parse_baseline, BASELINES.values()),
        Candidate.of_config("given", LayerRopeConfig(layer_factors=[1.5] * NUM_LAYERS)),
        Candidate.of_adapter(str(tmp_path), "saved"),
        Candidate.of_adapter(str(tmp_path / "lora")),
    ]


def state_of(model: torch.nn.Module) -> dict:
    """What is to be as it was found: the modules themselves, their modes and hooks, weights and gradients."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "hooks": [dict(m._forward_pre_hooks) | dict(m._forward_hooks) for m in model.modules()],
        "parameters": [(n, id(p), p.requires_grad, p.tolist()) for n, p in model.named_parameters()],
        "attributes": set(vars(model)),
        "config": model.config.to_dict(),
    }


def test_the_model_is_as_it_was_found(candidates, ids):
    model = build_model("llama").train()
    model.model.norm.eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = copy.deepcopy(state_of(model))
    for candidate in candidates:
        with candidate_on(model, candidate) as subject:
            subject.eval()
            logits(subject, ids)
        assert state_of(model) == before, candidate
        with pytest.raises(IndexError), candidate_on(model, candidate) as subject:
            logits(subject.eval(), ids + VOCAB)
        assert state_of(model) == before, candidate


def test_every_candidate_differs_from_the_model(candidates, long_ids):
    model = build_model("llama")
    plain = logits(model, long_ids)
    for candidate in candidates[1:]:
        assert not torch.allclose(scored(model, candidate, long_ids), plain, atol=1e-3), candidate


def test_a_lora_is_what_peft_makes_of_it(tmp_path, ids):
    trained_lora(tmp_path, build_model("llama"))
    expected = logits(PeftModel.from_pretrained(build_model("llama"), str(tmp_path)), ids)
    assert torch.equal(scored(build_model("llama"), Candidate.of_adapter(tmp_path), ids), expected)


def test_identities_tell_candidates_apart_and_paths_do_not_matter(candidates, tmp_path):
    texts = [json.dumps(candidate.identity(), sort_keys=True) for candidate in candidates]
    assert len(set(texts)) == len(texts)
    shutil.copytree(tmp_path / "lora", tmp_path / "copy")
    copied = Candidate.of_adapter(tmp_path / "copy")
    assert (copied.label, copied.identity()) == ("copy", candidates[-1].identity())
    file = tmp_path / "copy" / "adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file)
    assert copied.identity() != candidates[-1].identity()


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_adapters_that_do_not_fit_are_refused_and_leave_nothing_behind(tmp_path):
    model = build_model("llama")
    before = copy.deepcopy(state_of(model))
    save_adapter(LayerRopeConfig(layer_factors=[1.5] * 5), tmp_path)
    trained_lora(tmp_path / "wide", build_model("llama", hidden_size=128))
    trained_lora(tmp_path / "shallow", build_model("llama", num_hidden_layers=2))
    trained_lora(tmp_path / "other", build_model("gpt_neox"), target_modules=["dense"])
    for name, error, message in (
        (".", AdapterMismatchError, "layer_factors has 5 entries, but llama has 4 decoder layers."),
        ("wide", LayerRopeError, "cannot load adapter"),
        ("shallow", LayerRopeError, "its weights do not fit this model's layers"),
        ("other", LayerRopeError, "cannot load adapter"),
    ):
        with pytest.raises(error, match=message), candidate_on(model, Candidate.of_adapter(tmp_path / name)):
            pytest.fail(f"{name} was put on")
        assert state_of(model) == before


def test_adapter_files_are_checked(tmp_path):
    save_adapter(LayerRopeConfig(layer_factors=[1.5] * 4), tmp_path)
    candidate = Candidate.of_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(AdapterMismatchError, match="disagree on 4 of 4"):
        candidate.identity()
    file.unlink()
    with pytest.raises(LayerRopeError, match=r"it has no adapter_model\.safetensors"):
        candidate.layer_rope(4)
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(build_model("llama"), prefix).save_pretrained(str(tmp_path))
    with pytest.raises(TaskError, match="PREFIX_TUNING adapter: its virtual tokens"):
        candidate.identity()


@pytest.mark.parametrize("baseline", ["yarn:2", "linear:2", "dynamic:2"])
def test_a_scaling_that_changes_more_than_the_rotation_is_refused(baseline):
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 50, "intermediate_size": 32}
    mla = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    rope = {"rope_type": "default", "rope_theta": THETA, "mscale_all_dim": 1.0}
    config = AutoConfig.for_model("deepseek_v3", **small, **mla, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config)
    message = r"changes more than the rotary embedding \(model.layers.0.self_attn.scaling\)"
    with pytest.raises(TaskError, match=message), candidate_on(model, parse_baseline(baseline)):
        pytest.fail("was put on")


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("phimoe", "phimoe"),  # recomputes its frequencies
        ("bamba", "does not change the frequencies"),
        ("ernie4_5_vl_moe", "cannot be put onto"),
        ("recurrent_gemma", "cannot be put onto"),  # has no trained window
    ],
)
def test_yarn_is_refused_where_it_would_do_nothing_or_fail(family, message):
    if IS_OLDER and family == "bamba":
        pytest.skip("in transformers 5.0 bamba's frequencies follow its rope type")
    with pytest.raises(LayerRopeError, match=message), candidate_on(build_tiny(family), parse_baseline("yarn:2")):
        pytest.fail("was put on")


def test_yarn_is_refused_on_an_adapter():
    model = get_peft_model(build_model("llama"), LayerRopeConfig(layer_factors=[1.0] * 4))
    with pytest.raises(TaskError, match="cannot be put onto"):
        candidate_on(model, parse_baseline("yarn:2")).__enter__()
