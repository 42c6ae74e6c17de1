"""A model of mlx-lm with factors against PEFT's on torch."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import NUM_LAYERS, build_model, logits
from peft import get_peft_model

from peft_layerrope import AdapterMismatchError, LayerRopeConfig, UnsupportedModelError

pytest.importorskip("mlx_lm")

import mlx.core as mx
from mlx import nn
from mlx_lm.utils import load_model

from peft_layerrope.serving.mlx_model import scale

FACTORS = [1.0, 1.3, 2.0, 1.6]
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}


def for_mlx(model, folder) -> nn.Module:
    """Opened by mlx-lm, some of whose families read a rope only where transformers 4 wrote it."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config["rope_parameters"]
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else rope}
    path.write_text(json.dumps({**config, **old}))
    return load_model(folder)[0]


@pytest.mark.parametrize(
    ("family", "fields", "overrides"),
    [
        ("llama", {}, {}),
        ("llama", {"rope_type": "linear", "factor": 2.0}, {}),
        ("llama", {"rope_type": "dynamic", "factor": 2.0, "target_length": 200}, {}),
        ("llama", {}, {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}}),
        ("llama", {}, {"rope_parameters": YARN}),
        ("qwen2", {}, {}),
        ("qwen3", {}, {}),
    ],
)
def test_logits_are_those_of_the_adapter_on_torch(tmp_path, long_ids, family, fields, overrides):
    model, config = build_model(family, **overrides), LayerRopeConfig(layer_factors=FACTORS, **fields)
    found = for_mlx(model, tmp_path)
    scale(found, model.config, config)
    unscaled, wanted = logits(model, long_ids), logits(get_peft_model(model, config).eval(), long_ids)
    got = torch.tensor(found(mx.array(long_ids.tolist())).tolist())
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=0)
    assert (unscaled - wanted).abs().max() > 0.1


def test_what_does_not_fit_is_refused(tmp_path):
    model = build_model("llama")
    found = for_mlx(model, tmp_path)
    with pytest.raises(AdapterMismatchError):
        scale(found, model.config, LayerRopeConfig(layer_factors=[1.5] * (NUM_LAYERS + 1)))
    found.layers[2].self_attn.rope.base = 5000.0
    with pytest.raises(UnsupportedModelError, match="layer 2"):
        scale(found, model.config, LayerRopeConfig(layer_factors=FACTORS))
