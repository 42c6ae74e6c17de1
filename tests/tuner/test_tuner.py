"""The tuner against transformers' own RoPE scaling, a float64 formula, and hand-patched models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import FAMILIES, NUM_LAYERS, VOCAB, WINDOW, build_model, logits
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from peft_layerrope import AdapterMismatchError, LayerRopeConfig, UnsupportedModelError

FACTORS = [1.0, 1.4, 2.0, 1.2]


def roped(model: nn.Module, factors: list[float] | None = None, **fields: object) -> nn.Module:
    return get_peft_model(model, LayerRopeConfig(layer_factors=factors, **fields)).eval()


def rotary_of(model: nn.Module) -> nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))


def record_tables(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each decoder layer's own forward receives, by hooks registered after the adapter's."""
    received: list[tuple[torch.Tensor, torch.Tensor]] = []
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == NUM_LAYERS)
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: received.append(kwargs["position_embeddings"]), with_kwargs=True
        )
    return received


def test_factor_one_is_bit_equal_to_the_base(family, ids):
    model = build_model(family)
    expected = logits(model, ids)
    assert torch.equal(logits(roped(model, [1.0] * NUM_LAYERS), ids), expected)


@pytest.mark.parametrize("factor", [1.5, 2.0, 4.0])
def test_uniform_linear_is_bit_equal_to_transformers(family, long_ids, factor):
    rope = {**build_model(family).config.rope_parameters, "rope_type": "linear", "factor": factor}
    expected = logits(build_model(family, rope_parameters=rope), long_ids)
    assert torch.equal(logits(roped(build_model(family), rope_type="linear", factor=factor), long_ids), expected)
    # a uniform layer factor on top of plain RoPE is the same thing
    assert torch.equal(logits(roped(build_model(family), [factor] * NUM_LAYERS), long_ids), expected)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_uniform_dynamic_agrees_with_transformers(family, long_ids, factor):
    rope = {**build_model(family).config.rope_parameters, "rope_type": "dynamic", "factor": factor}
    expected = logits(build_model(family, rope_parameters=rope), long_ids)
    actual = logits(roped(build_model(family), rope_type="dynamic", factor=factor), long_ids)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(actual, logits(build_model(family), long_ids), atol=1e-3)


def test_dynamic_inside_the_window_is_bit_equal_to_the_base(family, ids):
    expected = logits(build_model(family), ids)
    assert torch.equal(logits(roped(build_model(family), FACTORS, rope_type="dynamic", factor=2.0), ids), expected)


def test_dynamic_is_stateless(ids, long_ids):
    model = roped(build_model("llama"), FACTORS, rope_type="dynamic", factor=2.0)
    before = logits(model, ids)
    logits(model, long_ids)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("rope_type", ["default", "linear", "dynamic"])
def test_every_layer_receives_its_rotation_in_float64(family, long_ids, rope_type):
    model = build_model(family)
    inv_freq = rotary_of(model).inv_freq.double()
    factor = 1.0 if rope_type == "default" else 1.5
    peft_model = roped(model, FACTORS, rope_type=rope_type, factor=factor)
    received = record_tables(peft_model)
    logits(peft_model, long_ids)
    positions = torch.arange(long_ids.shape[1], dtype=torch.float64)
    assert len(received) == NUM_LAYERS
    for (cos, sin), s in zip(received, FACTORS, strict=True):
        if rope_type == "dynamic":
            f = factor * s
            alpha = f * long_ids.shape[1] / WINDOW - (f - 1)
            i = torch.arange(len(inv_freq), dtype=torch.float64)
            frequencies = inv_freq * alpha ** (-2 * i / (2 * len(inv_freq) - 2))
        else:
            frequencies = inv_freq / (factor * s)
        angles = positions[:, None] * frequencies
        expected = torch.cat([angles, angles], dim=-1)
        torch.testing.assert_close(cos[0].double(), expected.cos(), atol=2e-5, rtol=0)
        torch.testing.assert_close(sin[0].double(), expected.sin(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_a_factor_changes_exactly_its_layer_and_those_after(family, ids, layer):
    model = build_model(family)
    with torch.no_grad():
        base = model(ids, output_hidden_states=True).hidden_states
        factors = [1.7 if i == layer else 1.0 for i in range(NUM_LAYERS)]
        scaled = roped(model, factors)(ids, output_hidden_states=True).hidden_states
    for i in range(layer + 1):  # hidden_states[i] is the input of layer i
        assert torch.equal(base[i], scaled[i])
    for i in range(layer + 1, NUM_LAYERS + 1):
        assert not torch.equal(base[i], scaled[i])


@pytest.mark.parametrize("rope_type", ["yarn", "llama3", "linear", "longrope", "dynamic"])
def test_plain_scaling_sits_on_top_of_the_models_own_rope_type(ids, rope_type):
    rope: dict = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    if rope_type in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = WINDOW // 2
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model = build_model("llama", rope_parameters=rope)
    expected = logits(model, ids)
    assert torch.equal(logits(roped(model, [1.0] * NUM_LAYERS), ids), expected)
    halved = build_model("llama", rope_parameters=rope)
    logits(halved, ids)  # longrope picks its frequencies at the first call ...
    rotary = rotary_of(halved)
    rotary.rope_type = "default"  # ... and is kept from picking again
    rotary.inv_freq = rotary.inv_freq / 2
    scaled = roped(build_model("llama", rope_parameters=rope), [2.0] * NUM_LAYERS)
    assert torch.equal(logits(scaled, ids), logits(halved, ids))


@pytest.mark.parametrize("fields", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}])
def test_generate_with_cache_matches_transformers_beyond_the_window(fields):
    prompt = torch.randint(0, VOCAB, (2, WINDOW - 4), generator=torch.Generator().manual_seed(3))
    arguments = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    reference = build_model("llama", rope_parameters={**fields, "rope_theta": 10000.0})
    expected = reference.generate(prompt, **arguments)
    actual = roped(build_model("llama"), **fields).generate(input_ids=prompt, **arguments)
    assert torch.equal(actual, expected)


def test_generate_with_and_without_cache_agree():
    model = roped(build_model("llama"), FACTORS)
    prompt = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(4))
    arguments = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(input_ids=prompt, use_cache=True, **arguments)
    assert torch.equal(cached, model.generate(input_ids=prompt, use_cache=False, **arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_float32_frequencies(dtype, long_ids):
    model = roped(build_model("llama"), FACTORS)
    received = record_tables(model)
    logits(model, long_ids)
    exact = [cos.clone() for cos, _ in received]
    received.clear()
    model.to(dtype)
    logits(model, long_ids)
    for (cos, _), expected in zip(received, exact, strict=True):
        assert cos.dtype == dtype
        assert torch.equal(cos, expected.to(dtype))


def test_no_trainable_parameters_and_no_new_ones():
    base = build_model("llama")
    before = {name: p.shape for name, p in base.named_parameters()}
    model = roped(base, FACTORS)
    assert model.get_nb_trainable_parameters()[0] == 0
    assert {n.removeprefix("base_model.model."): p.shape for n, p in model.named_parameters()} == before


def test_disable_adapter_gives_the_base_and_comes_back(family, ids):
    model = build_model(family)
    expected = logits(model, ids)
    peft_model = roped(model, FACTORS)
    scaled = logits(peft_model, ids)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, ids), expected)
    assert torch.equal(logits(peft_model, ids), scaled)


def test_several_adapters_switch_and_delete(ids):
    expected = {
        "first": logits(roped(build_model("llama"), FACTORS), ids),
        "second": logits(roped(build_model("llama"), [2.0] * NUM_LAYERS), ids),
    }
    model = get_peft_model(build_model("llama"), LayerRopeConfig(layer_factors=FACTORS), adapter_name="first")
    model.add_adapter("second", LayerRopeConfig(layer_factors=[2.0] * NUM_LAYERS))
    assert torch.equal(logits(model, ids), expected["first"])
    for name in ("second", "first", "second"):
        model.set_adapter(name)
        assert torch.equal(logits(model, ids), expected[name])
    model.delete_adapter("second")
    assert torch.equal(logits(model, ids), expected["first"])


def test_two_adapters_cannot_be_active_together():
    model = get_peft_model(build_model("llama"), LayerRopeConfig(layer_factors=FACTORS), adapter_name="a")
    model.add_adapter("b", LayerRopeConfig(layer_factors=FACTORS))
    with pytest.raises(ValueError, match=r"adapters \['a', 'b'\] cannot be active together"):
        model.base_model.set_adapter(["a", "b"])


def test_unload_restores_the_model(family, ids):
    model = build_model(family)
    expected = logits(model, ids)
    structure = repr(model)
    trainable = [p.requires_grad for p in model.parameters()]
    unloaded = roped(model, FACTORS).unload()
    assert unloaded is model
    assert repr(model) == structure
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(roped(model, [1.0] * NUM_LAYERS), ids), expected)  # and it can be adapted again


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(ids, clone):
    model = roped(build_model("llama"), FACTORS)
    expected = logits(model, ids)
    twin = clone(model)
    model.base_model.set_layer_factors([1.0] * NUM_LAYERS)
    assert torch.equal(logits(twin, ids), expected)


def test_set_layer_factors_equals_a_fresh_adapter(ids):
    model = roped(build_model("llama"))
    model.base_model.set_layer_factors(FACTORS)
    assert torch.equal(logits(model, ids), logits(roped(build_model("llama"), FACTORS), ids))
    assert model.peft_config["default"].layer_factors == FACTORS


def test_wrong_number_of_factors_names_both_and_changes_nothing(ids):
    model = build_model("llama")
    expected = logits(model, ids)
    with pytest.raises(AdapterMismatchError) as caught:
        roped(model, [1.5] * 3)
    assert str(caught.value) == "layer_factors has 3 entries, but llama has 4 decoder layers."
    assert torch.equal(logits(model, ids), expected)


def test_a_layer_that_stands_at_two_places_is_refused():
    """It has one table at a time."""
    model = build_model("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(UnsupportedModelError, match="several places"):
        roped(model)


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("gpt2", {"n_layer": 2, "n_embd": 32, "n_head": 2}, "no rotary embedding with an `inv_freq` was found"),
        ("gptj", {"n_layer": 2, "n_embd": 32, "n_head": 2, "rotary_dim": 8}, "no rotary embedding with an `inv_freq`"),
        ("phimoe", FAMILIES["llama"], "does not rotate by the `inv_freq` it is given"),
    ],
)
def test_unsupported_models_raise_with_their_name_and_reason(model_type, fields, reason):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    with pytest.raises(UnsupportedModelError, match=rf"^{model_type}: .*{reason}"):
        roped(model)


def test_dynamic_on_a_dynamic_model_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(AdapterMismatchError, match="both depend on the length"):
        roped(build_model("llama", rope_parameters=rope), rope_type="dynamic", factor=2.0)


def test_a_bypassed_hook_fails_loudly(ids):
    model = roped(build_model("llama"), FACTORS)
    model.get_base_model().model.layers[2]._forward_pre_hooks.clear()
    with pytest.raises(Exception, match="its forward pre-hook was removed or bypassed"):
        logits(model, ids)
