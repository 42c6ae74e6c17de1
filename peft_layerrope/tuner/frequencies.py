"""A rotary module's own frequencies: in float32, whatever was cast, and for the current length, whatever ran before."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_REACHES_ALL = ("modernbert", "modernbert-decoder", "dots3_note_text")
"""Families whose configs copy a `rope_scaling` to the tables of all layer types."""

_UNSCALED_TABLES = ("sliding", "unscaled")  # in the name of a layer type, or of the rotary embedding
_UNSCALED_LAYER_TYPES = {"deepseek_v4": ("main",)}  # that of its sliding layers


def inv_freq_names(rotary: nn.Module) -> list[str]:
    """Returns the names of a module's frequency vectors: `inv_freq`, or one per layer type; none if it has none."""
    return [
        name
        for name, buffer in rotary.named_buffers(recurse=False)
        if name.endswith("inv_freq")
        and not name.endswith("original_inv_freq")
        and buffer.ndim == 1
        and buffer.is_floating_point()
    ]


def layer_type_of(name: str) -> str:
    """Returns the layer type of a frequency vector, such as `sliding_attention`; empty for a plain `inv_freq`."""
    return name.removesuffix("inv_freq").removesuffix("_")


def rope_type_of(rotary: nn.Module, name: str) -> str:
    """Returns transformers' rope type of one of a module's frequency vectors."""
    rope_type = getattr(rotary, "rope_type", "default")
    return rope_type.get(layer_type_of(name), "default") if isinstance(rope_type, dict) else rope_type


def is_length_dependent(rotary: nn.Module) -> bool:
    """Whether transformers rewrites the module's frequencies by length, for any of its layer types."""
    rope_type = getattr(rotary, "rope_type", "default")
    return any(map(_follows_length, rope_type.values() if isinstance(rope_type, dict) else [rope_type]))


def _follows_length(rope_type: object) -> bool:
    # as transformers' `dynamic_rope_update` asks
    return isinstance(rope_type, str) and ("dynamic" in rope_type or rope_type == "longrope")


def rope_type_reaches(model_type: str, table: str) -> bool:
    """Whether transformers' `rope_scaling` reaches a table of a family with several: that of its full-attention
    layers, and not that of its sliding ones, but for a few families. `table` is a layer type, or the dotted name of a
    rotary embedding; empty where there is only one table.
    """
    last = table.rpartition(".")[2]
    unscaled = last in _UNSCALED_LAYER_TYPES.get(model_type, ()) or any(word in last for word in _UNSCALED_TABLES)
    return model_type in _REACHES_ALL or not unscaled


def own_frequencies(rotary: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the frequencies of a model's rotary module as its config states them, before any length was seen: by
    name, each of shape `(r / 2,)`, float32, on the module's device, or on the CPU if that is `meta`.

    A module that was cast to bfloat16 or float16 holds rounded ones; these are computed again, by the model's own code.
    Frequencies that are no rounding of the config's were put there by somebody, and are taken as they stand.
    """
    with torch.inference_mode(False):
        stated = _stated_frequencies(rotary, model)
        found = {}
        for name in inv_freq_names(rotary):
            live = getattr(rotary, name)
            device = "cpu" if live.is_meta else live.device
            if _follows_length(rope_type_of(rotary, name)):
                live = getattr(rotary, name.removesuffix("inv_freq") + "original_inv_freq", live)
            value = stated[name] if live.is_meta else _unrounded(live.detach().cpu().clone(), stated[name])
            found[name] = value.to(device)
        return found


def _stated_frequencies(rotary: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    """What transformers makes of the module's config when it loads a checkpoint, which has no frequencies in it: by
    name, float32 on the CPU. NaN where the model's code does not.
    """
    blank = copy.copy(rotary)
    blank._buffers = dict(rotary._buffers)
    blank._parameters = {  # a family with learned ones writes into them too
        name: nn.Parameter(torch.zeros(parameter.shape, device="cpu"), requires_grad=False)
        for name, parameter in rotary.named_parameters(recurse=False)
    }
    for own in (blank.__dict__, blank._buffers):  # every tensor is one of its own, for that code writes into them
        for name, value in own.items():
            if isinstance(value, torch.Tensor):
                own[name] = torch.full(value.shape, torch.nan, dtype=torch.float32, device="cpu")
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    owners = [owner for owner in models if any(module is rotary for module in owner.modules())]
    if owners:
        with torch.no_grad(), torch.device("cpu"):
            owners[-1]._init_weights(blank)  # the innermost one's, as in `from_pretrained`
    return {name: blank._buffers[name] for name in inv_freq_names(rotary)}


def _unrounded(live: torch.Tensor, stated: torch.Tensor) -> torch.Tensor:
    """Returns `stated` if `live` is what a cast has made of it, else `live`: both `(r / 2,)` on the CPU."""
    live = live.float()
    rounded = any(torch.equal(live, live.to(half).float()) for half in (torch.bfloat16, torch.float16))
    if rounded and torch.allclose(live, stated, rtol=2**-8, atol=2**-25):  # of bfloat16; float16's smallest numbers
        return stated
    return live


def frequencies_at(
    rotary: nn.Module, own: dict[str, torch.Tensor], position_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Returns the frequencies that transformers' `dynamic_rope_update` gives a fresh model for these positions.

    transformers' own depend on the calls before: they are kept until a longer prompt comes, or one inside the window.
    Here the module's state is neither read nor changed. `own` is what [`own_frequencies`] returns, on the device of
    `position_ids`.
    """
    seq_len = position_ids.max() + 1
    found = {}
    for name, inv_freq in own.items():
        rope_type, layer_type = rope_type_of(rotary, name), layer_type_of(name)
        if not _follows_length(rope_type):
            found[name] = inv_freq
            continue
        if rope_type == "longrope":
            parameters = rotary.config.rope_parameters
            parameters = parameters[layer_type] if layer_type else parameters
            window = parameters["original_max_position_embeddings"]
            asked: Any = window + 1  # any length beyond the window has the same
        else:
            window, asked = rotary.original_max_seq_len, seq_len
        beyond, _ = ROPE_INIT_FUNCTIONS[rope_type](
            rotary.config, inv_freq.device, seq_len=asked, layer_type=layer_type or None
        )
        found[name] = torch.where(seq_len > window, beyond, inv_freq)
    return found


@contextmanager
def without_memory(model: nn.Module) -> Iterator[None]:
    """Has transformers' own length-dependent rotary embeddings forget, before each call, those before it.

    What a model answers then depends on what it is given, and not on what ran earlier. Afterwards they are as they
    were found.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if is_length_dependent(module) and inv_freq_names(module):
                stack.callback(_put_back, module, dict(module.__dict__), dict(module._buffers))
                stack.callback(module.register_forward_pre_hook(_forget).remove)
        yield


def _forget(rotary: nn.Module, *_: Any) -> None:
    for name in inv_freq_names(rotary):
        prefix = name.removesuffix("inv_freq")
        setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)
        rotary._buffers[name] = getattr(rotary, f"{prefix}original_inv_freq").clone()


def _put_back(rotary: nn.Module, attributes: dict[str, Any], buffers: dict[str, torch.Tensor | None]) -> None:
    rotary.__dict__.clear()
    rotary.__dict__.update(attributes)
    rotary._buffers.clear()
    rotary._buffers.update(buffers)
