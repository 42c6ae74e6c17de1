"""Writes an adapter's two files without a model."""

from __future__ import annotations

from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from .config import LayerRopeConfig
from .errors import InvalidConfigError
from .model import FACTORS_KEY


def save_adapter(config: LayerRopeConfig, directory: str | Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.save_pretrained` would.

    Args:
        config: must hold `layer_factors`.
        directory: an existing folder.

    Raises:
        InvalidConfigError: the config has no factors.
    """
    if config.layer_factors is None:
        raise InvalidConfigError("layer_factors=None: an adapter is saved with one factor per layer.")
    config.save_pretrained(str(directory))
    factors = torch.tensor(config.layer_factors, dtype=torch.float32)
    save_file({FACTORS_KEY: factors}, Path(directory) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
