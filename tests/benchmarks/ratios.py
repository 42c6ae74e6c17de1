"""Speed as ratios against a baseline, interleaved in one process: median of many.

    python tests/benchmarks/ratios.py

1. packed evaluation (a context shared by its questions runs once) / one row per question
2. decode step and 2,048-token prefill with an adapter / without (hidden 256, 8 layers)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

from peft_layerrope import KeyValueRetrieval, LayerRopeConfig, demo_model_path
from peft_layerrope.evaluation import score


def ratio(subject: Callable[[], object], baseline: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median of the per-round ratios subject / baseline, with the quartiles; one warm-up round."""
    ratios = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        subject()
        between = time.perf_counter()
        baseline()
        ratios.append((between - started) / (time.perf_counter() - between))
    low, middle, high = statistics.quantiles(ratios[1:], n=4)
    return low, middle, high


def evaluation_ratio() -> tuple[float, float, float]:
    model = AutoModelForCausalLM.from_pretrained(demo_model_path()).eval()
    split = KeyValueRetrieval(AutoTokenizer.from_pretrained(demo_model_path()), 512).split("search", 4)
    return ratio(lambda: score(model, split, packed=True), lambda: score(model, split, packed=False), 7)


@torch.inference_mode()
def adapter_ratios() -> dict[str, tuple[float, float, float]]:
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).eval()
    adapted = get_peft_model(
        LlamaForCausalLM(config), LayerRopeConfig(layer_factors=[1.0 + 0.1 * i for i in range(8)])
    ).eval()
    prompt, token = torch.randint(0, 1000, (1, 2048)), torch.tensor([[1]])

    def decoder(model: torch.nn.Module) -> Callable[[], object]:
        cache = DynamicCache(config=config)
        model(prompt[:, :64], past_key_values=cache)
        return lambda: model(token, past_key_values=cache)

    return {
        "decode step": ratio(decoder(adapted.get_base_model()), decoder(base), 200),
        "prefill 2,048": ratio(
            lambda: adapted.get_base_model()(prompt, use_cache=False), lambda: base(prompt, use_cache=False), 15
        ),
    }


def main() -> None:
    table = Table("what", "median ratio", "quartiles")
    measured = {"evaluation: packed / one by one": evaluation_ratio()}
    measured |= {f"{name}: adapter / base": values for name, values in adapter_ratios().items()}
    for name, (low, middle, high) in measured.items():
        table.add_row(name, f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
