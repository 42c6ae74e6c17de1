"""An adapter's two files: writes them without a model, and checks them against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, deserialize
from safetensors.torch import save_file

from ..errors import AdapterMismatchError, InvalidConfigError
from ..files import read_bytes
from ..messages import one_line, shown, shown_names
from .config import LayerRopeConfig

KEY_PREFIX = "base_model.model."
FACTORS_KEY = f"{KEY_PREFIX}layer_factors"
"""The one tensor of `adapter_model.safetensors`: float32, shape `(num_hidden_layers,)`."""

_TORCH_NAMES = {"F64": "torch.float64", "F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}


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


def check_weights_file(path: str | Path, layer_factors: Sequence[float] | None) -> None:
    """Checks `adapter_model.safetensors` against `adapter_config.json`, before PEFT reads it.

    Args:
        path: the file, which may hold anything.
        layer_factors: what the config says; None: 1.0 for every layer, however many.

    Raises:
        AdapterMismatchError: it is too large, no safetensors file, or holds anything but one float32 tensor of the
            config's factors.
    """
    try:
        entries = deserialize(read_bytes(path))
    except (ValueError, SafetensorError) as error:
        reason = f"is not a safetensors file: {one_line(error)}" if isinstance(error, SafetensorError) else error
        raise AdapterMismatchError(f"{path} {reason}; expected the one tensor {FACTORS_KEY}.") from error
    entry = dict(entries)[_check_key([name for name, _ in entries])]
    if layer_factors is None:
        layer_factors = [1.0] * math.prod(entry["shape"][:1])
    _check_kind(_TORCH_NAMES.get(entry["dtype"], entry["dtype"]), entry["shape"], layer_factors)
    _check_values(torch.frombuffer(bytearray(entry["data"]), dtype=torch.float32), layer_factors)


def check_factors_tensor(state_dict: dict[str, torch.Tensor], config: LayerRopeConfig) -> None:
    """Checks the content of `adapter_model.safetensors` against `adapter_config.json`.

    Raises:
        AdapterMismatchError: the file holds anything but one float32 tensor of the config's factors.
    """
    tensor = state_dict[_check_key(list(state_dict))]
    _check_kind(str(tensor.dtype), tensor.shape, config.layer_factors)
    _check_values(tensor.cpu(), config.layer_factors)


def _check_values(tensor: torch.Tensor, layer_factors: Sequence[float]) -> None:
    expected = torch.tensor(layer_factors, dtype=torch.float32)
    different = (tensor != expected).nonzero().flatten().tolist()
    if different:
        first = different[0]
        raise AdapterMismatchError(
            f"adapter_model.safetensors and adapter_config.json disagree on {len(different)} of {len(expected)} "
            f"layer_factors, first at layer {first}: {tensor[first].item()} and {expected[first].item()}."
        )


def _check_key(names: Sequence[str]) -> str:
    """Returns the one name. A file written without a PeftModel has it without PEFT's prefix."""
    if [f"{KEY_PREFIX}{name.removeprefix(KEY_PREFIX)}" for name in names] != [FACTORS_KEY]:
        raise AdapterMismatchError(
            f"adapter_model.safetensors holds {shown_names(sorted(names))}; expected the one tensor {FACTORS_KEY}."
        )
    return names[0]


def _check_kind(dtype: str, shape: Sequence[int], layer_factors: Sequence[float]) -> None:
    expected = (len(layer_factors),)
    if dtype != "torch.float32" or tuple(shape) != expected:
        raise AdapterMismatchError(
            f"adapter_model.safetensors: {FACTORS_KEY} is {dtype} of shape {shown(tuple(shape))}, expected "
            f"torch.float32 of shape {expected} as in adapter_config.json."
        )
