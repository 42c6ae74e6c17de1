"""Gradient steps against finite differences of a reference that shares no code with the package."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, build_model, logits
from fakes import space_of, token_task
from peft import PeftModel, get_peft_model
from torch import nn

from peft_layerrope import LayerRopeConfig, Split
from peft_layerrope.scoring.batching import recomputing
from peft_layerrope.searcher import FactorGrid
from peft_layerrope.searcher.gradient import GradientSteps
from peft_layerrope.tuner.sites import find_stack

WEIGHTS = (0.5, 1.0, 2.0)
START = (1.2, 1.7, 1.5, 1.9)
HEAD, THETA, WINDOW = 16, 10_000.0, 8
ROPE = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 1.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": WINDOW},
}


def split() -> Split:
    return token_task(length=14).split("search", 3)


def with_adapter(factors: tuple[float, ...] = START, model: nn.Module | None = None, **fields: object) -> PeftModel:
    config = LayerRopeConfig(task_type="CAUSAL_LM", layer_factors=list(factors), **fields)
    return get_peft_model(model or build_model("llama"), config)


def steps_of(model: PeftModel, space=None, **more: object) -> GradientSteps:
    return GradientSteps(
        model, split(), space or space_of(NUM_LAYERS), weights=WEIGHTS, **{"batch_tokens": 1000, **more}
    )


def reference(factors: np.ndarray, rope_type: str, factor: float) -> float:
    """The utilisation of gold log-probabilities in float64, one example at a time, each layer rotated by formula."""
    model = build_model("llama").double()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":  # transformers' own computes in float32
            module.forward = lambda x, m=module: m.weight * x * (x.pow(2).mean(-1, True) + m.variance_epsilon).rsqrt()
    model.model.rotary_emb.forward = lambda x, position_ids: (x, x)  # overwritten in every layer
    by_position = np.zeros(3)
    examples = split().examples
    for example in examples:
        ids = torch.tensor([example.context_ids + example.query_ids + example.answer_ids])
        count, length = len(example.answer_ids), ids.shape[1] - 1
        pairs = torch.arange(HEAD // 2, dtype=torch.float64)
        positions = torch.arange(length, dtype=torch.float64)
        for layer, own in zip(model.model.layers, factors, strict=True):
            scale, base = 1.0, THETA
            if rope_type == "dynamic":
                scaled = factor * own
                base *= (scaled * length / WINDOW - (scaled - 1)) ** (HEAD / (HEAD - 2))
            else:
                scale = factor * own
            angles = positions[:, None] * base ** (-2 * pairs / HEAD) / scale
            angles = torch.cat([angles, angles], -1)[None]
            table = angles.cos(), angles.sin()
            own_forward = type(layer).forward.__get__(layer)
            layer.forward = lambda hidden, f=own_forward, t=table, **kwargs: f(
                hidden, **{**kwargs, "position_embeddings": t}
            )
        with torch.no_grad():
            lines = model(ids[:, :-1]).logits[0, -count:].log_softmax(-1)
        gold = lines[torch.arange(count), ids[0, -count:]]
        floor = -np.log(lines.shape[-1])
        by_position[example.position] += gold.clamp(min=floor).sum().item() * 3 / len(examples)
    return float(np.dot(WEIGHTS, by_position) / sum(WEIGHTS))


@pytest.mark.parametrize("rope_type", ROPE)
def test_the_gradient_is_that_of_the_utilisation(rope_type):
    model = with_adapter(**ROPE[rope_type])
    found = steps_of(model)._gradient(torch.tensor(START))
    factor, h = ROPE[rope_type].get("factor", 1.0), 1e-4
    expected = []
    for layer in range(NUM_LAYERS):
        up, down = np.array(START), np.array(START)
        up[layer] += h
        down[layer] -= h
        expected.append((reference(up, rope_type, factor) - reference(down, rope_type, factor)) / (2 * h))
    assert max(map(abs, expected)) > 1e-3
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 40, 1000])
def test_batches_do_not_change_the_gradient(batch_tokens):
    model = with_adapter()
    whole = steps_of(model)._gradient(torch.tensor(START))
    parts = steps_of(model, batch_tokens=batch_tokens)._gradient(torch.tensor(START))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_tied_layers_share_is_its_sources():
    model = with_adapter((1.2, 1.7, 1.2, 1.7))
    free = steps_of(model)._gradient(torch.tensor((1.2, 1.7, 1.2, 1.7)))
    tied = space_of(NUM_LAYERS, scaled=(0, 1), sources=(0, 1, 0, 1))
    found = steps_of(model, tied)._gradient(torch.tensor((1.2, 1.7)))
    torch.testing.assert_close(found, torch.stack([free[0] + free[2], free[1] + free[3]]), rtol=1e-4, atol=1e-6)


def test_only_the_scaled_layers_are_asked_about():
    factors = (1.0, 1.7, 1.0, 1.9)
    free = steps_of(with_adapter(factors))._gradient(torch.tensor(factors))
    some = steps_of(with_adapter(factors), space_of(NUM_LAYERS, scaled=(1, 3)))._gradient(torch.tensor((1.7, 1.9)))
    torch.testing.assert_close(some, free[[1, 3]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rope_type", ROPE)
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_steps_stay_in_range_and_leave_the_model_alone(rope_type, model_type, ids):
    grid = FactorGrid(0.8, 1.77, 0.1)  # whose last value, 1.7, is below its bound
    space = space_of(NUM_LAYERS, scaled=(1, 2, 3), grid=grid)
    model = with_adapter((1.0, 1.0, 1.7, 0.8), build_model(model_type), **ROPE[rope_type])
    before = logits(model, ids)
    told: list[None] = []
    visited = steps_of(model, space).climb((1.0, 1.0, 1.7, 0.8), 6, lambda: told.append(None))
    assert len(told) == 6
    assert 1 <= len(visited) == len(set(visited)) <= 6
    for vector in visited:
        assert vector[0] == 1.0
        assert set(vector[1:]) <= set(grid.values)
    assert torch.equal(logits(model, ids), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert steps_of(model, space).climb((1.0, 1.0, 1.7, 0.8), 6) == visited  # nothing is random


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_layers_run_again_instead_of_keeping_their_activations(family, monkeypatch):
    """The gradient is, bit for bit, the one that a plain backward pass gives, and the layers are left as they were."""
    model = with_adapter(model=build_model(family))
    steps = steps_of(model)
    with monkeypatch.context() as plain:
        plain.setattr("peft_layerrope.searcher.gradient.recomputing", lambda layers: nullcontext())
        expected = steps._gradient(torch.tensor(START))
    layers = find_stack(model.get_base_model()).layers
    runs = [0] * len(layers)

    def count(layer: int) -> None:
        runs[layer] += 1

    for number, layer in enumerate(layers):  # hooks on the layer itself are outside of what is run again
        next(layer.children()).register_forward_pre_hook(lambda *_, number=number: count(number))
    assert torch.equal(steps._gradient(torch.tensor(START)), expected)
    assert runs == [2 * len(steps._batches)] * len(layers)
    assert all("forward" not in vars(layer) for layer in layers)


def test_a_forward_that_a_library_has_put_there_is_put_back():
    layer = nn.Linear(2, 2)
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)
    placed = layer.forward
    with pytest.raises(RuntimeError, match="inside"), recomputing([layer]):
        raise RuntimeError("inside")
    assert layer.forward is placed


def test_the_scaling_comes_back_after_an_error(ids, monkeypatch):
    model = with_adapter()
    before = logits(model, ids)

    def fail(*args: object) -> None:
        raise RuntimeError("inside")

    monkeypatch.setattr("peft_layerrope.searcher.gradient.answer_logits", fail)
    with pytest.raises(RuntimeError, match="inside"):
        steps_of(model).climb(START, 2)
    assert torch.equal(logits(model, ids), before)


def test_steps_climb():
    model = with_adapter()
    last = steps_of(model, space_of(NUM_LAYERS, grid=FactorGrid(1.0, 2.0, 0.01))).climb(START, 10)[-1]
    assert reference(np.array(last), "default", 1.0) > reference(np.array(START), "default", 1.0)


@pytest.mark.parametrize("own", ["dynamic", "longrope"])
def test_gradients_after_scoring_a_model_whose_own_rotation_depends_on_the_length(own):
    """Scoring runs in inference mode, and such a model keeps frequencies that it made there."""
    extra = {"factor": 2.0}
    if own == "longrope":
        extra = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": WINDOW}
    base = build_model(
        "llama",
        rope_parameters={"rope_type": own, "rope_theta": THETA, **extra},
        max_position_embeddings=WINDOW,
    )
    model = with_adapter(model=base)
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        model(ids[:, :20])
    assert len(steps_of(model).climb(START, 2)) >= 1
