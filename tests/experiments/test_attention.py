"""Attention rows against whole maps, and what is computed of them against numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, VOCAB, build_model
from experiment_helpers import FACTORS, short_task

from peft_layerrope import LayerRopeConfig
from peft_layerrope.base_model import adapted
from peft_layerrope.errors import TaskError, UnsupportedModelError
from peft_layerrope.experiments import Measuring
from peft_layerrope.experiments.attention import (
    AttentionReader,
    gold_mass,
    relative_entropy,
    run_attention,
    visible_tokens,
)

LAYERS = [0, 1, 2, 3]
VARIED = LayerRopeConfig(layer_factors=[1.0, 1.3, 2.0, 1.6])
DYNAMIC = LayerRopeConfig(rope_type="dynamic", factor=2.0, layer_factors=[1.0, 1.3, 2.0, 1.6])
PROMPT = torch.randint(0, VOCAB, (100,), generator=torch.Generator().manual_seed(0)).tolist()  # beyond the window


def last_row_of_whole_maps(model, prompt) -> torch.Tensor:
    """transformers' own maps, all of them, in eager mode."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(torch.tensor([prompt]), use_cache=False, output_attentions=True).attentions
    base.set_attn_implementation(before)
    return torch.stack([attention[0, :, -1] for attention in maps])


@pytest.mark.parametrize("family", [*FAMILIES, "sliding"])
@pytest.mark.parametrize("config", [None, VARIED, DYNAMIC], ids=["none", "varied", "dynamic"])
def test_rows_equal_the_last_row_of_the_whole_map(family, config):
    model = build_model("mistral", sliding_window=40) if family == "sliding" else build_model(family)
    if family != "sliding" and family != "gemma2":
        model.set_attn_implementation("sdpa")
    if config is None:
        rows = AttentionReader(model).read(PROMPT)
        whole = last_row_of_whole_maps(model, PROMPT)
    else:
        with adapted(model, config) as peft_model:
            reader = AttentionReader(peft_model)
            assert reader.whole == (config is DYNAMIC)
            rows, whole = reader.read(PROMPT), last_row_of_whole_maps(peft_model, PROMPT)
    assert rows.shape == (4, 4, len(PROMPT))
    assert whole.std() > 1e-3
    torch.testing.assert_close(rows, whole, atol=2e-5, rtol=1e-3)


def test_rows_of_dynamic_ntk_by_cache_would_be_wrong():
    """The reason why the whole prompt runs."""
    with adapted(build_model("llama"), DYNAMIC) as model:
        reader = AttentionReader(model)
        reader.whole = False
        difference = reader.read(PROMPT) - last_row_of_whole_maps(model, PROMPT)
    assert difference.abs().max() > 1e-4


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_implementation_is_as_it_was(implementation):
    model = build_model("llama")
    model.set_attn_implementation(implementation)
    AttentionReader(model).read(PROMPT)
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("whole", [True, False])
def test_only_rows_are_kept(whole):
    model, sizes = build_model("llama"), []
    reader = AttentionReader(model)
    reader.whole = whole

    def hook(module, inputs, output):
        sizes.append(output[1].shape[-2] if output[1] is not None else 0)

    handles = [layer.self_attn.register_forward_hook(hook) for layer in model.model.layers]
    rows = reader.read(PROMPT)
    for handle in handles:
        handle.remove()
    assert max(sizes) == (len(PROMPT) if whole else 1)
    assert rows.untyped_storage().nbytes() == 4 * 4 * len(PROMPT) * 4


@pytest.mark.parametrize(
    ("settings", "length", "expected"),
    [({}, 100, [100] * 4), ({"sliding_window": 40}, 100, [40] * 4), ({"sliding_window": 40}, 30, [30] * 4)],
)
def test_visible_tokens(settings, length, expected):
    model = build_model("mistral", **{"sliding_window": None} | settings)
    assert [visible_tokens(model, layer, length) for layer in LAYERS] == expected


def test_visible_tokens_by_layer_type():
    model = build_model("gemma2", sliding_window=40)
    types = model.config.layer_types
    assert {"sliding_attention", "full_attention"} <= set(types)
    expected = [40 if kind == "sliding_attention" else 100 for kind in types]
    assert [visible_tokens(model, layer, 100) for layer in LAYERS] == expected


def test_mass_and_entropy():
    rows = torch.zeros(2, 2, 8)
    rows[0, 0, 3] = 1  # one token
    rows[0, 1] = 1 / 8  # spread evenly
    rows[1, :, 4:] = 1 / 4  # evenly over a window of 4
    assert gold_mass(rows, (3, 5)).tolist() == pytest.approx([(1 + 2 / 8) / 2, 1 / 4])
    assert relative_entropy(rows, [8, 4]).tolist() == pytest.approx([0.5, 1.0])


def test_the_experiment_equals_whole_maps(demo_model, demo_tokenizer):
    task, groups = short_task(demo_tokenizer, num_positions=5), 2
    config = LayerRopeConfig(layer_factors=FACTORS)
    section = run_attention(Measuring(demo_model, groups), task, config)
    split = task.split("test", groups)
    for name, vector in (("without", [1.0] * 6), ("with", FACTORS)):
        for place, position in (("first", 0), ("middle", 2), ("last", 4)):
            mass, entropy = [], []
            for example in (e for e in split.examples if e.position == position):
                prompt = [*example.context_ids, *example.query_ids]
                with adapted(demo_model, LayerRopeConfig(layer_factors=vector)) as model:
                    rows = last_row_of_whole_maps(model, prompt).double().numpy()
                start, end = example.gold_span
                assert prompt[start:end] == list(example.answer_ids)
                mass.append(rows[:, :, start:end].sum(-1).mean(-1))
                logs = np.log(np.where(rows > 0, rows, 1))
                entropy.append(-(rows * logs).sum(-1).mean(-1) / np.log(len(prompt)))
            for kind, expected in (("mass", mass), ("entropy", entropy)):
                found = [interval["value"] for interval in section.data[kind][place][name]]
                assert found == pytest.approx(np.mean(expected, axis=0).tolist(), abs=2e-5)
    layer_1 = section.data["mass"]["first"]["difference"][1]
    assert layer_1["value"] > 0.1  # the demo model finds its answers in layer 1


def test_tasks_without_a_gold_span_are_refused(demo_model, demo_tokenizer):
    task = short_task(demo_tokenizer)
    whole = task.split

    def without(name, groups):
        split = whole(name, groups)
        return replace(split, examples=tuple(replace(e, gold_span=None) for e in split.examples))

    task.split = without
    with pytest.raises(TaskError, match="where the gold stands"):
        run_attention(Measuring(demo_model, 2), task, LayerRopeConfig(layer_factors=FACTORS))


def test_a_model_that_returns_no_weights_is_refused():
    model = build_model("llama")
    for layer in model.model.layers:
        inner = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, inner=inner, **kwargs: (inner(*args, **kwargs)[0], None)
    with pytest.raises(UnsupportedModelError, match="no attention weights"):
        AttentionReader(model)
