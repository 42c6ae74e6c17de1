"""The fingerprint of a model: any bit of any weight or buffer, the configuration, the attention implementation."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from conftest import WINDOW, build_model, length_dependent_ropes

from peft_layerrope.base_model import model_fingerprint


@pytest.fixture(scope="module")
def model():
    model = build_model("llama", hidden_size=36, intermediate_size=37, head_dim=16).to(torch.bfloat16)
    model.register_buffer("odd", torch.arange(7, dtype=torch.uint8).reshape(7, 1))  # no multiple of a word
    model.register_buffer("switch", torch.tensor(False))
    return model.requires_grad_(False)


def flip(tensor: torch.Tensor, place: int, bit: int) -> None:
    """Changes one bit of a tensor."""
    tensor.view(-1).view(torch.uint8)[place // 8] ^= 1 << (bit % 8)


def test_a_copy_has_the_same(model):
    again = copy.deepcopy(model)
    again.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.t().contiguous().t()
    assert model_fingerprint(again) == model_fingerprint(model)


def test_any_bit_of_any_weight_or_buffer_changes_it(model):
    before, rng = model_fingerprint(model), random.Random(0)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    assert {"odd", "switch", "model.rotary_emb.inv_freq"} < set(tensors)
    for name, tensor in tensors.items():
        if name == "switch":
            places = [0]
        else:
            bits = 8 * tensor.numel() * tensor.element_size()
            places = [bits - 1, *(rng.randrange(bits) for _ in range(3))]
        for place in places:
            flip(tensor, place, place)
            assert model_fingerprint(model) != before, (name, place)
            flip(tensor, place, place)
    assert model_fingerprint(model) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w[:, 3].neg_(),  # each in the upper half of a word
        lambda w: w[:, 2:4].neg_(),
        lambda w: w.copy_(w.roll(1)),
        lambda w: w.copy_(w.flip(0)),
        lambda w: w[:2].copy_(w[[1, 0]]),
        lambda w: w[4].zero_(),
    ],
)
def test_changes_in_many_places_do_not_cancel(model, change):
    changed = copy.deepcopy(model)
    change(changed.model.layers[1].self_attn.q_proj.weight.data)
    assert model_fingerprint(changed) != model_fingerprint(model)


def test_dtype_configuration_family_and_attention_count():
    same = model_fingerprint(build_model("llama"))
    eager = build_model("llama")
    eager.set_attn_implementation("eager")
    others = [build_model("mistral"), build_model("llama", rms_norm_eps=1e-3), build_model("llama").half(), eager]
    assert same not in map(model_fingerprint, others)
    eager.set_attn_implementation("sdpa")
    assert model_fingerprint(eager) == same


@pytest.mark.parametrize("name", length_dependent_ropes(WINDOW))
def test_what_ran_before_does_not_count(name):
    model = build_model("llama", rope_parameters=length_dependent_ropes(WINDOW)[name])
    before = model_fingerprint(model)
    model(torch.arange(2 * WINDOW)[None] % 90)
    assert model_fingerprint(model) == before
