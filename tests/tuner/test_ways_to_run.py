"""Every way people run a model, with the adapter on it, against the same model patched by hand."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import FAMILIES, IS_OLDER, NUM_LAYERS, VOCAB, build_model, logits
from peft import LoraConfig, get_peft_model
from reference import hand_patched
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import peft_layerrope.tuner.rotary
from peft_layerrope import LayerRopeConfig
from peft_layerrope.tuner.tables import TableBank, TablesOnDemand

FACTORS = [1.0, 1.4, 2.0, 1.2]


def adapted(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LayerRopeConfig(layer_factors=FACTORS)).eval()


def baked(model: nn.Module) -> nn.Module:
    return adapted(model).merge_and_unload()


def patched(model: PreTrainedModel) -> PreTrainedModel:
    return hand_patched(model, FACTORS)


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in lengths]


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    padding = torch.tensor([width - len(row) for row in rows])
    ids = torch.stack([nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(width) >= padding[:, None]).long()}


def positions_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)


@pytest.fixture(params=["eager", "sdpa", "flex_attention"])
def attention(request: pytest.FixtureRequest) -> Iterator[str]:
    """An attention implementation. transformers compiles flex, a matter of minutes here: run its eager form."""
    with torch.compiler.set_stance("force_eager" if request.param == "flex_attention" else "default"):
        yield request.param


# Ways to run a model: each answers with tensors that must be the same, bit for bit, as the hand-patched model's.


def generation(model: nn.Module, batch: dict[str, torch.Tensor], **arguments: object) -> tuple[torch.Tensor, ...]:
    """The new tokens and their scores: tokens alone might not notice a slightly different rotation."""
    defaults = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answer = model.generate(
        **batch, **{**defaults, **arguments}, return_dict_in_generate=True, output_logits=True, output_scores=True
    )
    return answer.sequences, torch.stack(answer.logits), torch.stack(answer.scores)


def forward(model: nn.Module) -> tuple[torch.Tensor, ...]:
    return (logits(model, torch.stack(prompts(40, 40))),)


def forward_left_padded(model: nn.Module) -> tuple[torch.Tensor, ...]:
    batch = left_padded(prompts(30, 13, 22))
    rows = logits(model, batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions_of(batch))
    return tuple(row[mask.bool()] for row, mask in zip(rows, batch["attention_mask"], strict=True))


def forward_packed(model: nn.Module) -> tuple[torch.Tensor, ...]:
    rows = prompts(17, 25)
    return (logits(model, torch.cat(rows)[None], position_ids=packed_positions(rows), use_cache=False),)


def packed_positions(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.arange(len(row)) for row in rows])[None]


def greedy(model: nn.Module) -> tuple[torch.Tensor, ...]:
    return generation(model, {"input_ids": torch.stack(prompts(20, 20))})


def greedy_left_padded(model: nn.Module) -> tuple[torch.Tensor, ...]:
    return generation(model, left_padded(prompts(20, 9, 14)))


def static_cache(model: nn.Module) -> tuple[torch.Tensor, ...]:
    # compiling a decode step is a test of its own
    return generation(model, left_padded(prompts(20, 9)), cache_implementation="static", disable_compile=True)


def without_cache(model: nn.Module) -> tuple[torch.Tensor, ...]:
    return generation(model, left_padded(prompts(20, 9)), use_cache=False)


def beams(model: nn.Module) -> tuple[torch.Tensor, ...]:
    return generation(model, left_padded(prompts(20, 9)), num_beams=3, num_return_sequences=2)


def sampled(model: nn.Module) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(11)
    return generation(model, left_padded(prompts(20, 9)), do_sample=True, temperature=1.5, top_k=20)


def chunked_prefill(model: nn.Module) -> tuple[torch.Tensor, ...]:
    return generation(model, {"input_ids": torch.stack(prompts(20, 20))}, prefill_chunk_size=8)


def continued_conversation(model: nn.Module) -> tuple[torch.Tensor, ...]:
    first, second = torch.stack(prompts(20, 20)).split([14, 6], dim=1)
    with torch.no_grad():
        answer = model(input_ids=first, use_cache=True)
    return answer.logits, logits(model, second, past_key_values=answer.past_key_values)


def embeddings_as_input(model: nn.Module) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(torch.stack(prompts(40, 40)))
        return (model(inputs_embeds=embeddings).logits,)


def bfloat16(model: nn.Module) -> tuple[torch.Tensor, ...]:
    return forward_left_padded(model.to(torch.bfloat16))


def autocast(model: nn.Module) -> tuple[torch.Tensor, ...]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return forward_left_padded(model)


def prompt_lookup(model: nn.Module) -> tuple[torch.Tensor, ...]:
    # No token is -1. With None older versions of transformers fail.
    batch = {"input_ids": prompts(8)[0].repeat(3)[None]}
    return generation(model, batch, prompt_lookup_num_tokens=3, eos_token_id=-1)


WAYS = [
    forward,
    forward_left_padded,
    forward_packed,
    greedy,
    greedy_left_padded,
    static_cache,
    without_cache,
    beams,
    sampled,
    prompt_lookup,
    chunked_prefill,
    continued_conversation,
    embeddings_as_input,
    bfloat16,
    autocast,
]


def llama(attention: str = "sdpa") -> PreTrainedModel:
    model = build_model("llama")
    model.set_attn_implementation(attention)
    return model.requires_grad_(False)  # as injection does: torch's matmul takes another kernel for trainable weights


def all_equal(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_equals_the_hand_patched_model(way, attention):
    if way is static_cache and attention == "flex_attention":
        pytest.skip("transformers' generate() itself fails: 'BlockMask' object has no attribute 'contiguous'")
    if way is chunked_prefill and IS_OLDER:
        pytest.skip("transformers 5.0's generate() itself fails: 'Cannot use prefill chunking without a cache'")
    expected = way(patched(llama(attention)))
    assert all_equal(way(adapted(llama(attention))), expected)
    assert all_equal(way(baked(llama(attention))), expected)
    assert not all_equal(way(llama(attention)), expected)  # the base model would not pass


# Ways against the plainest way there is: one prompt at a time.


def test_a_left_padded_batch_generates_what_each_prompt_alone_does(attention):
    rows = prompts(20, 9, 14)
    model = adapted(llama(attention))
    sequences, scores, _ = generation(model, left_padded(rows))
    for index, row in enumerate(rows):
        alone, alone_scores, _ = generation(model, {"input_ids": row[None]})
        assert torch.equal(sequences[index, -12:], alone[0, -12:])
        # matrices of other shapes add up in another order
        torch.testing.assert_close(scores[:, index], alone_scores[:, 0], atol=1e-4, rtol=1e-4)


def test_packed_sequences_do_not_feel_each_other(attention):
    rows = prompts(17, 25)
    model = adapted(llama(attention))
    packed = forward_packed(model)[0][0].split([17, 25])
    for row, part in zip(rows, packed, strict=True):
        torch.testing.assert_close(part, logits(model, row[None])[0], atol=1e-4, rtol=1e-4)  # as above


@pytest.mark.slow
@pytest.mark.skipif(IS_OLDER, reason="transformers 5.0 itself fails, on the base model as well")
def test_continuous_batching():
    """`generate_batch` packs running requests into one row, with a paged cache."""
    rows = prompts(20, 9, 14)
    expected = generation(patched(llama()), left_padded(rows))[0][:, -12:]
    assert not torch.equal(generation(llama(), left_padded(rows))[0][:, -12:], expected)
    answers = adapted(llama()).generate_batch(
        [row.tolist() for row in rows],
        generation_config=GenerationConfig(
            max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0, num_blocks=32, max_batch_tokens=64
        ),
        progress_bar=False,
    )
    assert [answers[f"req_{index}"].generated_tokens for index in range(len(rows))] == expected.tolist()


def disturbed_llama() -> PreTrainedModel:
    """An assistant that is often right: the same weights, but for a little noise on one of them."""
    assistant = llama()
    with torch.no_grad():
        weight = assistant.lm_head.weight
        weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(6))
    return assistant


@pytest.mark.parametrize(
    "assistant",
    [lambda form: disturbed_llama(), lambda form: form(disturbed_llama())],
    ids=["plain_assistant", "adapted_assistant"],
)
def test_assisted_decoding(assistant):
    def assisted(form: Callable[[nn.Module], nn.Module]) -> tuple[torch.Tensor, ...]:
        batch = {"input_ids": prompts(20)[0][None]}
        return generation(form(llama()), batch, assistant_model=assistant(form), max_new_tokens=20)

    expected = assisted(patched)
    assert all_equal(assisted(adapted), expected)
    assert all_equal(assisted(baked), expected)
    alone = generation(adapted(llama()), {"input_ids": prompts(20)[0][None]}, max_new_tokens=20)
    assert torch.equal(alone[0], expected[0])


# Training.


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss with respect to every weight of the base model."""
    model.train().requires_grad_(True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name.split("base_model.model.")[-1]: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("bank_bytes", [0, 2**20], ids=["on_demand", "bank"])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("form", [adapted, baked])
def test_gradient_checkpointing(form, use_reentrant, bank_bytes, monkeypatch):
    monkeypatch.setattr(peft_layerrope.tuner.rotary, "BANK_BYTES", bank_bytes)
    ids = torch.stack(prompts(40, 40))
    expected = gradients(patched(llama()), ids)
    model = form(llama())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    actual = gradients(model, ids)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("bank_bytes", [0, 2**20], ids=["on_demand", "bank"])
def test_training_after_inference_mode(bank_bytes, monkeypatch):
    """What is cached in inference mode must not get into autograd's way later."""
    monkeypatch.setattr(peft_layerrope.tuner.rotary, "BANK_BYTES", bank_bytes)
    ids = torch.stack(prompts(40, 40))
    expected = gradients(patched(llama()), ids)
    model = adapted(llama())
    with torch.inference_mode():
        model(ids)
    actual = gradients(model, ids)
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_under_a_lora(use_reentrant):
    """The base is frozen; the reentrant kind then needs embeddings that require a gradient."""
    ids = torch.stack(prompts(40, 40))
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def lora_gradients(model: nn.Module) -> list[torch.Tensor]:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    torch.manual_seed(8)
    expected = lora_gradients(get_peft_model(patched(llama()), lora).train())
    torch.manual_seed(8)
    model = get_peft_model(baked(llama()), lora).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert all_equal(lora_gradients(model), expected)
    assert len(expected) == 4 * NUM_LAYERS


def _ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ids = torch.stack(prompts(40, 40, 40, 40))
    model = DistributedDataParallel(adapted(llama()).requires_grad_(True))
    result = {name.removeprefix("module."): g for name, g in gradients(model, ids[2 * rank : 2 * rank + 2]).items()}
    torch.save(result, f"{folder}/gradients{rank}.pt")
    # An orderly end can hang in torch 2.13: the reducer's destructor, which holds the GIL, waits for a thread of gloo's
    # that wants it.
    os._exit(0)


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(_ddp_worker, args=(str(tmp_path),), nprocs=2)
    expected = gradients(patched(llama()), torch.stack(prompts(40, 40, 40, 40)))
    for rank in range(2):
        actual = torch.load(tmp_path / f"gradients{rank}.pt")
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():  # two halves add up in another order
            torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-4)


# Copies and offloading.


def saved_and_loaded(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@pytest.mark.parametrize(
    "clone",
    [lambda m, _: copy.deepcopy(m), lambda m, _: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch_save"],
)
@pytest.mark.parametrize("form", [adapted, baked])
def test_copies(form, clone, tmp_path):
    expected = greedy_left_padded(patched(llama()))
    model = form(llama())
    greedy_left_padded(model)  # caches are filled by now
    twin = clone(model, tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all_equal(greedy_left_padded(twin), expected)


def layers_to(*devices: str) -> dict[str, str]:
    """A device map that deals the layers out in turn."""
    layers = {f"model.layers.{index}": devices[index % len(devices)] for index in range(NUM_LAYERS)}
    return {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu", **layers}


def cpu_offloaded(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device="cpu")


def disk_offloaded(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, str(folder), execution_device="cpu")


def dispatched_whole(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def dispatched_by_layer(model: nn.Module, folder: Path) -> nn.Module:
    device_map = layers_to("cpu", "disk")
    return accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=str(folder), offload_buffers=True
    )


OFFLOADS = [cpu_offloaded, disk_offloaded, dispatched_whole, dispatched_by_layer]


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("form", [adapted, baked])
@pytest.mark.parametrize("order", ["adapter_first", "offload_first"])
def test_offloading(form, offload, order, tmp_path):
    expected = greedy_left_padded(patched(llama()))
    model = llama()
    if order == "adapter_first":
        model = form(model)
        offload(model.get_base_model() if form is adapted else model, tmp_path)
    else:
        model = form(offload(model, tmp_path))
    assert has_hooks(model)
    assert all_equal(greedy_left_padded(model), expected)


def has_hooks(model: nn.Module) -> bool:
    return any(hasattr(module, "_hf_hook") for module in model.modules())


@pytest.mark.parametrize("form", [adapted, baked])
@pytest.mark.parametrize("device_map", [{"": "cpu"}, layers_to("disk"), layers_to("cpu", "disk")], ids=str)
def test_from_pretrained_with_a_device_map(form, device_map, tmp_path):
    llama().save_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert has_hooks(base) == (len(device_map) > 1)
    model = form(base.requires_grad_(False))
    assert all_equal(greedy_left_padded(model), greedy_left_padded(patched(llama())))


# The two kinds of tables: all kept together, or each made when its layer runs.


def gemma3() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "gemma3_text",
        **FAMILIES["gemma2"],
        layer_types=["sliding_attention", "full_attention"] * (NUM_LAYERS // 2),
        sliding_window=16,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("way", [forward, forward_left_padded, greedy_left_padded, static_cache, beams])
@pytest.mark.parametrize(("bank_bytes", "kind"), [(0, TablesOnDemand), (2**20, TableBank)])
@pytest.mark.parametrize("base", [llama, gemma3])
def test_both_kinds_of_tables(base, bank_bytes, kind, way, monkeypatch):
    monkeypatch.setattr(peft_layerrope.tuner.rotary, "BANK_BYTES", bank_bytes)
    expected = way(patched(base()))
    model = adapted(base())
    kinds = set()
    wrapper = next(m for m in model.modules() if isinstance(m, peft_layerrope.tuner.rotary.LayerRopeLayer))
    wrapper.register_forward_hook(lambda module, args, tables: kinds.add(type(tables)))
    assert all_equal(way(model), expected)
    assert kinds == {kind} or (IS_OLDER and kinds == {TablesOnDemand})  # 5.0's rotaries take no stacked frequencies
    assert not all_equal(way(base()), expected)
