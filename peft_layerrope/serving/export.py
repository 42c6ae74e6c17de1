"""Checkpoints that need no library: the factors as plain entries of a config, or as fifty lines of remote code."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..base_model import ModelSource, adapted, empty_model, load_base
from ..errors import AdapterMismatchError, LayerRopeError
from ..files import replacing_files, to_json
from ..searcher.harm import divergences, window_logits
from ..tuner.config import LayerRopeConfig
from ..tuner.injection import layer_frequencies, scaling_for
from ..tuner.scaling import plain_rope
from ..tuner.sites import find_stack, table_types, text_config, trained_window
from ..tuner.tables import family_table, table_parts
from . import modeling_layer_rope

_PROBE_TOKENS = 256
_TOLERANCE = 1e-3  # of the largest logit; other kernels of attention differ by less
_CODE, _SCALED = Path(modeling_layer_rope.__file__), modeling_layer_rope.ScaledForCausalLM.__name__
_FOREVER = 1_000_000  # tokens, a sliding window that never ends
_FULL, _SLIDING = "full_attention", "sliding_attention"

_Frequencies = list[tuple[torch.Tensor, torch.Tensor]]  # of each layer: its own, and the scaled ones
_Checkpoint = tuple[PretrainedConfig, dict[str, torch.Tensor]]  # a config, and weights that the model has not


def export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: LayerRopeConfig, form: str, folder: str | Path
) -> float:
    """Writes a checkpoint of the scaled model that transformers loads on its own, in one of `FORMATS`, and compares it
    with the adapter. The base model is in float32 afterwards.

    Returns:
        The largest difference of a logit between the checkpoint and the adapter, on 256 tokens, in float32.

    Raises:
        LayerRopeError: the form cannot say this, or the model cannot be scaled; the message names the layers. Or what
            was written does not answer as the adapter does; nothing is left of it.
    """
    made, tensors = FORMATS[form](model, config)
    written = empty_model(made)
    written.load_state_dict({**model.state_dict(), **tensors}, assign=True)
    written.generation_config = model.generation_config
    is_remote = form == "remote-code"
    with replacing_files(Path(folder), "config.json") as staging:
        # as the model's own type is written in other names, which are not known of the type that the code has
        written.save_pretrained(staging, save_original_format=not is_remote)
        tokenizer.save_pretrained(staging)
        if is_remote:
            _add_code(staging, model)
        return _difference(model, config, _reopened(staging, type(model) if is_remote else None))


def _add_code(folder: Path, model: PreTrainedModel) -> None:
    """Puts the code into a checkpoint. Programs that go by the names in a config refuse these, instead of loading it
    unscaled.
    """
    code = _CODE.read_text(encoding="utf-8").replace("LlamaForCausalLM", type(model).__name__)
    code = code.replace("LlamaConfig", type(model.config).__name__)
    (folder / _CODE.name).write_text(code, encoding="utf-8")
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | {
        "model_type": modeling_layer_rope.ScaledConfig.model_type,
        "architectures": [_SCALED],
        "auto_map": {"AutoConfig": f"{_CODE.stem}.ScaledConfig", "AutoModelForCausalLM": f"{_CODE.stem}.{_SCALED}"},
    }
    path.write_text(to_json(content, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def divergence_between(
    model: PreTrainedModel, config: LayerRopeConfig, other: LayerRopeConfig, prompts: Sequence[Sequence[int]]
) -> float:
    """Returns the Kullback-Leibler divergence in nats, a mean over the tokens of prompts, of what a model expects with
    an adapter's factors from what it expects with another's.
    """
    logits: list[list[torch.Tensor]] = []
    for one in (config, other):
        with adapted(model, one) as scaled:
            logits.append([window_logits(scaled, prompt, range(len(prompt))) for prompt in prompts])
    return torch.cat([divergences(*pair) for pair in zip(*logits, strict=True)]).mean().item()


def _reopened(folder: Path, base: type[PreTrainedModel] | None) -> PreTrainedModel:
    """Loads what was written, in float32. The class of a checkpoint with code is made here of what that code says, and
    of the model's own class `base`: no code runs from a file.
    """
    if base is None:
        return load_base(ModelSource(str(folder), device="cpu", dtype="float32", attn_implementation="eager"))
    config = type("ScaledConfig", (base.config_class,), {"model_type": modeling_layer_rope.ScaledConfig.model_type})
    scaled = type(_SCALED, (modeling_layer_rope.ScaledLayers, base), {"config_class": config})
    return scaled.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def _difference(model: PreTrainedModel, config: LayerRopeConfig, reopened: PreTrainedModel) -> float:
    count = min(_PROBE_TOKENS, trained_window(model) or _PROBE_TOKENS)
    ids = torch.randint(text_config(model).vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    with adapted(model.float(), config) as scaled:
        wanted = scaled(ids.to(model.device)).logits.cpu()
    difference = (reopened(ids).logits - wanted).abs().max().item()
    if not difference <= _TOLERANCE * wanted.abs().max().item():
        raise LayerRopeError(
            f"what was exported differs from the adapter by {difference:.3g} in a logit of {count} tokens."
        )
    return difference


def _granite_swa(model: PreTrainedModel, config: LayerRopeConfig) -> _Checkpoint:
    """A base per layer, and one linear factor for all, in the model of Granite with sliding windows."""
    old, frequencies = model.config, layer_frequencies(config, model)
    _check_family("granite-swa", old, "llama", "mistral", "qwen2")
    stated = _stated("granite-swa", frequencies)
    factors = [factor for _, factor in stated]
    _check_layers("granite-swa", [factor != factors[0] for factor in factors], "one factor for all, a base for each")
    has_bias = old.model_type == "qwen2" or getattr(old, "attention_bias", False)
    heads = old.num_attention_heads
    head_dim = getattr(old, "head_dim", None) or old.hidden_size // heads
    made = _converted(
        old,
        "granite_swa",
        head_dim=head_dim,
        attention_multiplier=head_dim**-0.5,
        attention_bias=has_bias,
        rope_parameters=_parameters(stated[0]),
        layer_rope_theta=[base for base, _ in stated],
        layer_types=[_FULL] * len(stated),
        sliding_window=_FOREVER,  # of no layer
    )
    tensors = {}
    for layer in range(len(stated)):
        place = f"model.layers.{layer}.self_attn"
        # no share of the attention: as far below every score as the dtype allows
        tensors[f"{place}.sinks"] = torch.full((heads,), -1e4 if model.dtype == torch.float16 else -1e9)
        if old.model_type == "qwen2":
            tensors[f"{place}.o_proj.bias"] = torch.zeros(old.hidden_size)
    return made, {name: value.to(model.device, model.dtype) for name, value in tensors.items()}


def _mellum(model: PreTrainedModel, config: LayerRopeConfig) -> _Checkpoint:
    """Two ropes, told apart by a layer type, in the model of Mellum."""
    old, frequencies = model.config, layer_frequencies(config, model)
    _check_family("mellum", old, "qwen3")
    stated = _stated("mellum", frequencies)
    kinds = list(dict.fromkeys(stated))
    _check_layers("mellum", [rope not in kinds[:2] for rope in stated], "two ropes")
    made = _converted(
        old,
        "mellum",
        rope_parameters={_FULL: _parameters(kinds[0]), _SLIDING: _parameters(kinds[-1])},
        layer_types=[_FULL if rope == kinds[0] else _SLIDING for rope in stated],
        mlp_layer_types=["dense"] * len(stated),
        sliding_window=_FOREVER,
    )
    return made, {}


def _layer_types(model: PreTrainedModel, config: LayerRopeConfig) -> _Checkpoint:
    """A rope for each type of layers, in the model's own class; one rope for all where it has no such types."""
    frequencies = layer_frequencies(config, model)
    made = copy.deepcopy(model.config)
    text, kinds = made.get_text_config(decoder=True), table_types(model, len(frequencies))
    firsts = [kinds.index(kind) for kind in kinds]
    differ = [not torch.equal(f[1], frequencies[first][1]) for f, first in zip(frequencies, firsts, strict=True)]
    _check_layers("layer-types", differ, "one factor for all layers of a type")
    scaled = [layer for layer in set(firsts) if not torch.equal(*frequencies[layer])]
    for layer, rope in zip(scaled, _stated("layer-types", frequencies, scaled), strict=True):
        kept = text.rope_parameters[kinds[layer]] if kinds[layer] else text.rope_parameters
        changed = {**kept, **_parameters(rope)}
        text.rope_parameters = {**text.rope_parameters, kinds[layer]: changed} if kinds[layer] else changed
    return made, {}


def _remote_code(model: PreTrainedModel, config: LayerRopeConfig) -> _Checkpoint:
    """Any factors, by `modeling_layer_rope.py` in the folder, which loads with `trust_remote_code=True`."""
    stack = find_stack(model)
    scaling = scaling_for(config, model, stack)
    if len(stack.sites) > 1 or any(table_types(model, len(stack.layers))):
        raise AdapterMismatchError("remote-code takes models whose layers share one rotary table.")
    if getattr(transformers, type(model).__name__, None) is not type(model):
        raise AdapterMismatchError(f"remote-code takes models of transformers, and this is a {type(model).__name__}.")
    if not (hasattr(model.base_model, "layers") and _has_angles_twice(stack.sites[0].original)):
        raise AdapterMismatchError(
            "remote-code takes models with `layers`, and a table of cosines and sines of all angles, twice side by "
            f"side: {model.config.model_type} has another."
        )
    made = copy.deepcopy(model.config)
    made.layer_rope_scaling = scaling.to_plain()
    return made, {}


@torch.no_grad()
def _has_angles_twice(rotary: nn.Module) -> bool:
    """Whether the table is one that the code can make."""
    device = rotary.inv_freq.device
    positions = torch.arange(3, device=device)[None]
    table = family_table(rotary, lambda _, frequencies: frequencies, torch.zeros(1, 3, 1, device=device), positions)
    angles = positions[..., None] * rotary.inv_freq.float()
    expected = torch.cat([angles, angles], dim=-1).cos() * rotary.attention_scaling
    first = table_parts(table)[0]
    return first.shape == expected.shape and torch.allclose(first, expected, atol=1e-5)


FORMATS: dict[str, Callable[[PreTrainedModel, LayerRopeConfig], _Checkpoint]] = {
    "granite-swa": _granite_swa,
    "mellum": _mellum,
    "layer-types": _layer_types,
    "remote-code": _remote_code,
}
"""The forms of a checkpoint, by name."""


def _parameters(rope: tuple[float, float]) -> dict[str, Any]:
    base, factor = rope
    kind = {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
    return {"rope_theta": base, **kind}


def _stated(form: str, frequencies: _Frequencies, layers: list[int] | None = None) -> list[tuple[float, float]]:
    """What a config can say of the layers' ropes, before and after scaling; refuses those of which it cannot."""
    every = range(len(frequencies))
    both = {layer: [plain_rope(f) for f in frequencies[layer]] for layer in (every if layers is None else layers)}
    _check_layers(form, [None in both.get(layer, ()) for layer in every], "a base and a linear factor")
    return [stated for _, stated in both.values()]


def _check_layers(form: str, refused: list[bool], expected: str) -> None:
    layers = [layer for layer, is_refused in enumerate(refused) if is_refused]
    if layers:
        raise AdapterMismatchError(f"{form} can say {expected}, and not what layers {layers} need: use remote-code.")


def _check_family(form: str, config: PretrainedConfig, *families: str) -> None:
    slides = _SLIDING in (getattr(config, "layer_types", None) or ())
    if config.model_type not in families or slides:
        raise AdapterMismatchError(
            f"{form} takes the weights of {', '.join(families)} without sliding windows, and this is a "
            f"{config.model_type}{' with such' * slides}: use remote-code."
        )


def _converted(old: PretrainedConfig, model_type: str, **values: Any) -> PretrainedConfig:
    """Returns a config of another family, with what the old one says wherever both have a field of that name."""
    if model_type not in CONFIG_MAPPING:
        raise LayerRopeError(f"this transformers has no {model_type}: install a newer one.")
    kind = CONFIG_MAPPING[model_type]
    names = {one.name for one in fields(kind) if one.init} - {"architectures", "model_type", "transformers_version"}
    return kind(**{**{name: value for name, value in old.to_dict().items() if name in names}, **values})
