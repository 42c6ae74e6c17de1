"""One model serving several requests at the same time: each answer is what the model gives on its own, bit for bit."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
import torch
from conftest import VOCAB, WINDOW, build_model, logits
from families import build_tiny
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import peft_layerrope.tuner.rotary
from peft_layerrope import LayerRopeConfig, LayerRopeError, use_adapter
from peft_layerrope.tuner.injection import BAKED_CONFIG_KEY

FACTORS = {"rising": [1.0, 1.4, 2.0, 1.2], "falling": [2.5, 1.7, 1.3, 1.0], "flat": [1.6, 1.6, 1.6, 1.6]}
CHOICES = [*FACTORS, None]
ROUNDS = 8

Job = Callable[[], torch.Tensor]


@pytest.fixture(autouse=True)
def _eager_switching() -> Iterator[None]:
    """Threads take turns as often as Python lets them, and torch adds up in one order whatever their number."""
    interval, torch_threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(torch_threads)
    sys.setswitchinterval(interval)


def together(jobs: Sequence[Job], rounds: int = ROUNDS) -> list[list[torch.Tensor]]:
    """Runs each job in a thread of its own, all let go at once in every round; returns their results by round."""
    barrier = threading.Barrier(len(jobs))

    def run(job: Job) -> list[torch.Tensor]:
        torch.set_num_threads(1)
        results = []
        try:
            for _ in range(rounds):
                barrier.wait(timeout=60)
                results.append(job())
        except BaseException:
            barrier.abort()  # the others must not wait for this one
            raise
        return results

    with ThreadPoolExecutor(len(jobs)) as pool:
        by_job = [future.result() for future in [pool.submit(run, job) for job in jobs]]
    return [list(results) for results in zip(*by_job, strict=True)]


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(batch * 1000 + length))


def forward(model: nn.Module, batch: int, length: int) -> torch.Tensor:
    return logits(model, prompt(batch, length))


def generation(model: nn.Module, batch: int, length: int, use_cache: bool = True) -> torch.Tensor:
    """The logits of each new token: tokens alone might not notice another rotation."""
    answer = model.generate(
        input_ids=prompt(batch, length),
        attention_mask=torch.ones(batch, length, dtype=torch.long),
        max_new_tokens=5,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(answer.logits)


def requests(model: nn.Module) -> list[Job]:
    """Different lengths, on both sides of the window, batches, and ways to run."""
    return [
        lambda: forward(model, 1, 9),
        lambda: forward(model, 3, WINDOW + 20),
        lambda: generation(model, 2, 17),
        lambda: generation(model, 1, WINDOW - 2),  # grows beyond the window
        lambda: generation(model, 1, 30, use_cache=False),
    ]


def assert_as_alone(jobs: Sequence[Job], alone: Sequence[torch.Tensor], rounds: int = ROUNDS) -> None:
    for results in together(jobs, rounds):
        for result, expected in zip(results, alone, strict=True):
            assert torch.equal(result, expected)


def with_adapters(model: nn.Module) -> PeftModel:
    names = iter(FACTORS)
    name = next(names)
    peft_model = get_peft_model(model, LayerRopeConfig(layer_factors=FACTORS[name]), adapter_name=name)
    for name in names:
        peft_model.add_adapter(name, LayerRopeConfig(layer_factors=FACTORS[name]))
    return peft_model.eval()


def single(name: str | None) -> nn.Module:
    """A model with that adapter only, or none: what the request would run on if it were alone."""
    model = build_model("llama").requires_grad_(False)  # as injection does: torch multiplies in another order else
    return model if name is None else get_peft_model(model, LayerRopeConfig(layer_factors=FACTORS[name])).eval()


def chosen(model: nn.Module, name: str | None, job: Job) -> Job:
    def run() -> torch.Tensor:
        with use_adapter(model, name):
            return job()

    return run


# The same adapter in every thread: nothing to be done by the caller.


@pytest.mark.parametrize("bank_bytes", [0, 2**25], ids=["on_demand", "bank"])
@pytest.mark.parametrize("fields", [{}, {"rope_type": "dynamic", "factor": 2.0}], ids=["default", "dynamic"])
def test_requests_with_the_same_adapter(fields, bank_bytes, monkeypatch):
    monkeypatch.setattr(peft_layerrope.tuner.rotary, "BANK_BYTES", bank_bytes)
    config = LayerRopeConfig(layer_factors=FACTORS["rising"], **fields)
    alone = [job() for job in requests(get_peft_model(build_model("llama"), config).eval())]
    model = get_peft_model(build_model("llama"), config).eval()  # no cache filled yet
    assert_as_alone(requests(model), alone)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": WINDOW // 2,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}


@pytest.mark.parametrize("name", ["rising", None])
@pytest.mark.parametrize("bank_bytes", [0, 2**25], ids=["on_demand", "bank"])
def test_a_model_that_rewrites_its_frequencies_by_length(name, bank_bytes, monkeypatch):
    monkeypatch.setattr(peft_layerrope.tuner.rotary, "BANK_BYTES", bank_bytes)
    model = with_adapters(build_model("llama", rope_parameters=LONGROPE))
    jobs = [chosen(model, name, lambda length=length: forward(model, 1, length)) for length in (12, 50, 20, 40)]
    assert_as_alone(jobs, [job() for job in jobs], rounds=40)


# Different adapters at once.


def test_requests_with_different_adapters():
    model = with_adapters(build_model("llama"))
    alone = [job() for name in CHOICES for job in requests(single(name))[:3]]
    jobs = [chosen(model, name, job) for name in CHOICES for job in requests(model)[:3]]
    assert_as_alone(jobs, alone, rounds=4)
    assert model.active_adapters == ["rising"]


def test_a_choice_holds_while_another_thread_switches_the_model():
    model = with_adapters(build_model("llama"))

    def switching() -> torch.Tensor:
        model.set_adapter("flat")
        with model.disable_adapter():
            model.set_adapter("rising")
        return torch.zeros(0)

    jobs = [chosen(model, name, requests(model)[2]) for name in CHOICES]
    alone = [requests(single(name))[2]() for name in CHOICES]
    assert_as_alone([*jobs, switching], [*alone, torch.zeros(0)])


def test_asynchronous_tasks():
    model = with_adapters(build_model("llama"))

    async def request(name: str | None) -> list[torch.Tensor]:
        results = []
        with use_adapter(model, name):
            for _ in range(ROUNDS):
                results.append(forward(model, 1, 20))
                await asyncio.sleep(0)  # the next task's turn
                results.append(await asyncio.to_thread(forward, model, 1, 20))
        return results

    async def serve() -> list[list[torch.Tensor]]:
        return await asyncio.gather(*[request(name) for name in CHOICES])

    for name, results in zip(CHOICES, asyncio.run(serve()), strict=True):
        expected = forward(single(name), 1, 20)
        assert all(torch.equal(result, expected) for result in results)


def test_a_thread_started_inside_takes_the_choice_along_only_if_given_it():
    model = with_adapters(build_model("llama"))
    with use_adapter(model, "flat"), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(forward, model, 1, 20).result(), forward(single("rising"), 1, 20))
        carried = pool.submit(copy_context().run, forward, model, 1, 20)
        assert torch.equal(carried.result(), forward(single("flat"), 1, 20))


# The context manager.


def test_contexts_nest_and_end():
    model = with_adapters(build_model("llama"))
    expected = {name: forward(single(name), 2, 20) for name in CHOICES}

    def is_in_force(name: str | None) -> bool:
        return torch.equal(forward(model, 2, 20), expected[name])

    def fail_in_force(name: str | None) -> None:
        assert is_in_force(name)
        raise RuntimeError("on purpose")

    with use_adapter(model, "falling"):
        with use_adapter(model, None):
            assert is_in_force(None)
            with pytest.raises(RuntimeError, match="on purpose"), use_adapter(model, "flat"):
                fail_in_force("flat")
            assert is_in_force(None)
        assert is_in_force("falling")
        with model.disable_adapter():
            assert is_in_force("falling")
        model.set_adapter("flat")
        assert is_in_force("falling")
    assert is_in_force("flat")
    with model.disable_adapter():
        assert is_in_force(None)


def test_each_model_has_its_own_choice():
    first, second = with_adapters(build_model("llama")), with_adapters(build_model("llama"))
    with use_adapter(first, "flat"), use_adapter(second, "falling"):
        assert torch.equal(forward(first, 1, 20), forward(single("flat"), 1, 20))
        assert torch.equal(forward(second, 1, 20), forward(single("falling"), 1, 20))
    with use_adapter(first, "flat"):
        assert torch.equal(forward(second, 1, 20), forward(single("rising"), 1, 20))


def test_rotaries_inside_the_layers():
    model = get_peft_model(
        build_tiny("moshi"), LayerRopeConfig(layer_factors=FACTORS["flat"]), adapter_name="one"
    ).eval()
    model.add_adapter("other", LayerRopeConfig(layer_factors=FACTORS["rising"]))
    with model.disable_adapter():
        base = forward(model, 1, 20)
    with use_adapter(model, None):
        assert torch.equal(forward(model, 1, 20), base)
    with use_adapter(model, "other"):
        inside = forward(model, 1, 20)
    assert not torch.equal(inside, forward(model, 1, 20))
    model.set_adapter("other")
    assert torch.equal(inside, forward(model, 1, 20))


def test_a_lora_beside_it_stays_as_it_is():
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    trained = get_peft_model(build_model("llama"), lora)
    expected = forward(trained, 1, 20)
    torch.manual_seed(1)
    model = with_adapters(get_peft_model(build_model("llama"), lora))
    assert not torch.equal(forward(model, 1, 20), expected)
    with use_adapter(model, None):
        assert torch.equal(forward(model, 1, 20), expected)


def test_what_is_recorded_for_saving_goes_by_the_models_own_switch():
    model = inject_adapter_in_model(LayerRopeConfig(layer_factors=FACTORS["rising"]), build_model("llama"), "rising")
    inject_adapter_in_model(LayerRopeConfig(layer_factors=FACTORS["flat"]), model, "flat")
    with use_adapter(model, "flat"):
        model.model.rotary_emb.set_adapter("rising")
    assert getattr(model.config, BAKED_CONFIG_KEY)["layer_factors"] == FACTORS["rising"]


def test_a_name_that_does_not_exist():
    model = with_adapters(build_model("llama"))
    with pytest.raises(ValueError, match=r"\['steep'\] do not exist; this model has"), use_adapter(model, "steep"):
        pass
    with use_adapter(model, "flat"):
        model.delete_adapter("flat")
        with pytest.raises(LayerRopeError, match="'flat' was deleted while in use"):
            forward(model, 1, 20)
    assert torch.equal(forward(model, 1, 20), forward(single("rising"), 1, 20))


@pytest.mark.parametrize("form", [lambda model: model, lambda model: with_adapters(model).merge_and_unload()])
def test_a_model_without_an_adapter(form):
    with (
        pytest.raises(LayerRopeError, match="has no LAYER_ROPE adapter"),
        use_adapter(form(build_model("llama")), None),
    ):
        pass


# Compiled models.


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small() -> PeftModel:
    config = LayerRopeConfig(layer_factors=[1.0, 2.0])
    return get_peft_model(build_model("llama", num_hidden_layers=2).requires_grad_(False), config).eval()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_follows_the_choice():
    model = small()
    compiled = torch.compile(model, backend="eager")
    scaled = forward(model, 1, 20)
    assert torch.equal(forward(compiled, 1, 20), scaled)
    with use_adapter(model, None):
        assert torch.equal(forward(compiled, 1, 20), forward(model, 1, 20))
        assert not torch.equal(forward(compiled, 1, 20), scaled)
    assert torch.equal(forward(compiled, 1, 20), scaled)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_model_compiled_to_one_graph_refuses_the_choice_and_goes_on():
    model = small()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    expected = forward(compiled, 1, 20)
    with use_adapter(model, None), pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        forward(compiled, 1, 20)
    assert "use set_adapter" in "".join(traceback.format_exception(caught.value))  # where torch is older, in the cause
    assert torch.equal(forward(compiled, 1, 20), expected)
    assert counter.frame_count == 1
