"""Bakes one scaling into a model for good, and re-applies it to one loaded from a baked checkpoint."""

from __future__ import annotations

from torch import nn

from ..errors import LayerRopeError
from .baked_record import baked_config, record_baked
from .injection import prove_sites, register_hooks, rotary_traits, scaling_for
from .rotary import BakedLayerRope
from .sites import DecoderStack, find_stack, text_config
from .tables import LayerScaling


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
