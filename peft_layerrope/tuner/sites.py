"""Finds the decoder layers of a model and the rotary embeddings that feed them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from ..errors import UnsupportedModelError
from .frequencies import inv_freq_names, layer_type_of
from .rotary import BakedLayerRope, LayerRopeLayer, RotaryShell
from .tables import family_table, split_tables, stacked_tables, table_parts

_UNSCALABLE = {
    "diffusion_gemma": "its decoder attends to keys that an encoder with a rotary embedding of its own has rotated, so "
    "scaling the decoder alone would set queries and keys at odds.",
}
"""Families where every layer's own rotation can be scaled and the result would still be wrong."""


@dataclass(frozen=True)
class RotarySite:
    """Where one rotary embedding sits."""

    owner: nn.Module
    attribute: str
    name: str  # dotted name of the rotary in the model, e.g. "model.rotary_emb"
    layer_idx: int | None  # the decoder layer it sits in; None when the layers share it

    @property
    def rotary(self) -> nn.Module:
        """The module that sits there now: the family's own, or our wrapper."""
        return getattr(self.owner, self.attribute)

    @property
    def original(self) -> nn.Module:
        """The family's own module, whether it is wrapped or not."""
        return self.rotary.original if isinstance(self.rotary, RotaryShell) else self.rotary

    def replace(self, module: nn.Module) -> None:
        """Puts `module` in the rotary's place."""
        setattr(self.owner, self.attribute, module)


@dataclass(frozen=True)
class DecoderStack:
    """The text decoder's layers, first to last, and every rotary embedding that serves them (at least one)."""

    layers: nn.ModuleList
    sites: tuple[RotarySite, ...]
    key_sources: tuple[int, ...]  # the layer whose keys each one attends to: itself, but for a shared KV cache

    @property
    def has_shared(self) -> bool:
        """Whether some rotary embedding is shared by the layers, so that their hooks are needed."""
        return any(site.layer_idx is None for site in self.sites)

    def wrappers(self) -> list[LayerRopeLayer]:
        """The tuner layers at the sites; empty when no adapter is injected."""
        return [site.rotary for site in self.sites if isinstance(site.rotary, LayerRopeLayer)]

    @property
    def is_baked(self) -> bool:
        """Whether factors are baked in."""
        return any(isinstance(site.rotary, BakedLayerRope) for site in self.sites)


def model_type(model: nn.Module) -> str:
    """Returns transformers' `model_type`, or the class name of a model without one."""
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def text_config(model: nn.Module) -> PretrainedConfig:
    """Returns the configuration of the model's text decoder; raises UnsupportedModelError if there is none."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(f"{model_type(model)}: not a transformers model (it has no `config`).")
    return config.get_text_config(decoder=True)


def trained_window(model: nn.Module) -> int | None:
    """Returns how many tokens the model was trained on, as its config says; None if it does not."""
    return getattr(text_config(model), "max_position_embeddings", None)


def table_types(model: nn.Module, num_layers: int) -> list[str]:
    """Returns each layer's type, where the types have rotary tables of their own; else empty texts."""
    config = text_config(model)
    parameters = getattr(config, "rope_parameters", None) or {}
    if not any(isinstance(entries, dict) for entries in parameters.values()):
        return [""] * num_layers
    return list(config.layer_types)


def embedding_table(model: nn.Module) -> torch.Tensor:
    """Returns the table of the model's input embeddings, whose first dimension is the vocabulary; raises
    UnsupportedModelError if its inputs are not token ids.
    """
    module = model.get_input_embeddings()
    tables = [parameter for parameter in module.parameters() if parameter.ndim == 2] if module is not None else []
    if not tables:
        raise UnsupportedModelError(f"{model_type(model)} has no table of token embeddings, so it takes no token ids.")
    return tables[0]


def find_stack(model: nn.Module) -> DecoderStack:
    """Returns the decoder layers and their rotary embeddings: modules with `inv_freq` vectors, or our wrappers.

    A rotary serves the layers if the module that holds the list of `num_hidden_layers` layers holds it too,
    beside them or inside one of them. In a vision-language model only the language model is looked at. Raises
    UnsupportedModelError if there is none, or it is not clear which; the message names the model type and why.
    """
    kind, config = model_type(model), text_config(model)
    depths = {getattr(config, name, None) for name in ("num_hidden_layers", "num_layers")} - {None}
    for root, prefix in _roots(model):
        found = [
            (f"{prefix}{name}".strip("."), owner, list_name, layers)
            for name, owner in root.named_modules()
            for list_name, layers in owner.named_children()
            if isinstance(layers, nn.ModuleList) and len(layers) in depths
        ]
        stacks = [
            DecoderStack(layers, sites, _key_sources(config, len(layers)))
            for name, owner, list_name, layers in found
            if (sites := tuple(_rotary_sites(name, owner, list_name)))
        ]
        if found:
            break  # its layers are the decoder's, with a rotary or without; those of an encoder must not stand in
    reason = _UNSCALABLE.get(kind) or _why_not_one(stacks, bool(found), model)
    if reason:
        raise UnsupportedModelError(f"{kind}: {reason}")
    return stacks[0]


def _roots(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where to look, with its dotted prefix: what transformers takes for the decoder, then the whole model.

    The second is for models whose `get_decoder()` answers with something else (modernbert-decoder: the LM head).
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for name, module in model.named_modules():
        if module is decoder and module is not model:
            yield module, f"{name}."
    yield model, ""


def _rotary_sites(prefix: str, owner: nn.Module, list_name: str) -> Iterator[RotarySite]:
    inside = set()  # what our wrappers hold is not a site of its own
    for name, module in owner.named_modules():
        if isinstance(module, RotaryShell):
            inside.update(f"{name}.{child}" for child, _ in module.named_modules() if child)
        elif not inv_freq_names(module):
            continue
        if name in inside or not name:
            continue
        path = name.split(".")
        layer_idx = int(path[1]) if path[0] == list_name else None
        parent = owner.get_submodule(".".join(path[:-1]))
        is_beside = len(path) == 1 or (len(path) == 2 and isinstance(parent, nn.ModuleList))
        if layer_idx is None and not is_beside:
            continue  # in another part of the model (an image encoder), which has a rotary of its own
        yield RotarySite(parent, path[-1], f"{prefix}.{name}".strip("."), layer_idx)


def _key_sources(config: PretrainedConfig, num_layers: int) -> tuple[int, ...]:
    """Who computes the keys that each layer attends to, from the two ways in which families configure sharing.

    `kv_source_layers` (mistral_large4) says it; with `num_kv_shared_layers` (gemma3n, gemma4) the last layers reuse
    the keys of the last layer before them that has their layer type.
    """
    if getattr(config, "kv_source_layers", None):
        return tuple(config.kv_source_layers)
    first_shared = num_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    layer_types = getattr(config, "layer_types", None) or [None] * num_layers
    latest = {layer_types[layer]: layer for layer in range(first_shared)}
    return tuple(layer if layer < first_shared else latest[layer_types[layer]] for layer in range(num_layers))


def _why_not_one(stacks: list[DecoderStack], has_layers: bool, model: nn.Module) -> str:
    """Why what was found in a model is not one stack that can be scaled; empty if it is."""
    if not stacks:
        rotaries = [name for name, module in model.named_modules() if inv_freq_names(module)]
        if not rotaries:
            return "no rotary embedding with an `inv_freq` was found, so there is no rotation to scale."
        if not has_layers:
            return "no list of `num_hidden_layers` decoder layers was found."
        return f"its rotary embedding ({', '.join(rotaries[:3])}) does not serve the list of decoder layers."
    if len(stacks) > 1:
        names = ", ".join(stack.sites[0].name for stack in stacks)
        return f"has several stacks of decoder layers with a rotary ({names})."
    if len(set(stacks[0].layers)) < len(stacks[0].layers):
        return "a decoder layer stands at several places of its list, of which each would have a factor of its own."
    for index, layer in enumerate(stacks[0].layers if stacks[0].has_shared else ()):
        parameters = inspect.signature(layer.forward).parameters
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        if "position_embeddings" not in parameters and not takes_any:
            return (
                f"decoder layer {index} ({type(layer).__name__}) takes no `position_embeddings`, so the shared rotary "
                "embedding cannot be scaled per layer."
            )
    return ""


# What a family's code raises when it is not called the way it expects.
_CALL_ERRORS = (TypeError, AttributeError, RuntimeError, ValueError, KeyError, IndexError)


def prove_rotary_scales(rotary: nn.Module, kind: str) -> None:
    """Proves that the rotary's tables follow the frequencies that it is given, for each of its layer types; raises
    UnsupportedModelError if the family recomputes them, so that scaling would silently do nothing.

    The table for `inv_freq / 2` at positions `2p` must equal the one for `inv_freq` at `p` (halving and doubling
    are exact in floating point), and differ from the one for `inv_freq` at `2p`. Runs on the CPU with
    frequencies of its own, so it needs neither the model's device nor its weights. The module is not changed.
    """
    x = torch.zeros(1, 8, 1)
    for arguments in _layer_types(rotary):
        positions = torch.arange(8)[None]
        if not _takes(rotary, x, positions, arguments):
            positions = positions.expand(3, -1, -1)  # where transformers is older, mrope takes no other
        try:
            reference = _table(rotary, 1, x, positions, arguments)
            halved = _table(rotary, 2, x, positions * 2, arguments)
            unscaled = _table(rotary, 1, x, positions * 2, arguments)
        except _CALL_ERRORS as error:
            raise UnsupportedModelError(
                f"{kind}: {type(rotary).__name__} cannot be called with another `inv_freq` ({error})."
            ) from error
        follows = all(torch.allclose(a, b, atol=1e-6) for a, b in zip(halved, reference, strict=True))
        changes = any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(halved, unscaled, strict=True))
        if not (follows and changes):
            raise UnsupportedModelError(
                f"{kind}: {type(rotary).__name__} does not rotate by the `inv_freq` it is given, so scaling it would "
                "silently do nothing."
            )


def tables_can_be_stacked(rotary: nn.Module) -> bool:
    """Whether [`stacked_tables`] gives bit for bit what [`family_table`] gives, on this module.

    Compared with two sets of frequencies on two rows of different positions, and on one row.
    """
    x = torch.zeros(2, 5, 1)
    two_rows = torch.stack([torch.arange(5), torch.arange(3, 8)])
    divisors = torch.tensor([1.0, 2.0])
    for arguments in _layer_types(rotary):
        for positions in (two_rows, two_rows[:1], two_rows.expand(3, -1, -1)):
            if not _takes(rotary, x, positions, arguments):
                continue
            try:
                single = [_table(rotary, d, x, positions, arguments) for d in divisors]
                table = stacked_tables(
                    rotary, lambda _, v: _frequencies(v) / divisors[:, None], 2, x, positions, *arguments
                )
                split = split_tables(table, positions.shape[-2])
            except _CALL_ERRORS:
                return False
            same = [all(map(torch.equal, table_parts(one), parts)) for one, parts in zip(split, single, strict=False)]
            if len(split) != len(single) or not all(same):
                return False
    return True


def _takes(rotary: nn.Module, x: torch.Tensor, positions: torch.Tensor, arguments: tuple) -> bool:
    """Whether the module can be called with such positions; those of mrope have a third axis."""
    try:
        _table(rotary, 1, x, positions, arguments)
    except _CALL_ERRORS:
        return False
    return True


def _layer_types(rotary: nn.Module) -> Iterator[tuple[str, ...]]:
    """The further arguments that reach each of the module's frequency vectors: none, or the layer type."""
    for name in inv_freq_names(rotary):
        yield (layer_type_of(name),) if layer_type_of(name) else ()


def _frequencies(like: torch.Tensor) -> torch.Tensor:
    """Frequencies of our own, on the CPU: the module's may be on the meta device."""
    pairs = like.shape[0]
    return 1.0 / 100.0 ** (torch.arange(pairs, dtype=torch.float32) / pairs)


def _table(
    rotary: nn.Module, divisor: float | torch.Tensor, x: torch.Tensor, positions: torch.Tensor, arguments: tuple
) -> tuple[torch.Tensor, ...]:
    parts = table_parts(family_table(rotary, lambda _, v: _frequencies(v) / divisor, x, positions, *arguments))
    if not all(isinstance(part, torch.Tensor) for part in parts):
        raise TypeError(f"it returns {[type(part).__name__ for part in parts]}, expected tensors")
    return parts
