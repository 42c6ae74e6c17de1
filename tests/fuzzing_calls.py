"""Draws sequences of PEFT calls and compares the logits after each with a model that is patched by hand, in float64.

    python tests/fuzzing_calls.py --sequences 2000 --seed 1  # the nightly run, about ten minutes
    python tests/fuzzing_calls.py --seed 1 --only 17         # that one again
    python tests/fuzzing_calls.py --case '{"family": ...}'   # what a shrunken one is printed as

A case is a tiny model (family, the rope of its own, dtype, attention, cache, padding) and calls: load, add, switch,
disable, delete, bake, save, load again, cast, copy, a LoRA around or beside it and trained for a step, and whatever
else PEFT lets one do under a name that is in use. A `World` keeps what the calls should have led to. The reference is a
plain model of transformers in float64, whose layers are handed tables computed here: not a line of the package. A call
is a name and a number, from which it draws its arguments in whatever state it finds, so that calls can be left out.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from fuzzing import CONFIG, factors_file, write_adapter
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.functional import set_adapter
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from peft_layerrope import LayerRopeConfig, LayerRopeError, load_adapter, restore_baked, use_adapter
from peft_layerrope.tuner.rotary import LayerRopeLayer

NUM_LAYERS = 3
VOCAB = 40
WINDOW = 24
LENGTHS = (9, 23, 30, 40)  # inside the window, near it, beyond it
NAMES = ("default", "second", "third")
LORA_SCALE = 2.0
STEP = 0.05

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": WINDOW,
    "initializer_range": 0.25,  # large enough that positions matter to the logits
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 1}
_LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 16},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "gemma2": {**_GROUPED, "head_dim": 16, "sliding_window": 16},
    "gemma3_text": {**_GROUPED, "head_dim": 16, "sliding_window": 16, "layer_types": _LAYER_TYPES},
    "gpt_neox": _COMMON,
    "phi3": {**_GROUPED, "original_max_position_embeddings": WINDOW},  # else 4096, whatever its rope says
    "cohere": _GROUPED,
    "glm": {**_GROUPED, "head_dim": 16},
    "stablelm": _GROUPED,
}
_PAIRS = {"gpt_neox": 2, "glm": 4, "stablelm": 2}  # of frequencies, where only part of a head is rotated; else 8
BASE_ROPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
REFUSALS = (LayerRopeError, ValueError)


class DifferenceError(AssertionError):
    """What a call led to is not what it should have."""


class NotNowError(Exception):
    """A call has no meaning in the state it finds."""


# What is drawn


@dataclass(frozen=True)
class Case:
    """A model, what it is asked, and what is done to it."""

    family: str
    base_rope: str
    dtype: str
    cast: bool  # to the dtype after it was made, which rounds the frequencies that transformers keeps
    attention: str
    cache: str
    padding: str
    calls: tuple[tuple[str, int], ...]

    @classmethod
    def from_json(cls, text: str) -> Case:
        values = json.loads(text)
        return cls(**{**values, "calls": tuple((name, number) for name, number in values["calls"])})

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def draw(seed: int, index: int) -> Case:
    """The case `index` of a run, always the same."""
    rng = random.Random(f"{seed}/{index}")
    names = [name for name, (weight, _) in CALLS.items() for _ in range(weight)]
    calls = [(rng.choice(("attach", "attach", "attach", "lora")), rng.randrange(10**6))]
    calls += [(rng.choice(names), rng.randrange(10**6)) for _ in range(rng.randint(5, 12))]
    cache = rng.choice(("none", "none", "dynamic", "static"))
    family, base_rope = rng.choice(list(FAMILIES)), rng.choice(("default", *BASE_ROPES))
    return Case(
        family=family,
        base_rope=base_rope if family != "phi3" else rng.choice(("default", "longrope")),  # it takes no others
        dtype=rng.choice(("float32", "float32", "float32", *DTYPES)),
        cast=rng.random() < 0.3,
        attention=rng.choice(("eager", "sdpa")) if family != "gemma2" else "eager",
        cache=cache,
        padding=rng.choice(("none", "none", "left", "masked", "right", "shifted", *["packed"] * (cache == "none"))),
        calls=tuple(calls),
    )


@dataclass(frozen=True)
class Rope:
    """What an adapter says."""

    rope_type: str
    factor: float
    layer_factors: tuple[float, ...]
    original_max_position_embeddings: int | None = None
    target_length: int | None = None

    def config(self) -> LayerRopeConfig:
        return LayerRopeConfig(**{**asdict(self), "layer_factors": list(self.layer_factors)}, task_type="CAUSAL_LM")

    def frequencies(self, base: torch.Tensor, layer: int, seq_len: int, reached: bool) -> torch.Tensor:
        """A layer's, from the model's own: float64, shape `(r / 2,)`; in Python's numbers."""
        factor = self.layer_factors[layer]
        if self.rope_type == "default" or not reached:
            return base / factor
        factor *= self.factor
        if self.rope_type == "linear":
            return base / factor
        window, length = self.original_max_position_embeddings or WINDOW, self.target_length or seq_len
        growth = factor * length / window - (factor - 1) if length > window else 1.0
        pairs = len(base)
        return base * torch.tensor([growth ** (-2 * i / (2 * pairs - 2)) for i in range(pairs)], dtype=torch.float64)


def draw_factors(rng: random.Random) -> tuple[float, ...]:
    kind = rng.random()
    if kind < 0.1:
        return (1.0,) * NUM_LAYERS
    if kind < 0.3:
        layer = rng.randrange(NUM_LAYERS)
        return tuple(rng.choice((0.4, 1.7, 3.0)) if i == layer else 1.0 for i in range(NUM_LAYERS))
    if kind < 0.4:
        return tuple(rng.choice((0.1, 8.0, 1.0)) for _ in range(NUM_LAYERS))
    return tuple(round(math.exp(rng.uniform(-0.8, 1.2)), 3) for _ in range(NUM_LAYERS))


def draw_rope(rng: random.Random) -> Rope:
    rope_type = rng.choice(("default", "default", "linear", "dynamic"))
    factor = 1.0 if rope_type == "default" else rng.choice((1.0, 2.0, 4.0))
    rope = Rope(rope_type, factor, draw_factors(rng))
    if rope_type == "dynamic":
        window, target = rng.choice((None, None, 12)), rng.choice((None, None, 20, 64))
        return replace(rope, original_max_position_embeddings=window, target_length=target)
    return rope


# The model, and what it keeps of frequencies


def config_of(case: Case) -> transformers.PreTrainedConfig:
    pairs = _PAIRS.get(case.family, 8)
    scaled = {
        "default": {},
        "linear": {"factor": 4.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
        "dynamic": {"factor": 4.0},
        "longrope": {
            "factor": 4.0,
            "original_max_position_embeddings": WINDOW,
            "short_factor": [1.0 + i / 8 for i in range(pairs)],
            "long_factor": [2.0 + i for i in range(pairs)],
        },
    }[case.base_rope]
    rope: dict[str, Any] = {"rope_type": case.base_rope, "rope_theta": 10000.0, **scaled}
    if pairs < 8:
        rope["partial_rotary_factor"] = pairs / 8
    if "layer_types" in FAMILIES[case.family]:
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0}}
    fields = {**FAMILIES[case.family], "rope_parameters": rope, "attn_implementation": case.attention}
    return AutoConfig.for_model(case.family, **fields)


def plain_model(case: Case, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same weights at each call, rounded to the dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(case), dtype=torch.float32)
    model.requires_grad_(True)
    if dtype is torch.float32:
        return model.eval()
    # as `from_pretrained(dtype=...)` leaves it: weights in the dtype, frequencies in float32
    kept = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    model.to(dtype)
    for module, name, buffer in kept:
        if name.endswith("inv_freq"):
            module._buffers[name] = buffer
    return model.eval()


class OwnFrequencies:
    """Those of the model itself, by layer type (or ""), as transformers keeps them from call to call."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        rotary = next(m for m in model.modules() if any(name.endswith("inv_freq") for name in m._buffers))
        types = getattr(self.config, "layer_types", None)
        by_type = isinstance(rotary.rope_type, dict)
        self.names = [types[layer] if by_type else "" for layer in range(NUM_LAYERS)]
        self.first, self.kinds, self.scalings = {}, {}, {}
        for name in set(self.names):
            prefix = f"{name}_" if name else ""
            self.first[name] = getattr(rotary, f"{prefix}inv_freq").clone()
            self.kinds[name] = rotary.rope_type[name] if name else rotary.rope_type
            self.scalings[name] = getattr(rotary, f"{prefix}attention_scaling")
        self.live = {name: value.clone() for name, value in self.first.items()}
        self.original = {name: value.clone() for name, value in self.first.items()}
        self.longest = dict.fromkeys(self.first, WINDOW)

    def cast(self, dtype: torch.dtype) -> None:
        for kept in (self.live, self.original):
            for name, value in kept.items():
                kept[name] = value.to(dtype)

    def beyond(self, name: str, seq_len: int) -> torch.Tensor:
        more = {"layer_type": name} if name else {}
        return ROPE_INIT_FUNCTIONS[self.kinds[name]](self.config, torch.device("cpu"), seq_len=seq_len, **more)[0]

    def fresh(self, name: str, seq_len: int) -> torch.Tensor:
        """What a model that has seen nothing uses."""
        if self.kinds[name] in ("dynamic", "longrope") and seq_len > WINDOW:
            return self.beyond(name, seq_len)
        return self.first[name]

    def remembered(self, name: str, seq_len: int) -> torch.Tensor:
        """What transformers' own model uses, and keeps."""
        if self.kinds[name] == "longrope":
            value = self.beyond(name, WINDOW + 1) if seq_len > WINDOW else self.original[name]
            self.live[name] = value.to(self.live[name].dtype)
        if self.kinds[name] == "dynamic":
            longest = self.longest[name]
            if seq_len > longest:
                self.live[name], self.longest[name] = self.beyond(name, seq_len), seq_len
            if seq_len < WINDOW < longest:
                self.live[name], self.longest[name] = self.original[name], WINDOW
        return self.live[name]


# What is asked


@dataclass(frozen=True)
class Probe:
    """One batch, in the chunks in which it goes through the model."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor  # (1 or B, S)
    given: bool  # whether the model is told the positions
    chunks: tuple[int, ...]
    cache: str

    def run(
        self, model: Callable[..., Any], config: Any, before: Callable[[torch.Tensor], None] = lambda _: None
    ) -> Any:
        """Logits of what is no padding, float64, shape `(tokens, VOCAB)`."""
        past = None
        if self.cache == "dynamic":
            past = DynamicCache(config=config)
        if self.cache == "static":
            past = StaticCache(config=config, max_cache_len=self.ids.shape[1])
        parts, start = [], 0
        for size in self.chunks:
            stop = start + size
            positions = self.positions[:, start:stop]
            before(positions)
            more: dict[str, Any] = {"use_cache": past is not None, "past_key_values": past}
            if self.mask is not None:
                more["attention_mask"] = self.mask[:, :stop]
            if self.given:
                more["position_ids"] = positions
            parts.append(model(input_ids=self.ids[:, start:stop], **more).logits)
            start = stop
        logits = torch.cat(parts, dim=1).double()
        return logits.flatten(0, 1) if self.mask is None else logits[self.mask.bool()]


def probe_for(case: Case, number: int) -> Probe:
    rng = random.Random(f"probe {number}")
    length = rng.choice(LENGTHS)
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, VOCAB, (2, length), generator=generator)
    mask, positions, given = None, torch.arange(length)[None], False
    if case.padding in ("left", "masked", "right"):
        mask = torch.ones_like(ids)
        pad = slice(0, 4) if case.padding != "right" else slice(length - 4, length)
        mask[0, pad], ids[0, pad] = 0, 0
        if case.padding == "left":  # as `generate` does
            positions, given = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1), True
    elif case.padding == "shifted":
        positions, given = (torch.arange(length)[None] + 5).expand(2, -1), True
    elif case.padding == "packed":
        ids, positions, given = ids[:1], torch.cat([torch.arange(5), torch.arange(length - 5)])[None], True
    chunks = (length,) if case.cache == "none" else (length - 3, 2, 1)
    return Probe(ids, mask, positions, given, chunks, case.cache)


class Reference:
    """A plain model of transformers, whose layers are handed the tables that they should have."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.model = plain_model(case, dtype)
        self.dtype = dtype
        self.interleaved = case.family == "cohere"
        self.tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        layers = next(m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == NUM_LAYERS)
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._hand_over, index), with_kwargs=True)

    def _hand_over(self, index: int, _: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        assert isinstance(kwargs["position_embeddings"], tuple)
        return args, {**kwargs, "position_embeddings": self.tables[index]}

    def _set_tables(self, rope: Rope | None, own: OwnFrequencies, positions: torch.Tensor) -> None:
        seq_len = int(positions.max()) + 1
        answer = own.remembered if rope is None else own.fresh
        bases = {name: answer(name, seq_len).float().double() for name in own.first}
        self.tables = []
        for layer, name in enumerate(own.names):
            frequencies = bases[name]
            if rope is not None:
                frequencies = rope.frequencies(frequencies, layer, seq_len, reached="sliding" not in name)
            angles = positions[..., None].double() * frequencies
            angles = angles.repeat_interleave(2, -1) if self.interleaved else torch.cat([angles, angles], -1)
            scale = own.scalings[name]
            self.tables.append(((angles.cos() * scale).to(self.dtype), (angles.sin() * scale).to(self.dtype)))

    def run(
        self, weights: dict[str, torch.Tensor], rope: Rope | None, own: OwnFrequencies, probe: Probe
    ) -> torch.Tensor:
        cast = {name: value.to(self.dtype) for name, value in weights.items()}
        return probe.run(
            lambda **inputs: torch.func.functional_call(self.model, cast, (), inputs),
            self.model.config,
            partial(self._set_tables, rope, own),
        )


@lru_cache(maxsize=32)
def _reference(family: str, base_rope: str, attention: str, dtype: torch.dtype) -> Reference:
    return Reference(Case(family, base_rope, "float32", False, attention, "none", "none", ()), dtype)


@contextmanager
def exact_softmax() -> Iterator[None]:
    """Has eager attention keep float64: in float32 the mask overflows, and padding becomes NaN."""
    softmax = nn.functional.softmax

    def keeping(scores: torch.Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        return softmax(scores, *args, dtype=None if scores.dtype == torch.float64 else dtype, **kwargs)

    nn.functional.softmax = keeping
    try:
        yield
    finally:
        nn.functional.softmax = softmax


# What the calls should have led to


@dataclass
class World:
    """A model under test, and what should be in force in it.

    Attributes:
        plain: transformers' model, which everything else is around.
        model: the outermost, which is asked.
        rope: a PeftModel with our adapters.
        injected: whether they are in the plain model without one.
        lora: a PeftModel with a LoRA.
        hollow: whether the LoRA was merged under `rope`.
        ropes: what each adapter says.
        active: which of them is.
        baked: what was baked in.
        deltas: the LoRA's A and B by the name of the module.
    """

    case: Case
    folder: Path
    plain: Any = None
    model: Any = None
    rope: Any = None
    injected: bool = False
    lora: Any = None
    hollow: bool = False
    ropes: dict[str, Rope] = field(default_factory=dict)
    active: str | None = None
    enabled: bool = True
    baked: Rope | None = None
    deltas: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    lora_enabled: bool = True
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    own: Any = None
    dtype: torch.dtype = torch.float32
    number: int = 0
    comparisons: int = 0
    worst: float = 0.0

    def start(self) -> None:
        self.dtype = DTYPES[self.case.dtype]
        first = plain_model(self.case)
        self.weights = {name: value.detach().to(self.dtype).double() for name, value in first.named_parameters()}
        self.fresh(self.case.cast)

    def fresh(self, cast: bool) -> None:
        """A plain model with the weights as they are, and nothing else."""
        self.plain = plain_model(self.case, torch.float32 if cast else self.dtype)
        self.own = OwnFrequencies(self.plain)
        if cast:
            self.plain.to(self.dtype)
            self.own.cast(self.dtype)
        self.plain.load_state_dict(self.weights, strict=False)
        self.model, self.rope, self.injected, self.lora, self.hollow = self.plain, None, False, None, False
        self.ropes, self.active, self.enabled, self.baked = {}, None, True, None
        self.deltas, self.lora_enabled = {}, True

    @property
    def in_force(self) -> Rope | None:
        if self.baked is not None:
            return self.baked
        return self.ropes[self.active] if self.enabled and self.active is not None else None

    @property
    def follows_length(self) -> bool:
        return self.case.base_rope in ("dynamic", "longrope")

    def refuses(self, rope: Rope) -> bool:
        return rope.rope_type == "dynamic" and self.follows_length

    def effective_weights(self) -> dict[str, torch.Tensor]:
        weights = dict(self.weights)
        if self.lora_enabled:
            for name, (a, b) in self.deltas.items():
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + LORA_SCALE * b @ a
        return weights

    def compare(self, note: str = "") -> None:
        """Raises DifferenceError unless the model answers as the reference does."""
        self.comparisons += 1
        probe = probe_for(self.case, self.number)
        reference = partial(_reference, self.case.family, self.case.base_rope, self.case.attention)
        with torch.no_grad():
            kept = copy.deepcopy(self.own)
            wanted = reference(torch.float64).run(self.effective_weights(), self.in_force, self.own, probe)
            actual = probe.run(self.model, self.plain.config)
            limit = 2e-4
            if self.dtype.itemsize < 4:  # as far as a model patched by hand is from float64, in that dtype
                rounded = reference(self.dtype).run(self.effective_weights(), self.in_force, kept, probe)
                limit += 3 * float(_rms(rounded - wanted) / _rms(wanted))
        error = float(_rms(actual - wanted) / _rms(wanted))
        if not error <= limit:
            raise DifferenceError(f"{note}logits are {error:.2g} off, {limit:.2g} expected; in force: {self.in_force}")
        self.worst = max(self.worst, error / limit)

    def scratch(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def write(self, rope: Rope) -> Path:
        """An adapter folder, by the format's description."""
        values = {**CONFIG, **asdict(rope), "layer_factors": list(rope.layer_factors)}
        return write_adapter(self.scratch(), values, factors_file(list(rope.layer_factors)))

    def started(self, name: str, rope: Rope) -> None:
        """An adapter is in the model, and active."""
        self.ropes[name], self.active = rope, name

    def plain_again(self) -> None:
        self.rope, self.injected, self.ropes, self.active, self.enabled = None, False, {}, None, True

    def read_lora(self) -> None:
        """Takes the LoRA's weights as they are."""
        self.deltas = {}
        for name, module in self.lora.named_modules():
            if hasattr(module, "lora_A"):
                a, b = (getattr(module, f"lora_{x}")["default"].weight.detach().double().clone() for x in "AB")
                self.deltas[name.removeprefix("base_model.model.")] = (a, b)


def _rms(value: torch.Tensor) -> torch.Tensor:
    return value.square().mean().sqrt()


def refused(action: Callable[[], Any]) -> None:
    """Raises DifferenceError unless the call does."""
    try:
        action()
    except REFUSALS:
        return
    raise DifferenceError("was not refused")


CALLS: dict[str, tuple[int, Callable[[World, random.Random], None]]] = {}


def call(weight: int) -> Callable:
    def register(function: Callable[[World, random.Random], None]) -> Callable:
        CALLS[function.__name__] = (weight, function)
        return function

    return register


def need(condition: object) -> None:
    if not condition:
        raise NotNowError


@lru_cache
def takes_transformers_methods() -> bool:
    """Whether transformers' own adapter methods take the installed PEFT."""
    try:
        transformers.integrations.peft.check_peft_version(min_version=transformers.integrations.peft.MIN_PEFT_VERSION)
    except ValueError:
        return False
    return True


def by_transformers(world: World) -> bool:
    """Whether its own adapter methods can be asked."""
    loaded = getattr(world.plain, "_hf_peft_config_loaded", False)
    return takes_transformers_methods() and loaded and world.injected and world.lora is None


# The calls. Each says first when it has a meaning, then acts, then what it should have led to.


@call(2)
def attach(world: World, rng: random.Random) -> None:
    rope, name = draw_rope(rng), rng.choice(NAMES)
    way = rng.choice(("get_peft_model", "from_pretrained", "load_adapter", "inject", "add_adapter", "load"))
    if rng.random() < 0.1:
        short = replace(rope, layer_factors=(*rope.layer_factors, 1.5))
        refused(lambda: get_peft_model(world.model, short.config(), name))
        return
    ways: dict[str, Callable[[], Any]] = {
        "get_peft_model": lambda: get_peft_model(world.model, rope.config(), name),
        "from_pretrained": lambda: PeftModel.from_pretrained(world.model, world.write(rope), name),
        "load_adapter": lambda: load_adapter(world.model, world.write(rope), name),
        "inject": lambda: inject_adapter_in_model(rope.config(), world.plain, name),
        "add_adapter": lambda: world.plain.add_adapter(rope.config(), name),
        "load": lambda: world.plain.load_adapter(str(world.write(rope)), adapter_name=name),
    }
    in_plain = way in ("inject", "add_adapter", "load")
    if way in ("add_adapter", "load"):
        # which look for a `peft_config` that is not there once a PeftModel that was taken off has taken it along, or
        # their first adapter, of whatever method, was refused
        marked = world.injected or getattr(world.plain, "_hf_peft_config_loaded", False)
        need(takes_transformers_methods() and (not marked or hasattr(world.plain, "peft_config")))
    if in_plain:
        need(world.lora is None and world.rope is None)
    else:
        # over a LoRA that is beside a rope, a second PeftModel would share the first one's rotary modules
        need(not world.injected and (world.rope is None or world.model is world.rope))
    if world.baked or world.rope or world.refuses(rope) or name in world.ropes:
        refused(ways[way])
        return
    result = ways[way]()
    if in_plain:
        world.injected = True
    else:
        world.rope = world.model = result.eval()
        world.enabled = True
    world.started(name, rope)


@call(3)
def add(world: World, rng: random.Random) -> None:
    need(world.rope)
    rope, name = draw_rope(rng), rng.choice(NAMES)
    if name in world.ropes or world.refuses(rope):
        refused(lambda: world.rope.add_adapter(name, rope.config()))
        return
    world.rope.add_adapter(name, rope.config())
    world.ropes[name] = rope


def replaces_or_refuses(world: World, name: str, rope: Rope, action: Callable[[], Any]) -> None:
    """Under a name in use, either the rotation is the new one's, or the call raises and nothing changes."""
    try:
        action()
    except REFUSALS:
        return
    world.ropes[name] = rope


@call(4)
def load(world: World, rng: random.Random) -> None:
    need(world.rope)
    rope, name = draw_rope(rng), rng.choice(NAMES)
    if name in world.ropes and rng.random() < 0.6:  # the same factors otherwise
        rope = replace(rope, layer_factors=world.ropes[name].layer_factors)
    folder = world.write(rope)

    def action() -> None:
        world.rope.load_adapter(folder, name, is_trainable=rng.random() < 0.3)

    if name in world.ropes:
        replaces_or_refuses(world, name, rope, action)
    elif world.refuses(rope):
        refused(action)
    else:
        action()
        world.ropes[name] = rope


@call(2)
def hotswap(world: World, rng: random.Random) -> None:
    need(world.rope and world.ropes)
    rope, name = draw_rope(rng), rng.choice(sorted(world.ropes))
    replaces_or_refuses(world, name, rope, lambda: hotswap_adapter(world.rope, world.write(rope), name))


@call(2)
def set_state(world: World, rng: random.Random) -> None:
    need((world.rope or world.injected) and world.ropes and not (world.injected and world.lora))
    name = rng.choice(sorted(world.ropes))
    new = replace(world.ropes[name], layer_factors=draw_factors(rng))
    key = "base_model.model.layer_factors" if world.rope else "layer_factors"
    state = {key: torch.tensor(new.layer_factors, dtype=torch.float32)}
    replaces_or_refuses(
        world, name, new, lambda: set_peft_model_state_dict(world.rope or world.plain, state, adapter_name=name)
    )


@call(1)
def get_state(world: World, rng: random.Random) -> None:
    need((world.rope or world.injected) and world.ropes and not (world.injected and world.lora))
    name = rng.choice(sorted(world.ropes))
    state = get_peft_model_state_dict(world.rope or world.plain, adapter_name=name)
    factors = torch.tensor(world.ropes[name].layer_factors, dtype=torch.float32)
    if len(state) != 1 or not torch.equal(next(iter(state.values())), factors):
        raise DifferenceError(f"get_peft_model_state_dict gives {state}, expected {factors}")
    set_peft_model_state_dict(world.rope or world.plain, state, adapter_name=name)


@call(2)
def add_weighted(world: World, rng: random.Random) -> None:
    need(world.rope and len(world.ropes) > 1)
    names = sorted(world.ropes)[:2]
    try:
        world.rope.add_weighted_adapter(names, [0.5, 0.5], "mixed")
    except (*REFUSALS, AttributeError):
        return
    raise DifferenceError("was not refused")


@call(4)
def switch(world: World, rng: random.Random) -> None:
    need(world.rope or world.injected)
    name = rng.choice(NAMES)
    if world.rope:
        if name in world.ropes:
            world.rope.set_adapter(name)
            world.active = name
        else:
            refused(lambda: world.rope.set_adapter(name))
        if len(world.ropes) > 1 and rng.random() < 0.2:
            refused(lambda: world.rope.base_model.set_adapter(sorted(world.ropes)[:2]))
        return
    if by_transformers(world) and rng.random() < 0.5:
        if name not in world.ropes:
            refused(lambda: world.plain.set_adapter(name))
            return
        world.plain.set_adapter(name)
    else:
        need(world.lora is None or name in world.ropes)
        set_adapter(world.plain, name, layer_cls=LayerRopeLayer)  # other methods' names are nothing to it
    if name in world.ropes:
        world.active = name


@contextmanager
def changed(world: World, **fields: Any) -> Iterator[None]:
    before = {name: getattr(world, name) for name in fields}
    for name, value in fields.items():
        setattr(world, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(world, name, value)


@call(3)
def disable(world: World, rng: random.Random) -> None:
    """For as long as the context lasts."""
    need(world.rope and (world.enabled or world.lora is None))
    with world.rope.disable_adapter(), changed(world, enabled=False):
        world.compare("disabled: ")
        if rng.random() < 0.3 and world.ropes:
            name = rng.choice(sorted(world.ropes))
            with use_adapter(world.rope, name), changed(world, enabled=True, active=name):
                world.compare("disabled, use_adapter: ")


@call(2)
def disable_for_good(world: World, rng: random.Random) -> None:
    need(world.rope or world.injected)
    enabled = rng.random() < 0.5
    if world.rope:
        tuner = world.rope.base_model
        (tuner.enable_adapter_layers if enabled else tuner.disable_adapter_layers)()
    else:
        if by_transformers(world) and rng.random() < 0.5:
            (world.plain.enable_adapters if enabled else world.plain.disable_adapters)()
        else:
            for module in world.plain.modules():
                if isinstance(module, LayerRopeLayer):
                    module.enable_adapters(enabled)
    world.enabled = enabled


@call(2)
def use(world: World, rng: random.Random) -> None:
    need((world.rope or world.injected) and world.ropes)
    name = rng.choice((None, *sorted(world.ropes)))
    with use_adapter(world.model, name), changed(world, enabled=name is not None, active=name):
        world.compare("use_adapter: ")


@call(2)
def factors(world: World, rng: random.Random) -> None:
    need(world.rope and world.ropes)
    name, new = rng.choice(sorted(world.ropes)), draw_factors(rng)
    refused(lambda: world.rope.base_model.set_layer_factors(new[1:], name))
    world.rope.base_model.set_layer_factors(new, name)
    world.ropes[name] = replace(world.ropes[name], layer_factors=new)


@call(2)
def delete(world: World, rng: random.Random) -> None:
    need(world.rope or world.injected)
    name = rng.choice(NAMES)
    if world.rope:
        if name not in world.ropes:
            refused(lambda: world.rope.delete_adapter(name))
            return
        need(len(world.ropes) > 1)  # PEFT's PeftModel cannot be without any: a KeyError, of a LoRA's too
        world.rope.delete_adapter(name)
    else:
        need(by_transformers(world) and name in world.ropes)
        world.plain.delete_adapter(name)
    del world.ropes[name]
    if world.active == name:
        world.active = min(world.ropes, default=None)


@call(2)
def merge(world: World, rng: random.Random) -> None:
    """Bakes it in."""
    need(world.rope)
    name = rng.choice(NAMES) if rng.random() < 0.3 else None
    names = None if name is None else [name]
    wanted = world.active if name is None else name
    if wanted is None or wanted not in world.ropes:
        refused(lambda: world.rope.merge_and_unload(adapter_names=names))
        return
    rope = world.ropes[wanted]
    _taken_off(world, world.rope.merge_and_unload(adapter_names=names))
    world.baked = rope


@call(2)
def unload(world: World, rng: random.Random) -> None:
    need(world.rope)
    _taken_off(world, world.rope.unload())


def _taken_off(world: World, result: Any) -> None:
    if world.lora is None:
        world.model = world.plain
        if not world.hollow and result is not world.plain:
            raise DifferenceError(f"{type(result).__name__} was returned, expected the plain model")
    else:
        world.model = world.lora
    world.hollow = False
    world.plain_again()


@call(1)
def merge_in_place(world: World, rng: random.Random) -> None:
    need(world.rope and world.lora is None and world.active)
    world.rope.merge_adapter()
    if rng.random() < 0.5:
        world.compare("merged: ")
        world.rope.unmerge_adapter()


@call(3)
def save_and_load(world: World, rng: random.Random) -> None:
    """Adapters to their folders, and onto a new base; baked models go as a whole."""
    need(world.rope and world.ropes and not world.hollow)
    folder, lora_folder = world.scratch(), world.scratch()
    world.rope.save_pretrained(folder)
    with_lora = world.lora is not None and rng.random() < 0.7
    if world.lora is not None:
        world.lora.save_pretrained(lora_folder)
    name, new_name = rng.choice(sorted(world.ropes)), rng.choice(NAMES)
    rope, deltas = world.ropes[name], world.deltas
    world.fresh(rng.random() < 0.2)
    if with_lora:
        world.lora = world.model = PeftModel.from_pretrained(world.plain, lora_folder, is_trainable=True).eval()
        world.deltas = deltas
    path = folder if name == "default" else folder / name
    world.rope = world.model = PeftModel.from_pretrained(world.model, path, new_name)
    world.started(new_name, rope)


@call(3)
def save_whole(world: World, rng: random.Random) -> None:
    """The model itself, which remembers what is in force in it."""
    need(world.lora is None and (world.baked or world.injected or world.hollow))
    need(not getattr(world.plain, "_hf_peft_config_loaded", False))  # it would save its adapters only
    folder = world.scratch()
    rope = world.in_force
    # its own format, since transformers' load_adapter leaves renamings behind that would be applied to the keys
    world.plain.save_pretrained(folder, save_original_format=False)
    world.fresh(False)
    world.plain = world.model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=world.dtype, attn_implementation=world.case.attention
    ).eval()
    if rope is not None:
        world.model = restore_baked(world.plain)
        world.baked = rope
    else:
        refused(lambda: restore_baked(world.plain))


@call(2)
def duplicate(world: World, rng: random.Random) -> None:
    held = (world.plain, world.rope, world.lora, world.model)
    if rng.random() < 0.5:
        held = copy.deepcopy(held)
    else:
        stream = io.BytesIO()
        torch.save(held, stream)
        stream.seek(0)
        held = torch.load(stream, weights_only=False)
    for model in (world.model, world.plain):  # what happens to the old one is nothing to the new one
        for module in model.modules():
            if isinstance(module, LayerRopeLayer):
                module.scalings.clear()
    world.plain, world.rope, world.lora, world.model = held


@call(1)
def state_dict(world: World, rng: random.Random) -> None:
    report = world.model.load_state_dict(world.model.state_dict())
    if report.missing_keys or report.unexpected_keys:
        raise DifferenceError(f"the model does not take its own state dict: {report}")


@call(2)
def cast(world: World, rng: random.Random) -> None:
    """Everything; the model's own frequencies are rounded by it, ours are not."""
    name = rng.choice(list(DTYPES))
    world.dtype = DTYPES[name]
    world.model.to(world.dtype)
    world.own.cast(world.dtype)
    world.weights = {name: value.to(world.dtype).double() for name, value in world.weights.items()}
    world.deltas = {
        name: tuple(part.to(world.dtype).double() for part in parts) for name, parts in world.deltas.items()
    }


def lora_config(world: World) -> LoraConfig:
    names = {"gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}.get(world.case.family, ["q_proj", "v_proj"])
    return LoraConfig(r=2, lora_alpha=4, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")


@call(3)
def lora(world: World, rng: random.Random) -> None:
    """Around the model, or the model that a rope is on."""
    need(world.lora is None and not world.hollow)
    torch.manual_seed(world.number)
    if world.rope and rng.random() < 0.3:
        refused(lambda: get_peft_model(world.rope, lora_config(world)))
        return
    world.lora = get_peft_model(world.plain, lora_config(world)).eval()
    if world.rope is None or rng.random() < 0.5:
        world.model = world.lora
    world.read_lora()
    world.lora_enabled = True


@call(3)
def train(world: World, rng: random.Random) -> None:
    """One step of the LoRA along its gradient, which has to be that of the reference."""
    need(world.lora is not None and world.lora_enabled)
    trained = {name: p for name, p in world.lora.named_parameters() if p.requires_grad}
    if not trained or not all("lora_" in name for name in trained):
        raise DifferenceError(f"trainable are {sorted(trained)}, expected the LoRA's weights")
    ids = torch.randint(3, VOCAB, (2, rng.choice(LENGTHS)), generator=torch.Generator().manual_seed(world.number))
    whole = Probe(ids, None, torch.arange(ids.shape[1])[None], False, (ids.shape[1],), "none")
    deltas = {name: tuple(part.clone().requires_grad_() for part in parts) for name, parts in world.deltas.items()}
    with changed(world, deltas=deltas):
        reference = _reference(world.case.family, world.case.base_rope, world.case.attention, torch.float64)
        logits = reference.run(world.effective_weights(), world.in_force, world.own, whole)
        wanted = torch.autograd.grad(_loss(logits, ids), [part for parts in deltas.values() for part in parts])
    if world.rope is not None:  # whose checkpoints would not hold the LoRA
        refused(world.rope.train)
    world.lora.train()
    _loss(whole.run(world.model, world.plain.config), ids).backward()
    world.lora.eval()
    modules = {n.removeprefix("base_model.model."): m for n, m in world.lora.named_modules() if hasattr(m, "lora_A")}
    parameters = [getattr(modules[name], f"lora_{x}")["default"].weight for name in deltas for x in "AB"]
    gradients = [p.grad.detach().double() for p in parameters]
    norm = torch.cat([g.flatten() for g in wanted]).norm()
    error = float(torch.cat([(g - w).flatten() for g, w in zip(gradients, wanted, strict=True)]).norm() / norm)
    if not error < (1e-2 if world.dtype.itemsize >= 4 else 1.0):
        raise DifferenceError(f"gradients are {error:.2g} off; in force: {world.in_force}")
    with torch.no_grad():
        for parameter in parameters:
            parameter -= STEP / norm * parameter.grad
            parameter.grad = None
    world.read_lora()


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    logits = logits.unflatten(0, ids.shape)
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@call(1)
def disable_lora(world: World, rng: random.Random) -> None:
    """Injected adapters go with it; those of a PeftModel do not."""
    need(world.lora is not None and world.enabled and world.lora_enabled)
    enabled = world.enabled and not world.injected
    with world.lora.disable_adapter(), changed(world, lora_enabled=False, enabled=enabled):
        world.compare("LoRA disabled: ")


@call(2)
def merge_lora(world: World, rng: random.Random) -> None:
    need(world.lora is not None and world.lora_enabled)
    merged = world.lora.merge_and_unload()
    if merged is not world.plain:
        raise DifferenceError(f"{type(merged).__name__} was returned, expected the plain model")
    wanted = world.effective_weights()
    world.weights = {name: value.detach().double() for name, value in merged.named_parameters()}
    for name, value in wanted.items():  # which of two neighbors it is rounded to is PEFT's affair
        torch.testing.assert_close(world.weights[name], value, rtol=torch.finfo(world.dtype).eps + 1e-6, atol=1e-2)
    _without_lora(world)


@call(1)
def unload_lora(world: World, rng: random.Random) -> None:
    need(world.lora is not None)
    world.lora.unload()
    _without_lora(world)


def _without_lora(world: World) -> None:
    if world.rope is not None:
        world.model, world.hollow = world.rope, True
    else:
        world.model = world.plain
    if world.injected:
        world.injected, world.hollow = False, True
    world.lora, world.deltas = None, {}


@call(2)
def save_lora(world: World, rng: random.Random) -> None:
    """And onto a new base, on which a rope that was around it is put again."""
    need(world.lora is not None and not world.injected)
    folder = world.scratch()
    world.lora.save_pretrained(folder)
    deltas, rope, was_baked = world.deltas, world.in_force, world.baked
    world.fresh(rng.random() < 0.2)
    if rope is not None and was_baked:
        base = get_peft_model(world.plain, rope.config()).merge_and_unload()
        world.baked = rope
    else:
        base = world.plain
    world.lora = world.model = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    world.deltas = deltas
    if rope is not None and not was_baked:
        world.rope = world.model = get_peft_model(world.lora, rope.config()).eval()
        world.started("default", rope)


# Running, and making small what fails


@dataclass
class Outcome:
    """What came of a case: the call that failed, if one did, and why."""

    failed_at: int | None = None
    reason: str = ""
    trace: str = ""
    made: Counter = field(default_factory=Counter)
    comparisons: int = 0
    worst: float = 0.0


def run_case(case: Case) -> Outcome:
    """Makes the calls, comparing after each; stops at the first that leads transfer."""
    outcome = Outcome()
    folder = Path(tempfile.mkdtemp(prefix="fuzzing-calls-"))
    world = World(case, folder)
    at = -1
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), exact_softmax():
            warnings.simplefilter("ignore")
            world.start()
            world.compare("before any call: ")
            for at, (name, number) in enumerate(case.calls):  # noqa: B007
                world.number = number
                try:
                    CALLS[name][1](world, random.Random(number))
                except NotNowError:
                    continue
                outcome.made[name] += 1
                world.compare()
                if world.lora is not None and world.rope is not None:  # two ways to ask one model
                    with changed(world, model=world.lora if world.model is world.rope else world.rope):
                        world.compare("through the other PeftModel: ")
    except Exception as error:  # whatever it is, it is the finding
        outcome.failed_at, outcome.reason = at, f"{type(error).__name__}: {error}"
        outcome.trace = traceback.format_exc()
    finally:
        shutil.rmtree(folder)
    outcome.comparisons, outcome.worst = world.comparisons, world.worst
    return outcome


def shrink(case: Case, outcome: Outcome) -> tuple[Case, Outcome]:
    """Leaves out calls and makes the model plainer, as long as it still fails."""
    simplest = {
        "dtype": "float32",
        "cast": False,
        "cache": "none",
        "padding": "none",
        "base_rope": "default",
        "family": "llama",
        "attention": "eager",
    }
    case = replace(case, calls=case.calls[: outcome.failed_at + 1])
    progress = True
    while progress:
        progress = False
        tries = [replace(case, calls=case.calls[:i] + case.calls[i + 1 :]) for i in range(len(case.calls))]
        tries += [replace(case, **{name: value}) for name, value in simplest.items() if getattr(case, name) != value]
        for smaller in tries:
            result = run_case(smaller)
            if result.failed_at is not None:
                case = replace(smaller, calls=smaller.calls[: result.failed_at + 1])
                outcome, progress = result, True
                break
    return case, outcome


@dataclass
class Summary:
    """A run's figures."""

    sequences: int = 0
    made: Counter = field(default_factory=Counter)
    comparisons: int = 0
    worst: float = 0.0
    findings: list[tuple[int, str]] = field(default_factory=list)  # which sequence, and what is printed of it


def fuzz(seed: int, indices: range, at_most: int = 1, tell: Callable[[str], None] = lambda _: None) -> Summary:
    """Runs cases until `at_most` have failed. A finding names the case, its smallest form and how to run either."""
    summary = Summary()
    for index in indices:
        case = draw(seed, index)
        outcome = run_case(case)
        summary.sequences += 1
        summary.made += outcome.made
        summary.comparisons += outcome.comparisons
        summary.worst = max(summary.worst, outcome.worst)
        if outcome.failed_at is None:
            continue
        smaller, result = shrink(case, outcome)
        call_name = smaller.calls[result.failed_at][0] if result.failed_at >= 0 else "the model"
        text = (
            f"sequence {index}: {call_name}: {result.reason}\n"
            f"  python tests/fuzzing_calls.py --seed {seed} --only {index}\n"
            f"  python tests/fuzzing_calls.py --case '{smaller.to_json()}'"
        )
        summary.findings.append((index, text))
        tell(text)
        if len(summary.findings) >= at_most:
            break
    return summary


def main() -> int:
    """Prints what fails, and a run's figures; 1 if anything did."""
    parser = argparse.ArgumentParser(description="Sequences of PEFT calls against a model patched by hand.")
    parser.add_argument("--sequences", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this one of the run")
    parser.add_argument("--case", help="a case as it was printed")
    parser.add_argument("--findings", type=int, default=10, help="stop after so many")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if arguments.case:
        outcome = run_case(Case.from_json(arguments.case))
        print(f"{outcome.trace}call {outcome.failed_at}" if outcome.failed_at is not None else "as it should be")
        return outcome.failed_at is not None
    started = time.monotonic()
    first = arguments.only or 0
    indices = range(first, first + 1) if arguments.only is not None else range(arguments.sequences)
    summary = fuzz(arguments.seed, indices, arguments.findings, partial(print, flush=True))
    made = ", ".join(f"{name} {count}" for name, count in summary.made.most_common())
    print(
        f"transformers {transformers.__version__}, PEFT {peft.__version__}, seed {arguments.seed}: "
        f"{summary.sequences} sequences, {summary.made.total()} calls, {summary.comparisons} comparisons, "
        f"largest difference {summary.worst:.2f} of its limit, {len(summary.findings)} findings, "
        f"{time.monotonic() - started:.0f} s\n{made}"
    )
    return 1 if summary.findings else 0


if __name__ == "__main__":
    sys.exit(main())
