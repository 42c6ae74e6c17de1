"""The adapter itself, as PEFT's tuners are laid out: config, model, layers. Importing it registers `LAYER_ROPE`."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from .config import LAYER_ROPE, PEFT_TYPE_NAME, PREFIX, LayerRopeConfig
from .model import LayerRopeModel, replace_on_load

if LAYER_ROPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(
        name=PEFT_TYPE_NAME.lower(), config_cls=LayerRopeConfig, model_cls=LayerRopeModel, prefix=PREFIX
    )
    replace_on_load()

__all__ = ["LayerRopeConfig", "LayerRopeModel"]
