"""The adapter's config from what a search chose."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from .._version import __version__
from ..demo import DEMO_NAME
from ..public_names import public_name
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import trained_window
from .grid import Factors
from .settings import SearchSettings


def model_name(model: nn.Module) -> str:
    """Returns the model's Hub id, or a name without the path for one loaded from a folder."""
    return public_name(model.config._name_or_path or type(model).__name__)


def adapter_config(
    model: PeftModel, settings: SearchSettings, factors: Factors, name: str, **provenance: Any
) -> LayerRopeConfig:
    """Returns the config of an adapter with these factors, for the base model called `name`."""
    config = settings.adapter_config(list(factors), searcher_version=__version__, **provenance)
    if config.rope_type == "dynamic" and config.original_max_position_embeddings is None:
        config.original_max_position_embeddings = trained_window(model)
    config.base_model_name_or_path = DEMO_NAME if name == DEMO_NAME else model.config._name_or_path
    return config
