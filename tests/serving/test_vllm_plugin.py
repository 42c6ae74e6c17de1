"""Rotary modules as vLLM has them: each layer gets its own, or loading stops with the layer's name."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from conftest import NUM_LAYERS, build_model
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from peft_layerrope import AdapterMismatchError, LayerRopeConfig, LayerRopeError, UnsupportedModelError
from peft_layerrope.base_model import empty_model
from peft_layerrope.serving import vllm_plugin
from peft_layerrope.serving.vllm_plugin import scale_layers, scale_model
from peft_layerrope.tuner.artifacts import save_adapter
from peft_layerrope.tuner.injection import layer_frequencies

FACTORS = [1.0, 1.3, 1.3, 2.0]
HEADS, HEAD_DIM, HIDDEN, WINDOW = 4, 16, 64, 40
BASE = 10000.0


class Rotary(nn.Module):
    """Stands for vLLM's `RotaryEmbedding`, with what matters: one table, and a bound method that is looked up once."""

    def __init__(self, length: int = 64, base: float = BASE, size: float = 1.0) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(length).float(), 1 / base ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
        self.register_buffer("cos_sin_cache", torch.cat([angles.cos(), angles.sin()], -1) * size, persistent=False)
        self._forward_method = self.forward_native

    def forward(self, *args, **kwargs):
        return self._forward_method(*args, **kwargs)

    def forward_native(self, positions, query, key=None):
        cos, sin = self.cos_sin_cache[positions][None].chunk(2, -1)
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        split = [t.view(1, len(positions), -1, HEAD_DIM) for t in (query, key)]
        return tuple(t.reshape(query.shape) for t in apply_rotary_pos_emb(*split, cos, sin, unsqueeze_dim=2))


class Deaf(Rotary):
    """Rotates by a table that nobody can replace."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.cos_sin_cache.clone()]

    def forward_native(self, positions, query, key=None):
        own, self.cos_sin_cache = self.cos_sin_cache, self.kept[0]
        try:
            return super().forward_native(positions, query, key)
        finally:
            self.cos_sin_cache = own


class Attention(nn.Module):
    def __init__(self, rotary: nn.Module | None) -> None:
        super().__init__()
        self.qk_proj = nn.Linear(HIDDEN, 2 * HEADS * HEAD_DIM)
        self.rotary_emb = rotary

    def forward(self, positions, hidden_states):
        query, key = self.qk_proj(hidden_states).chunk(2, -1)
        return (query, key) if self.rotary_emb is None else self.rotary_emb(positions, query, key)


class Unused(Attention):
    def forward(self, positions, hidden_states):
        return self.qk_proj(hidden_states).chunk(2, -1)


def tiny(*rotaries: nn.Module | None, attention: type[Attention] = Attention) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"self_attn": attention(rotary)}) for rotary in rotaries)
    return model


def settings(first: int = 0, last: int = NUM_LAYERS, **values: object) -> SimpleNamespace:
    given = {
        "max_model_len": WINDOW,
        "dtype": torch.float32,
        "get_hidden_size": lambda: HIDDEN,
        "get_layers_start_end_indices": lambda _: (first, last),
    }
    return SimpleNamespace(**{**given, **values})


def frequencies(factors: list[float] | None = None, **fields: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    config = build_model("llama", max_position_embeddings=64).config
    return layer_frequencies(LayerRopeConfig(layer_factors=factors or FACTORS, **fields), empty_model(config))


def rotated(model: nn.Module, layer: int, positions: torch.Tensor) -> torch.Tensor:
    return torch.stack(model.layers[layer]["self_attn"](positions, torch.ones(len(positions), HIDDEN)))


@torch.no_grad()
def test_each_layer_rotates_by_its_own_factor():
    shared = Rotary()
    before = shared.cos_sin_cache.clone()
    model = tiny(*[shared] * NUM_LAYERS)
    tables = scale_layers(model, frequencies(), settings(), None)
    positions = torch.tensor([0, 1, 7, WINDOW - 1])
    for layer, factor in enumerate(FACTORS):
        attention = model.layers[layer]["self_attn"]
        query, key = attention.qk_proj(torch.ones(len(positions), HIDDEN)).double().chunk(2, -1)
        angles = torch.outer(positions.double() / factor, BASE ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM))
        cos, sin = (torch.cat([part, part], -1)[None] for part in (angles.cos(), angles.sin()))
        split = [t.view(1, len(positions), HEADS, HEAD_DIM) for t in (query, key)]
        expected = apply_rotary_pos_emb(*split, cos, sin, unsqueeze_dim=2)
        expected = torch.stack([t.reshape(query.shape) for t in expected])
        torch.testing.assert_close(rotated(model, layer, positions).double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(shared.cos_sin_cache, before)  # other models have it from vLLM's own cache
    rotaries = [layer["self_attn"].rotary_emb for layer in model.layers]
    assert rotaries[0] is shared  # nothing to change
    assert rotaries[1] is rotaries[2]
    assert [len(table) for table in tables] == [64, WINDOW, WINDOW]


def test_a_part_of_the_layers_is_scaled_and_the_rest_is_elsewhere():
    model = tiny(None, None, Rotary(), Rotary())
    assert len(scale_layers(model, frequencies(), settings(2, 4), None)) == 2


def test_tables_keep_their_length_for_pictures_and_their_size_for_yarn():
    rotary = Rotary(size=1.2)
    rotary.mrope_section = [2, 3, 3]
    model = tiny(*[rotary] * NUM_LAYERS)
    scale_layers(model, frequencies([2.0] * NUM_LAYERS), settings(), None)
    table = model.layers[0]["self_attn"].rotary_emb.cos_sin_cache
    assert len(table) == 64
    torch.testing.assert_close(table[2], rotary.cos_sin_cache[1])


def test_dynamic_with_a_target_length_changes_the_base():
    asked = {"rope_type": "dynamic", "factor": 2.0, "target_length": 128, "original_max_position_embeddings": 64}
    model = tiny(*[Rotary() for _ in FACTORS])
    scale_layers(model, frequencies(**asked), settings(max_model_len=128), None)
    for layer, factor in enumerate(FACTORS):
        alpha = 1 + 2.0 * factor * (128 - 64) / 64
        exact = Rotary(128, base=BASE * alpha ** (HEAD_DIM / (HEAD_DIM - 2))).cos_sin_cache
        torch.testing.assert_close(model.layers[layer]["self_attn"].rotary_emb.cos_sin_cache, exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("rotaries", "attention", "told"),
    [
        ([Rotary(), None, Rotary(), Rotary()], Attention, "layer 1"),
        ([Rotary(), Rotary(), Rotary(base=5000.0), Rotary()], Attention, "layer 2"),
        ([Rotary(), Rotary(), Rotary(), Deaf()], Attention, "layer 3"),
        ([Rotary() for _ in FACTORS], Unused, "layer 0"),
    ],
    ids=["no rotary", "other frequencies", "other table in use", "not called"],
)
def test_a_layer_that_would_not_be_scaled_is_named(rotaries, attention, told):
    with pytest.raises(UnsupportedModelError, match=told):
        scale_layers(tiny(*rotaries, attention=attention), frequencies(), settings(), None)


def test_a_layer_without_rotation_may_have_a_factor_of_one():
    scale_layers(tiny(None, Rotary(), Rotary(), Rotary()), frequencies(), settings(), None)


def test_dynamic_needs_a_target_length():
    with pytest.raises(AdapterMismatchError, match="target_length"):
        frequencies(rope_type="dynamic", factor=2.0)


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


def loaded(hf_config, **settings_of_vllm: object) -> tuple[SimpleNamespace, SimpleNamespace]:
    model_config = settings(hf_config=hf_config, hf_overrides={}, runner_type="generate")
    given = {"additional_config": {}, "kv_transfer_config": None, "parallel_config": None}
    return SimpleNamespace(**{**given, **settings_of_vllm}), model_config


def test_without_factors_nothing_is_looked_at():
    scale_model(None, *loaded(None))


@needs_vllm
@pytest.mark.parametrize("count", [NUM_LAYERS - 1, NUM_LAYERS + 1])
def test_the_number_of_layers_has_to_be_the_models(tmp_path, count):
    save_adapter(LayerRopeConfig(layer_factors=[1.5] * count), tmp_path)
    with pytest.raises(AdapterMismatchError, match=str(count)):
        scale_model(None, *loaded(build_model("llama").config, additional_config={"layer_rope": str(tmp_path)}))


@needs_vllm
def test_keys_are_not_shared_with_other_processes(tmp_path):
    save_adapter(LayerRopeConfig(layer_factors=FACTORS), tmp_path)
    asked = {"additional_config": {"layer_rope": str(tmp_path)}, "kv_transfer_config": object()}
    with pytest.raises(LayerRopeError, match="kv_transfer_config"):
        scale_model(None, *loaded(build_model("llama").config, **asked))


@needs_vllm
def test_loaders_of_every_kind_scale_what_they_load(monkeypatch):
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class Loader(BaseModelLoader):
        download_model = load_weights = None

        def load_model(self, vllm_config, model_config, prefix=""):
            return "a model"

    seen = []
    monkeypatch.setattr(BaseModelLoader, "__init__", BaseModelLoader.__init__)
    monkeypatch.setattr(vllm_plugin, "scale_model", lambda *given: seen.append(given))
    vllm_plugin.register.__wrapped__()
    target, draft = SimpleNamespace(runner_type="generate"), SimpleNamespace(runner_type="draft")
    for model_config in (target, draft):
        assert Loader(LoadConfig()).load_model(vllm_config=None, model_config=model_config) == "a model"
    assert seen == [("a model", None, target)]
