"""transformers' own linear, dynamic and YaRN scaling on a model that was loaded without it, to compare with."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import TaskError
from ..tuner.frequencies import frequencies_at, inv_freq_names, own_frequencies, rope_type_reaches
from ..tuner.proof import prove_rotary_scales
from ..tuner.sites import RotarySite, find_stack, model_type, text_config, trained_window

_PLAIN = (bool, int, float, str)
_BUILD_ERRORS = (TypeError, KeyError, ValueError, AttributeError)

_OF_A_SCALING = (
    *("type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    *("mscale", "mscale_all_dim", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "alpha"),
)
"""Entries of `rope_parameters` that belong to a scaling; the others say what is scaled."""


def scaled_rotaries(model: nn.Module, rope_type: str, factor: float) -> list[tuple[RotarySite, nn.Module]]:
    """Builds the rotary embeddings that the model would have had, had its config asked for a scaling.

    Where a family has a table for its full-attention layers and one for its sliding ones, that is the first one's
    scaling, as in transformers. A scaling that the model has of its own is replaced.

    Args:
        model: a transformers model; not changed.
        rope_type: `"linear"`, `"dynamic"` or `"yarn"`.
        factor: target length / trained length.

    Returns:
        Where they belong, and the new modules on the devices of the old ones. In their places the model computes what
        a model built with this rope type from the start does.

    Raises:
        TaskError: the scaling cannot be put onto this model; the message says why.
        UnsupportedModelError: the family does not rotate by its module's frequencies.
    """
    kind, name = model_type(model), f"{rope_type}:{factor:g}"
    if not isinstance(model, PreTrainedModel):
        raise TaskError(f"{name} needs a plain transformers model, got {type(model).__name__}.")
    if rope_type != "linear" and trained_window(model) is None:
        raise TaskError(f"{name} needs the trained window, and {kind}'s config has no max_position_embeddings.")
    sites = find_stack(model).sites
    own, plain, scaled = (copy.deepcopy(model.config) for _ in range(3))
    _set_rope_type(plain.get_text_config(decoder=True), "default", factor, name)
    _set_rope_type(scaled.get_text_config(decoder=True), rope_type, factor, name)
    try:
        with torch.device("meta"):
            models = [type(model)(config) for config in (own, plain, scaled)]
        before, rotaries = ([_built(site.rotary, m) for site in find_stack(m).sites] for m in models[1:])
        far = torch.tensor([2 * (trained_window(model) or 1)])  # where `dynamic` has begun
        same = all(_are_equal(*pair, far) for pair in zip(before, rotaries, strict=True))
    except _BUILD_ERRORS as error:
        raise TaskError(f"{name}: {kind} cannot be built with it ({error!r}).") from error
    if same and factor != 1:
        raise TaskError(f"{name} does not change the frequencies of {kind} as it should.")
    _check_nothing_else_changes(models[0], models[2], {site.name for site in sites}, name)
    for site, rotary in zip(sites, rotaries, strict=True):
        prove_rotary_scales(rotary, kind)
        rotary.load_state_dict(site.rotary.state_dict())  # a few families keep something of it in checkpoints
        rotary.to(next(site.rotary.buffers()).device).train(site.rotary.training)
    return list(zip(sites, rotaries, strict=True))


def describe_scaling(model: nn.Module, rope_type: str, relation: str) -> str:
    """Says what a rope type does on a model beyond its name: which tables it scales, if not all, and what becomes of a
    scaling that the model has of its own. Empty where there is nothing to say.

    Args:
        model: a transformers model.
        rope_type: a transformers name; `"default"` for factors alone.
        relation: to the model's own scaling, such as `"on top of"`.
    """
    text = text_config(model)
    parameters = getattr(text, "rope_parameters", None) or {}
    tables = {table: entries for table, entries in parameters.items() if isinstance(entries, dict)}
    reached = [table for table in tables if rope_type_reaches(text.model_type, table)]
    own = {entries.get("rope_type", "default") for entries in tables.values() or [parameters]}
    own -= {"default", "proportional"}
    said = []
    if rope_type != "default" and len(reached) < len(tables):
        said.append(f"{rope_type} of {', '.join(reached)} layers alone")
    if own:
        said.append(f"{relation} the model's own {', '.join(sorted(own))}")
    return ", ".join(said)


def _set_rope_type(text: PretrainedConfig, rope_type: str, factor: float, name: str) -> None:
    """Writes what a checkpoint's author would: into every table of the config that the scaling reaches."""
    parameters = getattr(text, "rope_parameters", None) or {}
    tables = {table: entries for table, entries in parameters.items() if isinstance(entries, dict)}
    for table, entries in (tables or {"": parameters}).items():
        if not rope_type_reaches(text.model_type, table):
            continue
        own = entries.get("rope_type", "default")
        if "rope_theta" not in entries or (own == "proportional" and rope_type not in ("default", "linear")):
            raise TaskError(f"{name} cannot be put onto {text.model_type}, whose rope_parameters are {parameters}.")
        kept = entries if own == "default" else {k: v for k, v in entries.items() if k not in _OF_A_SCALING}
        changed = {**kept, "rope_type": rope_type if own != "proportional" else own}  # which has a factor of its own
        if rope_type != "default":
            changed["factor"] = factor
        if (text.model_type, rope_type) == ("deepseek_v4", "yarn"):
            changed["attention_factor"] = 1.0  # as its config class has it
        if table:
            parameters[table] = changed
        else:
            text.rope_parameters = changed
    text.standardize_rope_params()


def _built(rotary: nn.Module, model: nn.Module) -> nn.Module:
    """Gives a rotary embedding of a model on the meta device its frequencies, on the CPU, and returns it."""
    frequencies = own_frequencies(rotary, model)
    rotary.to_empty(device="cpu")
    for name, inv_freq in frequencies.items():
        setattr(rotary, name, inv_freq)
        setattr(rotary, name.removesuffix("inv_freq") + "original_inv_freq", inv_freq.clone())
    return rotary


def _are_equal(one: nn.Module, other: nn.Module, position_ids: torch.Tensor) -> bool:
    pair = [
        frequencies_at(rotary, {name: getattr(rotary, name) for name in inv_freq_names(rotary)}, position_ids)
        for rotary in (one, other)
    ]
    return all(torch.equal(inv_freq, pair[1][name]) for name, inv_freq in pair[0].items())


def _check_nothing_else_changes(own: PreTrainedModel, scaled: PreTrainedModel, sites: set[str], label: str) -> None:
    """Raises TaskError where the scaling is more than rotary embeddings: some families scale their attention too."""
    for (name, one), (_, other) in zip(own.named_modules(), scaled.named_modules(), strict=True):
        for key, value in vars(one).items():
            if name not in sites and isinstance(value, _PLAIN) and vars(other).get(key) != value:
                raise TaskError(
                    f"{label}: in {model_type(own)} it changes more than the rotary embedding ({name}.{key}): compare "
                    "with a model that is loaded with it."
                )
