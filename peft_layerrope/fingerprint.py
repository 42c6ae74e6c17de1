"""Tells whether a run that is resumed is the one that was interrupted."""

from __future__ import annotations

import hashlib
import json

import peft
import torch
import transformers
from torch import nn

from ._version import __version__
from .tuner.frequencies import inv_freq_names, is_length_dependent

_CHUNK = 2**15  # words of 32 bits, which stay in a processor's cache
_ODD = -0x61C8864680B583EB  # as a signed word, the usual multiplier of 64-bit hashing: 2**64 over the golden ratio


def model_fingerprint(model: nn.Module) -> str:
    """Returns a hash of the model's configuration, its attention implementation, and all of its weights and buffers.

    Each weight and buffer counts by the sum of its 32-bit words, each times an odd number of its place, modulo 2**64.
    So any change within one word is seen for certain, and changes in several words cancel hardly ever by chance;
    somebody who looks for such changes finds them. Not seen is what is neither weight nor buffer, such as bitsandbytes'
    quantization constants; what is on the `meta` device; and frequencies that transformers rewrites by the length of
    the last prompt.
    """
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    attention = sorted({str(getattr(config, "_attn_implementation", None)) for config in configs})
    digest.update(json.dumps([config, attention], sort_keys=True, default=str).encode())
    passing = {
        id(getattr(module, name))
        for module in model.modules()
        if is_length_dependent(module)
        for name in inv_freq_names(module)
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        number = None if tensor.is_meta or id(tensor) in passing else _checksum(tensor)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {number}\n".encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _checksum(tensor: torch.Tensor) -> int:
    """A number, modulo 2**64, that each bit of a tensor of any dtype and shape changes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 4 or flat.numel() % 4:
        flat = nn.functional.pad(flat, (0, -flat.numel() % 4)).clone()
    words = flat.view(torch.int32)
    places = torch.arange(min(_CHUNK, words.numel()), device=words.device) * _ODD | 1
    total = 0
    for chunk in words.split(_CHUNK):
        # in 64 bits, or little would be left of a word's upper bits; a GPU has no such `torch.dot`
        pair = chunk.to(torch.int64), places[: chunk.numel()]
        total = (total * _ODD + int(torch.dot(*pair) if words.is_cpu else torch.mul(*pair).sum())) % 2**64
    return total


def library_versions() -> dict[str, str]:
    """Returns the versions of what computes the figures."""
    return {
        "peft_layerrope": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
