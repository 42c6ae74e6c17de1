"""An adapter's two files: writes them without a model, and checks them against each other."""

from __future__ import annotations

from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from .config import LayerRopeConfig
from .errors import AdapterMismatchError, InvalidConfigError

KEY_PREFIX = "base_model.model."
FACTORS_KEY = f"{KEY_PREFIX}layer_factors"
"""The one tensor of `adapter_model.safetensors`: float32, shape `(num_hidden_layers,)`."""


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


def check_factors_tensor(state_dict: dict[str, torch.Tensor], config: LayerRopeConfig) -> None:
    """Checks the content of `adapter_model.safetensors` against `adapter_config.json`.

    Raises:
        AdapterMismatchError: the file holds anything but one float32 tensor of the config's factors.
    """
    keys = sorted(state_dict)
    if keys != [FACTORS_KEY]:
        shown = ", ".join(keys[:5]) or "nothing"
        raise AdapterMismatchError(f"adapter_model.safetensors holds {shown}; expected the one tensor {FACTORS_KEY}.")
    tensor = state_dict[FACTORS_KEY]
    expected = torch.tensor(config.layer_factors, dtype=torch.float32)
    if tensor.dtype != torch.float32 or tensor.shape != expected.shape:
        raise AdapterMismatchError(
            f"adapter_model.safetensors: {FACTORS_KEY} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected "
            f"torch.float32 of shape {tuple(expected.shape)} as in adapter_config.json."
        )
    different = (tensor.cpu() != expected).nonzero().flatten().tolist()
    if different:
        first = different[0]
        raise AdapterMismatchError(
            f"adapter_model.safetensors and adapter_config.json disagree on {len(different)} of {len(expected)} "
            f"layer_factors, first at layer {first}: {tensor[first].item()} and {expected[first].item()}."
        )
