"""Frequencies in float32 whatever was cast, and independent of what ran before: against float64 and fresh models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from conftest import IS_OLDER, NUM_LAYERS, WINDOW, build_model, length_dependent_ropes, logits
from families import build_tiny, model_types
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peft_layerrope import LayerRopeConfig, demo_model_path, restore_baked, use_adapter, verify
from peft_layerrope.tuner.frequencies import inv_freq_names, own_frequencies, without_memory
from peft_layerrope.tuner.sites import find_stack
from peft_layerrope.tuner.tables import LayerScaling

SMALL = [1.002, 1.01, 1.0, 1.3]  # bfloat16 makes 1 of the first, and 1.0078 of the second
HALVES = [torch.bfloat16, torch.float16]

SCALED = length_dependent_ropes(WINDOW)


def roped(model: nn.Module, factors: list[float] | None = None, **fields: object) -> nn.Module:
    return get_peft_model(model, LayerRopeConfig(layer_factors=factors, **fields)).eval()


def tables_of(model: nn.Module, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    received = []
    handles = [
        layer.register_forward_pre_hook(
            lambda m, a, kwargs: received.append(kwargs["position_embeddings"]), with_kwargs=True
        )
        for layer in find_stack(model).layers
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return received


def cast_before(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return roped(model.to(dtype), SMALL)


def cast_after(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return roped(model, SMALL).to(dtype)


def cast_before_and_back(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return roped(model.to(dtype).float(), SMALL)


def cast_after_and_back(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return roped(model, SMALL).to(dtype).float()


def cast_between_two_adapters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    adapted = roped(model).to(dtype)
    adapted.add_adapter("second", LayerRopeConfig(layer_factors=SMALL))
    adapted.set_adapter("second")
    return adapted


def cast_when_baked(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return roped(model, SMALL).merge_and_unload().to(dtype)


def baked_after_the_cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return roped(model.to(dtype), SMALL).merge_and_unload()


def copied(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(roped(model.to(dtype), SMALL))


def pickled(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return pickle.loads(pickle.dumps(roped(model.to(dtype), SMALL)))


WAYS: list[Callable[[nn.Module, torch.dtype], nn.Module]] = [
    cast_before,
    cast_after,
    cast_before_and_back,
    cast_after_and_back,
    cast_between_two_adapters,
    cast_when_baked,
    baked_after_the_cast,
    copied,
    pickled,
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("way", WAYS)
def test_no_cast_rounds_a_factor(way, dtype, long_ids):
    received = tables_of(way(build_model("llama"), dtype), long_ids)
    positions = torch.arange(long_ids.shape[1]).double()
    for (cos, _), factor in zip(received, SMALL, strict=True):
        angles = positions[:, None] * 10_000.0 ** -(torch.arange(0, 16, 2).double() / 16) / factor
        eps = max(torch.finfo(cos.dtype).eps, 2e-5)  # float32's angles are that exact
        torch.testing.assert_close(cos[0, :, :8].double(), angles.cos(), atol=eps, rtol=0)


def test_autocast_rounds_no_factor(long_ids):
    expected = tables_of(roped(build_model("llama"), SMALL), long_ids)
    model = roped(build_model("llama"), SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        received = tables_of(model, long_ids)
    for table, other in zip(received, expected, strict=True):
        assert torch.equal(table[0].float(), other[0].to(table[0].dtype).float())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fields", [{}, {"rope_type": "linear"}, {"rope_type": "dynamic"}], ids=str)
@pytest.mark.parametrize("cast", ["before", "after"])
def test_all_ones_are_the_base_before_its_cast(cast, fields, dtype):
    ids = torch.randint(1, 100, (1, 120), generator=torch.Generator().manual_seed(0))
    expected = logits(AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=dtype), ids)  # casts no buffer
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    model = roped(model.to(dtype), **fields) if cast == "before" else roped(model, **fields).to(dtype)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("way", [cast_before, cast_after, cast_after_and_back])
def test_without_the_adapter_it_is_the_base_as_it_was_cast(way, dtype, long_ids):
    base = build_model("llama").to(dtype)
    expected = logits(base.float() if way is cast_after_and_back else base, long_ids)
    model = way(build_model("llama"), dtype)
    assert not torch.equal(logits(model, long_ids), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, long_ids), expected)
    with use_adapter(model, None):
        assert torch.equal(logits(model, long_ids), expected)
    twin = copy.deepcopy(model)
    twin.delete_adapter("default")
    assert torch.equal(logits(twin.base_model.model, long_ids), expected)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, long_ids), expected)
    assert unloaded.model.rotary_emb.inv_freq.dtype == base.model.rotary_emb.inv_freq.dtype


def test_a_model_that_is_filled_after_injection(ids):
    source = build_model("llama")
    with torch.device("meta"):
        empty = type(source)(source.config)
    model = roped(empty, SMALL).to_empty(device="cpu")
    model.get_base_model().load_state_dict(source.state_dict())
    assert torch.equal(logits(model, ids), logits(roped(source, SMALL), ids))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_baked_checkpoint_in_half_precision(dtype, tmp_path, ids):
    baked = cast_when_baked(build_model("llama"), dtype)
    baked.save_pretrained(tmp_path)
    loaded = restore_baked(type(baked).from_pretrained(tmp_path, dtype=dtype)).eval()
    assert torch.equal(logits(loaded, ids), logits(baked, ids))


def test_frequencies_that_somebody_has_changed_are_kept(ids):
    model = build_model("llama")
    model.model.rotary_emb.inv_freq *= 0.7
    expected = logits(model, ids)
    assert torch.equal(logits(roped(model), ids), expected)


def test_injection_in_inference_mode_leaves_a_gradient_possible(ids):
    with torch.inference_mode():
        model = roped(build_model("llama"), SMALL)
    wrapper = find_stack(model).wrappers()[0]
    assert not any(inv_freq.is_inference() for inv_freq in wrapper.traits.frequencies.values())


@pytest.mark.parametrize(
    "model_type",
    [
        *(
            "gemma3_text",
            "gemma4_text",
            "deepseek_v4",
            "molmo2",
            "granite_swa",
            "moshi",
            "mistral_large4",
            "llama4_text",
        ),
        *("gpt_oss", "apertus", "ernie4_5_vl_moe", "recurrent_gemma", "phi3", "dbrx", "qwen3_5_text", "hunyuan_vl"),
    ],
)
@pytest.mark.parametrize("dtype", HALVES)
def test_of_every_kind_of_family_a_cast_is_undone(model_type, dtype):
    if IS_OLDER and model_type == "recurrent_gemma":
        pytest.skip("transformers 5.0 has no code that makes its frequencies again")
    if model_type not in model_types():
        pytest.skip(f"this version of transformers has no {model_type}")
    model = build_tiny(model_type)
    before = [{n: getattr(s.rotary, n).clone() for n in inv_freq_names(s.rotary)} for s in find_stack(model).sites]
    model.to(dtype)
    for site, frequencies in zip(find_stack(model).sites, before, strict=True):
        found = own_frequencies(site.rotary, model)
        assert found.keys() == frequencies.keys()
        assert all(torch.equal(found[name], frequencies[name]) for name in found)


def test_a_module_whose_original_is_the_same_tensor(ids):
    model = build_model("llama")
    rotary = model.model.rotary_emb
    del rotary._buffers["original_inv_freq"]
    rotary.original_inv_freq = rotary.inv_freq  # as some versions and some custom code have it
    before = rotary.inv_freq.clone()
    rotary.inv_freq.mul_(0.7)
    assert torch.equal(own_frequencies(rotary, model)["inv_freq"], before * 0.7)
    assert torch.equal(rotary.inv_freq, before * 0.7)


def test_verify_sees_a_factor_that_was_rounded_away(monkeypatch):
    model = roped(build_model("llama").to(torch.bfloat16), [1.002] * NUM_LAYERS)
    assert verify(model).ok
    exact = LayerScaling.scale
    monkeypatch.setattr(LayerScaling, "scale", lambda self, v, *rest: exact(self, v.to(torch.bfloat16), *rest).float())
    for wrapper in find_stack(model).wrappers():
        wrapper._scaled.clear()
    assert verify(model).mismatched == list(range(NUM_LAYERS))


# Memory: transformers' `dynamic` keeps the frequencies of the longest prompt so far.


def build_scaled(name: str) -> PreTrainedModel:
    if name != "gemma3":
        return build_model("llama", rope_parameters={"rope_theta": 10000.0, **SCALED[name]})
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        "gemma3_text",
        **{**sizes, "head_dim": 16, "vocab_size": 99, "num_hidden_layers": 4, "max_position_embeddings": WINDOW},
        **{"sliding_window_pattern": 2, "initializer_range": 0.2, "rope_scaling": SCALED["dynamic"]},
    )
    return AutoModelForCausalLM.from_config(config).eval()


LENGTHS = (90, 128, 100, WINDOW, WINDOW + 1, 40, 128, WINDOW)


def histories(model: nn.Module, prompts: torch.Tensor) -> list[torch.Tensor]:
    return [logits(model, prompts[:, :length]) for length in LENGTHS]


@pytest.mark.parametrize("name", [*SCALED, "gemma3"])
def test_an_adapter_and_an_unscaled_model_remember_nothing(name, long_ids):
    expected = [logits(build_scaled(name), long_ids[:, :length]) for length in LENGTHS]
    for found, fresh in zip(histories(roped(build_scaled(name)), long_ids), expected, strict=True):
        assert torch.equal(found, fresh)
    model = build_scaled(name)
    logits(model, long_ids[:, :100])
    state = copy.deepcopy(vars(model.model.rotary_emb))
    with without_memory(model):
        for found, fresh in zip(histories(model, long_ids), expected, strict=True):
            assert torch.equal(found, fresh)
    left = vars(model.model.rotary_emb)
    assert left.keys() == state.keys()
    assert all(torch.equal(left["_buffers"][name], buffer) for name, buffer in state["_buffers"].items())
    assert left["max_seq_len_cached"] == state["max_seq_len_cached"]
    assert not left["_forward_pre_hooks"]


@pytest.mark.parametrize("name", SCALED)
def test_an_adapter_leaves_the_models_own_memory_alone(name, long_ids):
    alone, model = build_scaled(name), build_scaled(name)
    logits(alone, long_ids[:, :100])
    logits(model, long_ids[:, :100])
    unloaded = roped(model, SMALL)
    histories(unloaded, long_ids)
    unloaded = unloaded.unload()
    assert torch.equal(logits(unloaded, long_ids[:, :80]), logits(alone, long_ids[:, :80]))


def test_verify_leaves_it_alone_too(long_ids):
    alone, model = build_scaled("dynamic"), build_scaled("dynamic")
    logits(alone, long_ids)
    logits(model, long_ids)
    adapted = roped(model, SMALL)
    assert verify(adapted).ok
    assert torch.equal(logits(adapted.unload(), long_ids[:, :80]), logits(alone, long_ids[:, :80]))
