"""Speed and memory as ratios against a baseline, interleaved in one process: median of many, with the quartiles.

    python tests/benchmarks/ratios.py                 # everything, about five minutes on two CPU cores
    python tests/benchmarks/ratios.py decode memory   # only lines that hold one of these words
    python tests/benchmarks/ratios.py real --model MODEL_FOLDER  # of a real model, each layer with a factor of its own

Run it on a machine that does nothing else: the differences are a hundredth of a forward pass.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.utils import logging

from peft_layerrope import KeyValueWords, LayerRopeConfig, demo_model_path
from peft_layerrope.scoring.scorer import Scorer

SMALL, LARGE = (256, 8), (512, 16)  # hidden size and layers
PROMPT, LONG_PROMPT = 2048, 32768


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of the per-round ratios; of one measurement without noise, the same number thrice."""

    low: float
    median: float
    high: float


def interleaved(subject: Callable[[], object], baseline: Callable[[], object], rounds: int) -> Ratio:
    """Times both in every round, taking turns at going first; three warm-up rounds are not counted."""
    ratios = []
    for number in range(rounds + 3):
        seconds = {}
        for call in (subject, baseline) if number % 2 else (baseline, subject):
            started = time.perf_counter()
            call()
            seconds[call] = time.perf_counter() - started
        ratios.append(seconds[subject] / seconds[baseline])
    return Ratio(*statistics.quantiles(ratios[3:], n=4))


def tiny_llama(hidden_size: int, num_hidden_layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=hidden_size // 64,
        max_position_embeddings=LONG_PROMPT,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def grid_factors(num_hidden_layers: int) -> list[float]:
    """Up to 11 distinct factors, the search's grid, one after the other."""
    return [1.0 + 0.1 * (layer % 11) for layer in range(num_hidden_layers)]


Pair = tuple[torch.nn.Module, torch.nn.Module]


def with_and_without(base: torch.nn.Module, factors: list[float]) -> Pair:
    """The same model with an adapter (below its PeftModel) and without."""
    adapted = get_peft_model(copy.deepcopy(base), LayerRopeConfig(layer_factors=factors))
    return adapted.get_base_model().eval(), base


def pair(shape: tuple[int, int]) -> Pair:
    return with_and_without(tiny_llama(*shape), grid_factors(shape[1]))


def real_pair(folder: str) -> Pair:
    """In the checkpoint's dtype, as many factors as layers.

    The parameters of both are frozen, as PEFT freezes them: for a weight that is, PyTorch's matrix product may copy it
    before it computes the logits of the last token, which for a vocabulary of 150,000 takes a tenth of such a prefill.
    """
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().requires_grad_(False)
    return with_and_without(base, [1 + 0.01 * layer for layer in range(base.config.num_hidden_layers)])


@torch.inference_mode()
def decode(models: Pair, compiled: bool = False, rounds: int = 400) -> Ratio:
    """One token after a prompt of 64, with a KV cache."""
    token = torch.tensor([[1]])

    def decoder(model: torch.nn.Module) -> Callable[[], object]:
        if compiled:
            cache = StaticCache(config=model.config, max_cache_len=512)
            run = torch.compile(model, fullgraph=True, dynamic=False)
        else:
            cache, run = DynamicCache(config=model.config), model
        model(torch.ones(1, 64, dtype=torch.long), past_key_values=cache)
        return lambda: run(token, past_key_values=cache)

    return interleaved(*map(decoder, models), rounds=rounds)


@torch.inference_mode()
def prefill(models: Pair, compiled: bool = False, rounds: int = 21) -> Ratio:
    """A prompt of 2,048 tokens, without a cache."""
    prompt = torch.randint(0, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def prefiller(model: torch.nn.Module) -> Callable[[], object]:
        run = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
        return lambda: run(prompt, use_cache=False, logits_to_keep=1)

    return interleaved(*map(prefiller, models), rounds=rounds)


class PeakMemory(TorchDispatchMode):
    """Bytes of all storages alive at once, at most, of those made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._released, key, size)

    def _released(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def long_prefill_memory(shape: tuple[int, int]) -> Ratio:
    """Extra peak memory of a 32k prefill, in units of one layer's (cos, sin). Shapes only: nothing is computed."""

    def peak(model: torch.nn.Module) -> int:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            prompt = torch.zeros(1, LONG_PROMPT, dtype=torch.long)
            with PeakMemory() as memory:
                model(input_ids=prompt, use_cache=False, logits_to_keep=1)
        return memory.peak

    adapted, base = map(peak, pair(shape))
    head_dim, float32 = 64, 4
    extra = (adapted - base) / (2 * LONG_PROMPT * head_dim * float32)
    return Ratio(extra, extra, extra)


def adapter_loading() -> Ratio:
    """`PeftModel.from_pretrained` of our adapter / of a LoRA of rank 8 on q_proj and v_proj, 32 layers."""
    base = tiny_llama(256, 32)
    with tempfile.TemporaryDirectory() as folder:
        configs = {
            "rope": LayerRopeConfig(layer_factors=grid_factors(32)),
            "lora": LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
        }
        for name, config in configs.items():
            get_peft_model(copy.deepcopy(base), config).save_pretrained(f"{folder}/{name}")

        def loader(name: str) -> Callable[[], object]:
            models = iter([copy.deepcopy(base) for _ in range(rounds + 3)])
            return lambda: PeftModel.from_pretrained(next(models), f"{folder}/{name}")

        rounds = 15
        return interleaved(loader("rope"), loader("lora"), rounds)


def evaluation() -> Ratio:
    """A context shared by its questions runs once / one row for each question."""
    model = AutoModelForCausalLM.from_pretrained(demo_model_path()).eval()
    split = KeyValueWords(AutoTokenizer.from_pretrained(demo_model_path()), 512).split("search", 4)
    return interleaved(
        lambda: Scorer(model).score(split, packed=True), lambda: Scorer(model).score(split, packed=False), 7
    )


def measurements(model: str | None) -> Iterator[tuple[str, Callable[[], Ratio]]]:
    if model is not None:
        name = f"{Path(model).name}, real, a factor for each layer: adapter / base"
        yield f"decode step, {name}", lambda: decode(real_pair(model), rounds=100)
        yield f"prefill {PROMPT:,}, {name}", lambda: prefill(real_pair(model), rounds=9)
    for shape in (LARGE, SMALL):
        size = f"hidden {shape[0]} × {shape[1]} layers"
        yield f"decode step, {size}: adapter / base", lambda shape=shape: decode(pair(shape))
        yield f"prefill {PROMPT:,}, {size}: adapter / base", lambda shape=shape: prefill(pair(shape))
    size = f"hidden {SMALL[0]} × {SMALL[1]} layers"
    yield f"decode step, compiled, {size}: adapter / base", lambda: decode(pair(SMALL), compiled=True, rounds=200)
    yield f"prefill {PROMPT:,}, compiled, {size}: adapter / base", lambda: prefill(pair(SMALL), compiled=True)
    yield f"extra memory, prefill {LONG_PROMPT:,}: layers' tables", lambda: long_prefill_memory(LARGE)
    yield "loading, 32 layers: adapter / LoRA r=8", adapter_loading
    yield "evaluation: packed / one by one", evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="measure only lines that hold one of these words")
    parser.add_argument("--model", help="folder of a real model")
    asked = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    table = Table("what", "median", "quartiles")
    for name, measure in measurements(asked.model):
        if not asked.words or any(word in name for word in asked.words):
            ratio = measure()
            table.add_row(name, f"{ratio.median:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
