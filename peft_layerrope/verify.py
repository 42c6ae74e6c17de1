"""Finds the rotary embedding of a model and proves that scaling its `inv_freq` scales the rotation."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import UnsupportedModelError
from .rotary import BakedLayerRope, LayerRopeLayer, family_table


@dataclass(frozen=True)
class RotarySite:
    """Where a model's shared rotary embedding sits, and the decoder layers that it feeds."""

    owner: nn.Module
    attribute: str
    name: str  # dotted name of the rotary in the model, e.g. "model.rotary_emb"
    layers: nn.ModuleList

    @property
    def rotary(self) -> nn.Module:
        """The module that sits there now: the family's own, or our wrapper."""
        return getattr(self.owner, self.attribute)

    def replace(self, module: nn.Module) -> None:
        """Puts `module` in the rotary's place."""
        setattr(self.owner, self.attribute, module)


def model_type(model: nn.Module) -> str:
    """Returns transformers' `model_type`, or the class name of a model without one."""
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def find_rotary(model: nn.Module) -> RotarySite:
    """Returns the one rotary embedding that the model's decoder layers share.

    It is a module with an `inv_freq` vector (or already our wrapper), held by the module that also holds the
    list of `num_hidden_layers` decoder layers, each of which takes `position_embeddings`.

    Raises:
        UnsupportedModelError: there is none, or more than one; the message names the model type and why.
    """
    name_of_model = model_type(model)
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(f"{name_of_model}: not a transformers model (it has no `config`).")
    num_layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = [
        RotarySite(owner, attribute, f"{prefix}.{attribute}".lstrip("."), layers)
        for prefix, owner in model.named_modules()
        for layers in owner.children()
        if isinstance(layers, nn.ModuleList) and len(layers) == num_layers
        for attribute, child in owner.named_children()
        if isinstance(child, (LayerRopeLayer, BakedLayerRope)) or _has_inv_freq(child)
    ]
    if not found:
        raise UnsupportedModelError(f"{name_of_model}: {_why_not_found(model)}")
    if len(found) > 1:
        names = ", ".join(site.name for site in found)
        raise UnsupportedModelError(
            f"{name_of_model}: has several rotary embeddings ({names}), which is not supported yet."
        )
    site = found[0]
    for index, layer in enumerate(site.layers):
        if "position_embeddings" not in inspect.signature(layer.forward).parameters:
            raise UnsupportedModelError(
                f"{name_of_model}: decoder layer {index} ({type(layer).__name__}) takes no `position_embeddings`, so "
                "the shared rotary embedding cannot be scaled per layer."
            )
    return site


def _has_inv_freq(module: nn.Module) -> bool:
    inv_freq = getattr(module, "inv_freq", None)
    return isinstance(inv_freq, torch.Tensor) and inv_freq.ndim == 1 and inv_freq.is_floating_point()


def _why_not_found(model: nn.Module) -> str:
    rotaries = [
        name
        for name, module in model.named_modules()
        if any(buffer_name.endswith("inv_freq") for buffer_name, _ in module.named_buffers(recurse=False))
    ]
    if not rotaries:
        return "no rotary embedding with an `inv_freq` was found, so there is no rotation to scale."
    return (
        f"its rotary embedding ({', '.join(rotaries[:3])}) is not one `inv_freq` vector shared by the decoder layers, "
        "which is not supported yet."
    )


def prove_rotary_scales(rotary: nn.Module, name_of_model: str) -> None:
    """Proves on the live module that its table follows the `inv_freq` it is given.

    The table for `inv_freq / 2` at positions `2p` must equal the one for `inv_freq` at `p` (halving and doubling
    are exact in floating point), and differ from the one for `inv_freq` at `2p`. Runs on the CPU with
    frequencies of its own, so it needs neither the model's device nor its weights.

    Raises:
        UnsupportedModelError: the family recomputes its frequencies, so scaling would silently do nothing.
    """
    pairs = rotary.inv_freq.shape[0]
    inv_freq = 1.0 / 100.0 ** (torch.arange(pairs, dtype=torch.float32) / pairs)
    x = torch.zeros(1, 8, 1)
    positions = torch.arange(8)[None]
    try:
        reference = _tensors(family_table(rotary, inv_freq, x, positions))
        halved = _tensors(family_table(rotary, inv_freq / 2, x, positions * 2))
        unscaled = _tensors(family_table(rotary, inv_freq, x, positions * 2))
    except (TypeError, AttributeError, RuntimeError, ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{name_of_model}: {type(rotary).__name__} cannot be called with another `inv_freq` ({error})."
        ) from error
    follows = all(torch.allclose(a, b, atol=1e-6) for a, b in zip(halved, reference, strict=True))
    changes = any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(halved, unscaled, strict=True))
    if not (follows and changes):
        raise UnsupportedModelError(
            f"{name_of_model}: {type(rotary).__name__} does not rotate by the `inv_freq` it is given, so scaling it "
            "would silently do nothing."
        )


def _tensors(table: Any) -> tuple[torch.Tensor, ...]:
    return (table,) if isinstance(table, torch.Tensor) else tuple(table)
