"""The adapter in a model, and baked into one for good: what is put where, and what a baked model records."""

from __future__ import annotations

from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig

from ..errors import AdapterMismatchError, InvalidConfigError, LayerRopeError
from ..messages import shown
from .config import LayerRopeConfig
from .frequencies import inv_freq_names, is_length_dependent, layer_type_of, own_frequencies, rope_type_reaches
from .rotary import BakedLayerRope, LayerRopeLayer, RotaryTraits
from .sites import (
    DecoderStack,
    RotarySite,
    find_stack,
    model_type,
    prove_rotary_scales,
    tables_can_be_stacked,
    text_config,
    trained_window,
)
from .tables import LayerScaling, LayerTableHook

BAKED_CONFIG_KEY = "layer_rope"
"""Entry of a baked model's `config.json` that remembers what was baked in."""

_SCALING_FIELDS = ("rope_type", "factor", "layer_factors", "original_max_position_embeddings", "target_length")


def record_baked(config: PretrainedConfig, scaling: LayerScaling | None) -> None:
    """Writes the scaling in force into a model's config, or with None removes what is there."""
    if scaling is not None:
        values = {name: getattr(scaling, name) for name in _SCALING_FIELDS}
        setattr(config, BAKED_CONFIG_KEY, {**values, "layer_factors": list(scaling.layer_factors)})
    elif hasattr(config, BAKED_CONFIG_KEY):
        delattr(config, BAKED_CONFIG_KEY)


def baked_config(model: nn.Module) -> LayerRopeConfig:
    """Returns what was baked into a model, as its `config.json` remembers it.

    Raises:
        LayerRopeError: nothing was.
    """
    baked = getattr(model.config, BAKED_CONFIG_KEY, None)
    if not isinstance(baked, dict):
        raise LayerRopeError(
            f"config.{BAKED_CONFIG_KEY} is {shown(baked)}, expected a mapping: this model was not saved from a baked "
            "one."
        )
    try:
        config = LayerRopeConfig(**{name: baked.get(name) for name in _SCALING_FIELDS})
    except InvalidConfigError as error:
        raise InvalidConfigError(f"config.json: {BAKED_CONFIG_KEY}: {error}") from error
    if config.layer_factors is None:
        raise InvalidConfigError(f"config.json: {BAKED_CONFIG_KEY}: layer_factors=None, expected one for each layer.")
    return config


def scaling_for(config: LayerRopeConfig, model: nn.Module, stack: DecoderStack) -> LayerScaling:
    """Returns what `config` asks of the model's layers, after checking that they can bear it.

    Raises:
        AdapterMismatchError: wrong number of factors; different ones for layers that share keys; a rope type where it
            reaches no layer; `dynamic` where the model's own rope depends on the length or names no trained window.
    """
    num_layers = len(stack.layers)
    factors = config.resolved_layer_factors(num_layers, model_type(model))
    for layer, source in enumerate(stack.key_sources):
        if factors[layer] != factors[source]:
            raise AdapterMismatchError(
                f"layer {layer} of {model_type(model)} attends to keys that layer {source} has rotated (a shared KV "
                f"cache), so both need the same factor: got {factors[layer]} and {factors[source]}."
            )
    if config.rope_type != "default" and not any(reached_tables(site, model) for site in stack.sites):
        raise AdapterMismatchError(
            f"rope_type={config.rope_type!r} scales what full-attention layers rotate by, and those of "
            f"{model_type(model)} do not rotate: use rope_type='default'."
        )
    if config.rope_type == "dynamic" and any(is_length_dependent(site.rotary) for site in stack.sites):
        raise AdapterMismatchError(
            "rope_type='dynamic' on a model whose own rope_type is 'dynamic' or 'longrope': both depend on the length. "
            "Use rope_type='default', or set the model's own rope_parameters to 'default'."
        )
    if config.rope_type == "dynamic" and not all(_in_falling_order(site, model) for site in stack.sites):
        raise AdapterMismatchError(
            f"rope_type='dynamic' stretches frequencies by their place, and {model_type(model)} keeps them in another "
            "order: use rope_type='default' or 'linear'."
        )
    window = config.original_max_position_embeddings or trained_window(model)
    if window is None and config.rope_type == "dynamic":
        raise AdapterMismatchError(
            f"rope_type='dynamic' needs the trained window, and {model_type(model)}'s config has no "
            "max_position_embeddings: set original_max_position_embeddings."
        )
    return LayerScaling(config.rope_type, config.factor, tuple(factors), window, config.target_length)


def wrap(stack: DecoderStack, model: nn.Module) -> None:
    """Proves that every rotary can be scaled, then puts the wrappers and the layers' hooks in place."""
    prove_sites(stack, model)
    other_tuner = has_other_tuner_layers(model)
    for site in stack.sites:
        site.replace(LayerRopeLayer(site.rotary, site.layer_idx, rotary_traits(site, model)))
    keeper = stack.wrappers()[0]
    keeper.hook_handles = register_hooks(stack)
    keeper.record = partial(record_baked, model.config)
    # As every PEFT tuner, freeze the base model; but not the weights of a LoRA that is already there.
    keeper.frozen_by_injection = [] if other_tuner else [p for p in model.parameters() if p.requires_grad]
    for parameter in keeper.frozen_by_injection:
        parameter.requires_grad_(False)


def prove_sites(stack: DecoderStack, model: nn.Module) -> None:
    """Raises UnsupportedModelError unless scaling takes effect on each rotary of the live module."""
    for site in stack.sites:
        prove_rotary_scales(site.rotary, model_type(model))


def reached_tables(site: RotarySite, model: nn.Module) -> frozenset[str]:
    """Returns the names of the frequency vectors at a site that an adapter's rope type scales."""
    kind, names = text_config(model).model_type, inv_freq_names(getattr(site.rotary, "base_layer", site.rotary))
    return frozenset(name for name in names if rope_type_reaches(kind, layer_type_of(name) or site.name))


def rotary_traits(site: RotarySite, model: nn.Module) -> RotaryTraits:
    """Finds out what scaling the rotary embedding of `model` at `site`, the family's own, needs to know."""
    rotary = site.rotary
    return RotaryTraits(own_frequencies(rotary, model), reached_tables(site, model), tables_can_be_stacked(rotary))


def _in_falling_order(site: RotarySite, model: nn.Module) -> bool:
    rotary = site.rotary
    wrapped = isinstance(rotary, LayerRopeLayer)
    frequencies = rotary.traits.frequencies if wrapped else own_frequencies(rotary, model)
    return all(bool((inv_freq.diff() <= 0).all()) for inv_freq in frequencies.values())


def register_hooks(stack: DecoderStack) -> list[Any]:
    """Hooks the decoder layers where they share a rotary; returns the handles."""
    if not stack.has_shared:
        return []
    return [
        layer.register_forward_pre_hook(LayerTableHook(index), with_kwargs=True)
        for index, layer in enumerate(stack.layers)
    ]


def has_other_tuner_layers(model: nn.Module) -> bool:
    """Whether another method, such as LoRA, has layers in the model."""
    return any(isinstance(m, BaseTunerLayer) and not isinstance(m, LayerRopeLayer) for m in model.modules())


def bake(model: nn.Module, stack: DecoderStack, scaling: LayerScaling) -> None:
    """Puts `BakedLayerRope`s in place and records them in `model.config`, which `save_pretrained` writes."""
    wrappers = stack.wrappers()
    if not wrappers:
        register_hooks(stack)
    for site in stack.sites:
        if wrappers:
            original, traits = site.rotary.base_layer, site.rotary.traits
        else:
            original, traits = site.rotary, rotary_traits(site, model)
        site.replace(BakedLayerRope(original, site.layer_idx, traits, scaling))
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
        UnsupportedModelError: not a transformers model.
    """
    text_config(model)  # a model without any is told so
    config = baked_config(model)
    stack = find_stack(model)
    if stack.is_baked or stack.wrappers():
        raise LayerRopeError("the factors are applied to this model already.")
    scaling = scaling_for(config, model, stack)
    prove_sites(stack, model)
    bake(model, stack, scaling)
    return model
