"""transformers' own YaRN on a model that was loaded without it, to compare with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import TaskError
from ..tuner.proof import prove_rotary_scales
from ..tuner.rotary import inv_freq_names
from ..tuner.sites import RotarySite, find_stack, model_type, trained_window

_PLAIN = (bool, int, float, str)
_BUILD_ERRORS = (TypeError, KeyError, ValueError, AttributeError)


def yarn_rotary(model: nn.Module, factor: float) -> tuple[RotarySite, nn.Module]:
    """Builds the rotary embedding that the model would have had, had its config asked for YaRN.

    Args:
        model: a transformers model with plain RoPE; not changed.
        factor: target length / trained length.

    Returns:
        Where it belongs, and the new module on the device of the old one. In its place the model computes what a
        model built with `rope_type="yarn"` from the start does.

    Raises:
        TaskError: YaRN cannot be put onto this model; the message says why.
        UnsupportedModelError: the family does not rotate by its module's frequencies.
    """
    kind = model_type(model)
    if not isinstance(model, PreTrainedModel):
        raise TaskError(f"yarn:{factor:g} needs a plain transformers model, got {type(model).__name__}.")
    sites = find_stack(model).sites
    if len(sites) > 1 or inv_freq_names(sites[0].rotary) != ["inv_freq"]:
        raise TaskError(
            f"yarn:{factor:g}: {kind} has several rotary embeddings, and YaRN would belong to some of them."
        )
    old = sites[0].rotary
    plain, config = copy.deepcopy(model.config), copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    text.rope_parameters = _yarn_parameters(text, kind, factor, trained_window(model))
    try:
        rotary, unscaled = type(old)(config=text), type(old)(config=plain.get_text_config(decoder=True))
        with torch.device("meta"):
            models = type(model)(plain), type(model)(config)
    except _BUILD_ERRORS as error:
        raise TaskError(f"yarn:{factor:g}: {kind} cannot be built with YaRN ({error!r}).") from error
    if rotary.inv_freq.shape != old.inv_freq.shape or torch.equal(rotary.inv_freq, unscaled.inv_freq):
        raise TaskError(f"yarn:{factor:g} does not change the frequencies of {kind} as it should.")
    prove_rotary_scales(rotary, kind)
    _check_nothing_else_changes(*models, sites[0].name, factor)
    return sites[0], rotary.to(old.inv_freq.device).train(old.training)


def _yarn_parameters(text: PretrainedConfig, kind: str, factor: float, window: int | None) -> dict[str, Any]:
    parameters = getattr(text, "rope_parameters", None) or {}
    own = parameters.get("rope_type", "default")
    if "rope_theta" not in parameters or own != "default":
        raise TaskError(
            f"yarn:{factor:g} needs a model with plain RoPE; {kind}'s rope_parameters are {parameters or None}."
        )
    if window is None:
        raise TaskError(
            f"yarn:{factor:g} needs the trained window, and {kind}'s config has no max_position_embeddings."
        )
    return {**parameters, "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": window}


def _check_nothing_else_changes(plain: PreTrainedModel, yarn: PreTrainedModel, site: str, factor: float) -> None:
    """Raises TaskError where YaRN is more than a rotary embedding: some families scale their attention with it."""
    for (name, one), (_, other) in zip(plain.named_modules(), yarn.named_modules(), strict=True):
        for key, value in vars(one).items():
            if name != site and isinstance(value, _PLAIN) and vars(other).get(key) != value:
                raise TaskError(
                    f"yarn:{factor:g}: in {model_type(plain)} it changes more than the rotary embedding "
                    f"({name}.{key}): compare with a model that is loaded with YaRN."
                )
