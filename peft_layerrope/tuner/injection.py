"""The adapter in a model, and baked into one for good: what is put where, and what a baked model records."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig

from ..errors import AdapterMismatchError, InvalidConfigError, LayerRopeError, UnsupportedModelError, shown
from .config import LayerRopeConfig
from .frequencies import inv_freq_names, is_length_dependent, layer_type_of, own_frequencies, rope_type_reaches
from .rotary import BakedLayerRope, LayerRopeLayer, RotaryTraits
from .sites import (
    DecoderStack,
    RotarySite,
    find_stack,
    model_type,
    prove_rotary_scales,
    table_types,
    tables_can_be_stacked,
    text_config,
    trained_window,
)
from .tables import LayerScaling, LayerTableHook

BAKED_CONFIG_KEY = "layer_rope"
"""Entry of a baked model's `config.json` that remembers what was baked in."""

SCALING_FIELDS = tuple(field.name for field in fields(LayerScaling) if field.init)


def record_baked(config: PretrainedConfig, scaling: LayerScaling | None) -> None:
    """Writes the scaling in force into a model's config, or with None removes what is there."""
    if scaling is not None:
        setattr(config, BAKED_CONFIG_KEY, scaling.to_plain())
    elif hasattr(config, BAKED_CONFIG_KEY):
        delattr(config, BAKED_CONFIG_KEY)


def baked_config(model: nn.Module) -> LayerRopeConfig:
    """Returns what was baked into a model, as its `config.json` remembers it; raises LayerRopeError if nothing was."""
    baked = getattr(model.config, BAKED_CONFIG_KEY, None)
    if not isinstance(baked, dict) or baked.get("layer_factors") is None:
        raise LayerRopeError(
            f"config.{BAKED_CONFIG_KEY} is {shown(baked)}, expected a mapping with layer_factors: this model was not "
            "saved from a baked one."
        )
    try:
        return LayerRopeConfig(**{name: baked.get(name) for name in SCALING_FIELDS})
    except InvalidConfigError as error:
        raise InvalidConfigError(f"config.json: {BAKED_CONFIG_KEY}: {error}") from error


def scaling_for(config: LayerRopeConfig, model: nn.Module, stack: DecoderStack) -> LayerScaling:
    """Returns what `config` asks of the model's layers; raises AdapterMismatchError if they cannot bear it."""
    factors = config.resolved_layer_factors(len(stack.layers), model_type(model))
    window = config.original_max_position_embeddings or trained_window(model)
    scaling = LayerScaling(config.rope_type, config.factor, tuple(factors), window, config.target_length)
    _check_bearable(scaling, model, stack)
    return scaling


def _check_bearable(scaling: LayerScaling, model: nn.Module, stack: DecoderStack) -> None:
    """Raises AdapterMismatchError if the model's layers cannot bear a scaling."""
    name, factors = model_type(model), scaling.layer_factors
    for layer, source in enumerate(stack.key_sources):
        if factors[layer] != factors[source]:
            raise AdapterMismatchError(
                f"layer {layer} of {name} attends to keys that layer {source} has rotated (a shared KV cache), so both "
                f"need the same factor: got {factors[layer]} and {factors[source]}."
            )
    if scaling.rope_type != "default" and not any(reached_tables(site, model) for site in stack.sites):
        raise AdapterMismatchError(
            f"rope_type={scaling.rope_type!r} scales what full-attention layers rotate by, and those of {name} do not "
            "rotate: use rope_type='default'."
        )
    if scaling.rope_type != "dynamic":
        return
    if any(is_length_dependent(site.original) for site in stack.sites):
        raise AdapterMismatchError(
            "rope_type='dynamic' on a model whose own rope_type is 'dynamic' or 'longrope': both depend on the length. "
            "Use rope_type='default', or set the model's own rope_parameters to 'default'."
        )
    own = [inv_freq for site in stack.sites for inv_freq in own_frequencies(site.original, model).values()]
    if not all((inv_freq.diff() <= 0).all() for inv_freq in own):
        raise AdapterMismatchError(
            f"rope_type='dynamic' stretches frequencies by their place, and {name} keeps them in another order: use "
            "rope_type='default' or 'linear'."
        )
    if scaling.original_max_position_embeddings is None:
        raise AdapterMismatchError(
            f"rope_type='dynamic' needs the trained window, and {name}'s config has no max_position_embeddings: set "
            "original_max_position_embeddings."
        )


def layer_frequencies(config: LayerRopeConfig, model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns each layer's own frequencies and the scaled ones, both of shape `(r / 2,)`, float32, for programs that
    keep one table per layer whatever the prompt's length. The model may be on the `meta` device.

    Raises:
        AdapterMismatchError: the model's layers cannot bear the factors, or these follow the length of a prompt.
        UnsupportedModelError: the model cannot be scaled, or a layer has several tables.
    """
    stack = find_stack(model)
    scaling = scaling_for(config, model, stack)
    if scaling.depends_on_length:
        raise AdapterMismatchError(
            "rope_type='dynamic' without target_length follows the length of each prompt, and here there is one table "
            "for all: set target_length, in tokens, in the adapter's config."
        )
    traits = [rotary_traits(site, model) for site in stack.sites]
    found = []
    for layer, kind in enumerate(table_types(model, len(stack.layers))):
        tables = [
            (own, scaling.scale(own, None, name in trait.reached)[scaling.index[layer]])
            for site, trait in zip(stack.sites, traits, strict=True)
            if site.layer_idx in (None, layer)
            for name, own in trait.frequencies.items()
            if layer_type_of(name) in ("", kind)
        ]
        if len(tables) != 1:
            raise UnsupportedModelError(f"layer {layer} of {model_type(model)} has {len(tables)} tables, expected one.")
        found += tables
    return found


def wrap(stack: DecoderStack, model: nn.Module) -> None:
    """Puts the wrappers and the layers' hooks in place, unless UnsupportedModelError says that it would be no use."""
    traits = [rotary_traits(site, model) for site in stack.sites]
    for site, found in zip(stack.sites, traits, strict=True):
        site.replace(LayerRopeLayer(site.rotary, site.layer_idx, found))
    keeper = stack.wrappers()[0]
    keeper.hook_handles = register_hooks(stack)
    keeper.record = partial(record_baked, model.config)
    # As every PEFT tuner, freeze the base model; but not the weights of a LoRA that is already there.
    keeper.frozen_by_injection = [] if other_tuner_layers(model) else [p for p in model.parameters() if p.requires_grad]
    for parameter in keeper.frozen_by_injection:
        parameter.requires_grad_(False)


def reached_tables(site: RotarySite, model: nn.Module) -> frozenset[str]:
    """Returns the names of the frequency vectors at a site that an adapter's rope type scales."""
    kind = text_config(model).model_type
    names = inv_freq_names(site.original)
    return frozenset(name for name in names if rope_type_reaches(kind, layer_type_of(name) or site.name))


def rotary_traits(site: RotarySite, model: nn.Module) -> RotaryTraits:
    """Returns what scaling the rotary embedding at a site needs to know, after the proof that it takes effect."""
    rotary = site.original
    prove_rotary_scales(rotary, model_type(model))
    return RotaryTraits(own_frequencies(rotary, model), reached_tables(site, model), tables_can_be_stacked(rotary))


def register_hooks(stack: DecoderStack) -> list[Any]:
    """Hooks the decoder layers where they share a rotary; returns the handles."""
    hooked = stack.layers if stack.has_shared else ()
    return [layer.register_forward_pre_hook(LayerTableHook(i), with_kwargs=True) for i, layer in enumerate(hooked)]


def other_tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """Returns the layers that another method, such as LoRA, has in the model."""
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, LayerRopeLayer)]


def bake(model: nn.Module, stack: DecoderStack, scaling: LayerScaling) -> None:
    """Puts `BakedLayerRope`s in place and records them in `model.config`, which `save_pretrained` writes."""
    wrappers = stack.wrappers()
    traits = [wrapper.traits for wrapper in wrappers] or [rotary_traits(site, model) for site in stack.sites]
    if not wrappers:
        register_hooks(stack)
    for site, found in zip(stack.sites, traits, strict=True):
        site.replace(BakedLayerRope(site.original, site.layer_idx, found, scaling))
    for wrapper in wrappers:
        wrapper.thaw()  # the layers' hooks stay: they serve the baked modules too
    record_baked(model.config, scaling)


def restore_baked(model: nn.Module) -> nn.Module:
    """Re-applies the factors of a model that was saved with `save_pretrained` after `merge_and_unload()`.

    Such a checkpoint holds plain weights; its `config.json` remembers the factors.

    Args:
        model: a model loaded with `from_pretrained`; changed in place.

    Returns:
        The same model, scaled.

    Raises:
        LayerRopeError: the config holds no baked factors, or they are applied already.
        UnsupportedModelError: not a transformers model, or one that cannot be scaled.
    """
    stack = find_stack(model)
    config = baked_config(model)
    if stack.is_baked or stack.wrappers():
        raise LayerRopeError("the factors are applied to this model already.")
    bake(model, stack, scaling_for(config, model, stack))
    return model
