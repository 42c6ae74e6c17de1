"""An adapter's two files: writes them without a model, and checks them against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from ..errors import AdapterMismatchError, InvalidConfigError, one_line, shown, shown_names
from ..files import read_bytes
from .config import LayerRopeConfig

KEY_PREFIX = "base_model.model."
FACTORS_KEY = f"{KEY_PREFIX}layer_factors"
"""The one tensor of `adapter_model.safetensors`: float32, shape `(num_hidden_layers,)`."""


def save_adapter(config: LayerRopeConfig, directory: str | Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into a folder, as `PeftModel.save_pretrained` would.
    The config must hold `layer_factors`.
    """
    config.save_pretrained(str(directory))
    factors = torch.tensor(config.layer_factors, dtype=torch.float32)
    save_file({FACTORS_KEY: factors}, Path(directory) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def check_no_model(directory: str | Path) -> None:
    """Raises InvalidConfigError for the folder of a model, which transformers would load with an adapter put there."""
    if (Path(directory) / "config.json").is_file():
        raise InvalidConfigError(f"{directory} holds a model, of which an adapter becomes a part: use another folder.")


def check_weights_file(path: str | Path, layer_factors: Sequence[float] | None) -> None:
    """Checks `adapter_model.safetensors` against the factors of `adapter_config.json`, before PEFT reads it; None are
    1.0 for every layer, however many.

    Raises:
        AdapterMismatchError: it is too large, no safetensors file, or holds anything but one float32 tensor of the
            config's factors.
    """
    try:
        tensors = load(read_bytes(path))
    # The last three come from safetensors' code for PyTorch: dtypes that it does not know, shapes of too many axes.
    except (ValueError, SafetensorError, KeyError, RuntimeError, AssertionError) as error:
        raise AdapterMismatchError(
            f"{path} is not a safetensors file ({one_line(error)}), expected the one tensor {FACTORS_KEY}."
        ) from error
    check_factors(tensors, layer_factors)


def check_factors(tensors: Mapping[str, torch.Tensor], layer_factors: Sequence[float] | None) -> None:
    """Does the part of [`check_weights_file`] that concerns the content. A file written without a PeftModel has its one
    name without PEFT's prefix.
    """
    if [f"{KEY_PREFIX}{name.removeprefix(KEY_PREFIX)}" for name in tensors] != [FACTORS_KEY]:
        raise AdapterMismatchError(
            f"adapter_model.safetensors holds {shown_names(sorted(tensors))}; expected the one tensor {FACTORS_KEY}."
        )
    (tensor,) = (tensor.cpu() for tensor in tensors.values())
    factors = [1.0] * math.prod(tensor.shape[:1]) if layer_factors is None else layer_factors
    expected = torch.tensor(factors, dtype=torch.float32)
    if tensor.dtype != expected.dtype or tensor.shape != expected.shape:
        raise AdapterMismatchError(
            f"adapter_model.safetensors: {FACTORS_KEY} is {tensor.dtype} of shape {shown(tuple(tensor.shape))}, "
            f"expected {expected.dtype} of shape {tuple(expected.shape)} as in adapter_config.json."
        )
    different = (tensor != expected).nonzero().flatten().tolist()
    if different:
        first = different[0]
        raise AdapterMismatchError(
            f"adapter_model.safetensors and adapter_config.json disagree on {len(different)} of {len(expected)} "
            f"layer_factors, first at layer {first}: {tensor[first].item()} and {expected[first].item()}."
        )
