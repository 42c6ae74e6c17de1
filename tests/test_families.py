"""Every decoder family of the installed transformers: scaled right, or refused with a reason; never silently not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import IS_OLDER
from families import (
    NOT_BUILT,
    REFUSED,
    SUPPORTED,
    WRONG,
    build_tiny,
    main,
    model_types,
    tiny_inputs,
    try_family,
)
from peft import get_peft_model
from torch import nn

from peft_layerrope import AdapterMismatchError, LayerRopeConfig, UnsupportedModelError
from peft_layerrope.tuner import sites
from peft_layerrope.tuner.sites import find_stack
from peft_layerrope.tuner.tables import LayerScaling, LayerTableHook

KNOWN_SUPPORTED = (Path(__file__).parent / "supported_families.txt").read_text().split()
"""What `python tests/families.py` found with transformers 5.23. A family leaves this list only for a stated reason."""

NOT_BUILT_BY_OLDER = {"phi4_multimodal", "qwen2_5_omni", "qwen3_omni_moe", "zamba2"} if IS_OLDER else set()
"""Families whose configurations, as transformers 5.0 has them, make no tiny model; it lacks others altogether."""

NO_ROTARY = "no rotary embedding with an `inv_freq` was found, so there is no rotation to scale."


@pytest.mark.parametrize("model_type", model_types())
def test_every_family(model_type):
    trial = try_family(model_type)
    assert trial.status != WRONG, trial.reason
    if model_type in KNOWN_SUPPORTED and model_type not in NOT_BUILT_BY_OLDER:
        assert trial.status == SUPPORTED, trial.reason
    else:
        assert trial.reason or trial.status == SUPPORTED


def test_the_script_counts_and_names_what_it_tried(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["families.py", "llama", "gpt2", "smollm3", "nonesuch"])
    assert main() == 0
    shown = capsys.readouterr().out
    assert "2 supported, 1 refused, 1 not built" in shown
    assert "smollm3 (causal-lm): supported: layers [1, 3] have no rotation" in shown
    assert "gpt2 (causal-lm): refused: no rotary embedding" in shown


def skip_newer(model_type: str) -> None:
    if IS_OLDER and model_type not in model_types():
        pytest.skip(f"this version of transformers has no {model_type}")


def test_the_goal_of_120_families_is_met_by_those_known():
    assert len(KNOWN_SUPPORTED) == len(set(KNOWN_SUPPORTED)) >= 120


@pytest.mark.parametrize(
    ("model_type", "layers"),
    [
        ("smollm3", [1, 3]),  # NoPE
        ("llama4_text", [1, 3]),  # NoPE, and a complex table
        ("cohere2", [1, 3]),  # only sliding layers rotate
        ("qwen3_5_text", [0, 2]),  # linear attention
        ("recurrent_gemma", [0, 1, 3]),  # recurrent; the rotary sits inside the one attention layer
        ("mllama", [1, 3]),  # cross-attention to images, which text alone does not reach
        ("gemma3_text", []),
        ("moshi", []),
    ],
)
def test_layers_without_a_rotation_are_named(model_type, layers):
    skip_newer(model_type)
    assert try_family(model_type).unrotated_layers == layers


@pytest.mark.parametrize(
    ("model_type", "status", "reason"),
    [
        ("gpt2", REFUSED, NO_ROTARY),
        ("bert", REFUSED, NO_ROTARY),
        ("gptj", REFUSED, NO_ROTARY),
        (
            "phimoe",
            REFUSED,
            "PhimoeRotaryEmbedding does not rotate by the `inv_freq` it is given, so scaling it would silently do "
            "nothing.",
        ),
        ("blt", REFUSED, "no list of `num_hidden_layers` decoder layers was found."),
        (
            "diffusion_gemma",
            REFUSED,
            "its decoder attends to keys that an encoder with a rotary embedding of its own has rotated, so scaling "
            "the decoder alone would set queries and keys at odds.",
        ),
        ("pi0", NOT_BUILT, "a robot policy: its forward pass denoises actions and returns no logits"),
    ],
)
def test_reasons(model_type, status, reason):
    skip_newer(model_type)
    trial = try_family(model_type)
    assert (trial.status, trial.reason) == (status, reason)


@pytest.mark.parametrize(
    ("model_type", "rotaries"),
    [
        ("qwen2_5_vl", ["model.language_model.rotary_emb"]),  # not the image encoder's
        ("llava", ["model.language_model.rotary_emb"]),
        ("granite_swa", ["model.rotary_emb", "model.rotary_embs.0", "model.rotary_embs.1"]),  # one for each theta
        ("moshi", [f"model.layers.{i}.self_attn.rotary_emb" for i in range(4)]),
        ("t5gemma", ["model.decoder.rotary_emb"]),  # not the encoder's
    ],
)
def test_the_right_rotary_embeddings_are_found(model_type, rotaries):
    skip_newer(model_type)
    assert [site.name for site in find_stack(build_tiny(model_type)).sites] == rotaries


# The trial itself: what it must not let pass.


def test_scaling_that_does_nothing_is_found_out(monkeypatch):
    monkeypatch.setattr(LayerScaling, "scale", lambda self, inv_freq, *_: inv_freq.expand(len(self.distinct), -1))
    trial = try_family("llama")
    assert trial.status == WRONG
    assert trial.reason.startswith("b: with all factors 2")


def test_another_layers_table_is_found_out(monkeypatch):
    original = LayerTableHook.__init__
    monkeypatch.setattr(LayerTableHook, "__init__", lambda self, layer_idx: original(self, max(layer_idx - 1, 0)))
    trial = try_family("llama")
    assert trial.status == WRONG
    assert trial.reason == "c: the factor of layer 1 changes the logits but not the layer's output"


@pytest.mark.skipif(IS_OLDER, reason="transformers 5.0 shares keys through a cache only, and the trial has none")
def test_queries_and_keys_at_odds_are_found_out(monkeypatch):
    monkeypatch.setattr(sites, "_key_sources", lambda config, num_layers: tuple(range(num_layers)))
    trial = try_family("gemma3n_text")
    assert trial.status == WRONG
    assert trial.reason.startswith("d: with different factors, shifting all positions moves the logits by")


def test_layers_that_share_keys_need_one_factor():
    model = build_tiny("gemma3n_text")
    with pytest.raises(AdapterMismatchError) as caught:
        get_peft_model(model, LayerRopeConfig(layer_factors=[1.0, 1.2, 1.0, 1.4]))
    assert str(caught.value) == (
        "layer 3 of gemma3n_text attends to keys that layer 1 has rotated (a shared KV cache), so both need the same "
        "factor: got 1.4 and 1.2."
    )
    assert get_peft_model(model, LayerRopeConfig(layer_factors=[1.0, 1.2, 1.0, 1.2])) is not None


def test_building_does_not_touch_global_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny_inputs(build_tiny("llama"))
    assert torch.equal(torch.rand(3), expected)


def test_a_tiny_model_is_the_same_each_time():
    first, second = build_tiny("qwen3"), build_tiny("qwen3")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("source_of_3", [0, 1])
def test_shared_keys_are_read_from_the_configuration(source_of_3):
    class Config:
        kv_source_layers = (0, 1, 0, source_of_3)

    assert sites._key_sources(Config(), 4) == (0, 1, 0, source_of_3)


def test_a_model_that_is_not_from_transformers_is_refused():
    with pytest.raises(UnsupportedModelError, match="not a transformers model"):
        find_stack(nn.Linear(2, 2))
