"""Many requests in one process: does memory grow, do the logits of a fixed prompt drift?

    python tests/benchmarks/soak.py                # 2,000 calls of generate(), a few minutes on one CPU core
    python tests/benchmarks/soak.py --calls 100

The demo model carries an adapter for each rope type and is asked by each in turn, and without any: by `set_adapter`
and `disable_adapter()` as by `use_adapter`, with lengths on both sides of the trained window, batches, and now and
then an adapter added and deleted. At every report, counted after a garbage collection: live tensors and their bytes,
entries of the caches that the adapter keeps, the bytes that Python holds (tracemalloc), the process's resident memory,
and whether the logits of a fixed prompt under each adapter are still the first ones, bit for bit.

Exits with status 1 if logits drift, or if tensors or cache entries are more at the end than at the first report.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tracemalloc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from peft_layerrope import LayerRopeConfig, demo_model_path, use_adapter
from peft_layerrope.tuner.rotary import LayerRopeLayer
from peft_layerrope.tuner.sites import trained_window

FIELDS = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic_fixed": {"rope_type": "dynamic", "factor": 2.0, "target_length": 1024},
}
NEW_TOKENS = 4


@dataclass(frozen=True)
class Reading:
    """What was counted after `calls` requests."""

    calls: int
    tensors: int
    tensor_bytes: int
    cache_entries: int
    python_bytes: int
    resident_bytes: int
    same_logits: bool

    @property
    def counts(self) -> tuple[int, int, int]:
        """What must not grow at all."""
        return self.tensors, self.tensor_bytes, self.cache_entries


def with_adapters(base: PreTrainedModel) -> PeftModel:
    """Puts one adapter of each kind onto the model, with factors that differ from layer to layer."""
    layers = base.config.get_text_config().num_hidden_layers
    model: PeftModel | None = None
    for number, (name, fields) in enumerate(FIELDS.items()):
        factors = [1 + 0.1 * ((layer + number) % 4) for layer in range(layers)]
        config = LayerRopeConfig(layer_factors=factors, **fields)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.eval()


def soak(model: PeftModel, calls: int, every: int, seed: int = 0) -> Iterator[Reading]:
    """Yields a reading after each `every` requests; the first of them is the one to compare with.

    Args:
        model: from [`with_adapters`].
        calls: how many requests.
        every: requests between readings.
        seed: of lengths and prompts.
    """
    rng, window = random.Random(seed), trained_window(model.get_base_model())
    first = probe(model, window)
    for call in range(1, calls + 1):
        serve(model, call, rng, window)
        if call % every == 0:
            logits = probe(model, window)
            same = all(torch.equal(logits[name], first[name]) for name in first)
            del logits
            yield read(model, call, same)


def serve(model: PeftModel, call: int, rng: random.Random, window: int) -> None:
    """One request: who is asked, and how, goes round; its length and batch are drawn."""
    name = [*FIELDS, None][call % (len(FIELDS) + 1)]
    batch = rng.choice([1, 1, 2, 3])
    length = rng.choice([rng.randint(1, window // 4), rng.randint(window // 4, window), window + rng.randint(0, 32)])
    if call % 50 == 0:
        model.add_adapter("passing", LayerRopeConfig(layer_factors=[rng.uniform(1, 2)] * _num_layers(model)))
        with use_adapter(model, "passing"):
            generate(model, rng, 1, length)
        model.delete_adapter("passing")
    if call // 5 % 2:
        with use_adapter(model, name):
            generate(model, rng, batch, length)
    elif name is None:
        with model.disable_adapter():
            generate(model, rng, batch, length)
    else:
        model.set_adapter(name)
        generate(model, rng, batch, length)


def generate(model: PeftModel, rng: random.Random, batch: int, length: int) -> None:
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.tensor([[rng.randrange(1, vocabulary) for _ in range(length)] for _ in range(batch)])
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=rng.random() < 0.9, **arguments)


def probe(model: PeftModel, window: int) -> dict[str | None, torch.Tensor]:
    """The last logits of a fixed prompt beyond the window, under each adapter and none."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(1, window + 17)[None] * 7 % vocabulary
    answers: dict[str | None, torch.Tensor] = {}
    for name in [*FIELDS, None]:
        with use_adapter(model, name), torch.no_grad():
            answers[name] = model(ids).logits[:, -1].clone()
    return answers


def read(model: PeftModel, calls: int, same_logits: bool) -> Reading:
    """Counts what is alive now."""
    gc.collect()
    # exact types: what torch.compile has left in the process are tensors without numbers
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    layers = [module for module in model.modules() if isinstance(module, LayerRopeLayer)]
    entries = sum(len(layer._scaled) + sum(len(s._on_device) for s in layer.scalings.values()) for layer in layers)
    return Reading(
        calls=calls,
        tensors=len(tensors),
        tensor_bytes=sum(tensor.nelement() * tensor.element_size() for tensor in tensors),
        cache_entries=entries,
        python_bytes=tracemalloc.get_traced_memory()[0],
        resident_bytes=resident_bytes(),
        same_logits=same_logits,
    )


def resident_bytes() -> int:
    """The process's memory, from Linux's /proc; 0 transfer."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def slope(readings: list[Reading], attribute: str) -> float:
    """Bytes per request, the least-squares line through the second half of the readings."""
    later = readings[len(readings) // 2 :]
    x = torch.tensor([[reading.calls, 1] for reading in later], dtype=torch.float64)
    y = torch.tensor([[getattr(reading, attribute)] for reading in later], dtype=torch.float64)
    return torch.linalg.lstsq(x, y).solution[0].item()


def _num_layers(model: PeftModel) -> int:
    return model.config.get_text_config().num_hidden_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100, help="requests between readings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    model = with_adapters(AutoModelForCausalLM.from_pretrained(demo_model_path()).eval())
    tracemalloc.start()
    table = Table("calls", "live tensors", "their MiB", "cache entries", "Python MiB", "resident MiB", "same logits")
    readings: list[Reading] = []
    for reading in soak(model, options.calls, options.every, options.seed):
        readings.append(reading)
        table.add_row(
            f"{reading.calls:,}",
            str(reading.tensors),
            f"{reading.tensor_bytes / 2**20:.3f}",
            str(reading.cache_entries),
            f"{reading.python_bytes / 2**20:.2f}",
            f"{reading.resident_bytes / 2**20:.1f}",
            "yes" if reading.same_logits else "NO",
        )
    console = Console()
    console.print(table)
    if len(readings) >= 4:
        for attribute in ("python_bytes", "resident_bytes"):
            console.print(f"{attribute}: {slope(readings, attribute):+.0f} per request over the second half")
    grown = any(now > then for then, now in zip(readings[0].counts, readings[-1].counts, strict=True))
    sys.exit(grown or not all(reading.same_logits for reading in readings))


if __name__ == "__main__":
    main()
