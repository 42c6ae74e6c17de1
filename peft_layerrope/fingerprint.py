"""Tells whether a run that is resumed is the one that was interrupted."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import peft
import torch
import transformers
from torch import nn

from ._version import __version__

_SHOWN = 120  # characters of a differing value that a message shows


def model_fingerprint(model: nn.Module) -> str:
    """Returns a hash of the model's configuration and of a few values of each weight."""
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:16].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """Returns the versions of what computes the figures."""
    return {
        "peft_layerrope": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def first_difference(before: Any, now: Any, name: str = "") -> str | None:
    """Returns where two trees of JSON values first differ, and how, in words; None if they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            found = first_difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
            if found is not None:
                return found
        return None
    if before == now:
        return None
    was, is_now = (json.dumps(value)[:_SHOWN] for value in (before, now))
    return f"{name} was {was} there and is {is_now} now"
