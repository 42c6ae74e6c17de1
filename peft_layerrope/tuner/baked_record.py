"""What a baked model's `config.json` remembers of its factors: a plain checkpoint has no other place for them."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from ..errors import InvalidConfigError, LayerRopeError
from ..messages import shown
from .config import LayerRopeConfig
from .tables import LayerScaling

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
