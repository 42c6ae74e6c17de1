"""The adapter itself, as PEFT's tuners are laid out: config, model, layers. Importing it registers `LAYER_ROPE`."""

from __future__ import annotations

from .config import LayerRopeConfig, register
from .model import LayerRopeModel

register(LayerRopeConfig, LayerRopeModel)

__all__ = ["LayerRopeConfig", "LayerRopeModel"]
