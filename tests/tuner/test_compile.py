"""torch.compile and torch.export of a model with the adapter on it, against the same model patched by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import VOCAB, build_model, logits
from peft import get_peft_model
from reference import hand_patched
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel, StaticCache

import peft_layerrope.tuner.rotary
from peft_layerrope import LayerRopeConfig

FACTORS = [1.0, 1.4, 2.0, 1.2]
IDS = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(7))
LENGTHS = (40, 31, 23)  # the third is served by the code that the second was compiled to
PREFILL = 30


def adapted(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LayerRopeConfig(layer_factors=FACTORS[: model.config.num_hidden_layers])).eval()


def baked(model: nn.Module) -> nn.Module:
    return adapted(model).merge_and_unload()


def llama(num_layers: int = len(FACTORS)) -> PreTrainedModel:
    return build_model("llama", num_hidden_layers=num_layers).requires_grad_(False)


def expected_logits(ids: torch.Tensor, num_layers: int = len(FACTORS)) -> torch.Tensor:
    return logits(hand_patched(llama(num_layers), FACTORS[:num_layers]), ids)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compiled code may add up in another order; the adapter moves these logits by about 5."""
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Code compiled for other models must not count."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_forward(model: nn.Module) -> tuple[list[torch.Tensor], int]:
    """Logits at each of the lengths, and how many graphs were made. `fullgraph` raises at a graph break."""
    counter = CompileCounterWithBackend("eager")  # torch's own kernels: the logits stay the same bit for bit
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    return [logits(compiled, IDS[:, :length], use_cache=False) for length in LENGTHS], counter.frame_count


@pytest.mark.parametrize("form", [adapted, baked])
def test_whole_model(form):
    actual, graphs = compiled_forward(form(llama(num_layers=2)))
    for length, result in zip(LENGTHS, actual, strict=True):
        assert torch.equal(result, expected_logits(IDS[:, :length], num_layers=2))
    torch._dynamo.reset()
    assert graphs == compiled_forward(llama(num_layers=2))[1]


def decoded(model: nn.Module, step: Callable) -> torch.Tensor:
    """Logits of a prefill, and of decode steps with a static cache through `step`, of which only the first compiles."""
    cache = StaticCache(config=model.config, max_cache_len=IDS.shape[1])
    results = [logits(model, IDS[:, :PREFILL], past_key_values=cache)]
    for position in range(PREFILL, IDS.shape[1]):
        with torch._dynamo.config.patch(error_on_recompile=position > PREFILL):
            results.append(
                logits(
                    step,
                    IDS[:, position : position + 1],
                    past_key_values=cache,
                    position_ids=torch.tensor([[position]]),
                )
            )
    return torch.cat(results, dim=1)


@pytest.mark.parametrize("form", [adapted, baked])
def test_decode_steps_compile_once(form):
    model = form(llama())
    counter = CompileCounterWithBackend("aot_eager")
    actual = decoded(model, torch.compile(model, fullgraph=True, backend=counter))
    assert_close(actual, expected_logits(IDS))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_default_backend():
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"inductor does not work here: {error}")
    model = adapted(llama(num_layers=2))
    actual = decoded(model, torch.compile(model, fullgraph=True))
    assert_close(actual, expected_logits(IDS, num_layers=2))


def regionally_compiled(model: nn.Module) -> tuple[list[torch.Tensor], list[int]]:
    """Logits at each of the lengths, and how many graphs there were after each."""
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.get_decoder().layers:
        layer.compile(backend=counter, fullgraph=True)
    results, graphs = [], []
    for length in LENGTHS:
        results.append(logits(model, IDS[:, :length], use_cache=False))
        graphs.append(counter.frame_count)
    return results, graphs


@pytest.mark.parametrize("bank_bytes", [0, 2**20], ids=["on_demand", "bank"])
@pytest.mark.parametrize("form", [adapted, baked])
def test_layers_compiled_one_by_one(form, bank_bytes, monkeypatch):
    monkeypatch.setattr(peft_layerrope.tuner.rotary, "BANK_BYTES", bank_bytes)
    _, base_graphs = regionally_compiled(llama())
    torch._dynamo.reset()
    actual, graphs = regionally_compiled(form(llama()))
    for length, result in zip(LENGTHS, actual, strict=True):
        assert_close(result, expected_logits(IDS[:, :length]))
    # torch compiles a layer's hook apart from its forward: one graph more each time, and none per layer or factor
    assert graphs == [2 * count for count in base_graphs]


def gradients(model: nn.Module, run: Callable) -> dict[str, torch.Tensor]:
    model.train().requires_grad_(True)
    run(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name.split("base_model.model.")[-1]: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("form", [adapted, baked])
def test_training_step(form):
    reference = hand_patched(llama(num_layers=2), FACTORS[:2])
    expected = gradients(reference, reference)
    model = form(llama(num_layers=2))
    actual = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient)


class LogitsOnly(nn.Module):
    """What people export: a signature without keyword arguments that are passed on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("form", [adapted, baked])
def test_export(form, strict, dynamic, tmp_path):
    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=512)}} if dynamic else None
    with torch.no_grad():
        model = LogitsOnly(form(llama(num_layers=2)))
        program = torch.export.export(model, (IDS,), dynamic_shapes=shapes, strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for length in LENGTHS if dynamic else LENGTHS[:1]:
        assert torch.equal(exported(IDS[:, :length]), expected_logits(IDS[:, :length], num_layers=2))
