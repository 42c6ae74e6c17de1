"""Factors on a model of mlx-lm, whose attention modules own their rotary embedding each."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load as load_plain
from transformers import AutoConfig, PretrainedConfig

from ..base_model import empty_model
from ..errors import UnsupportedModelError
from ..loading import load_adapter_config
from ..tuner.config import LayerRopeConfig
from ..tuner.injection import layer_frequencies

_TOLERANCE = 1e-3
_PROBE = 100  # the position at which frequencies are compared


class ScaledRope(nn.Module):
    """Stands for a `rope` of mlx-lm and rotates by frequencies of its own, `(r / 2,)`. By `size` the family multiplies
    what it rotates (YaRN).
    """

    def __init__(self, rope: nn.Module, inv_freq: Any, size: float) -> None:
        super().__init__()
        self.dims = getattr(rope, "dims", None) or rope.dim
        self.traditional, self.size = getattr(rope, "traditional", False), size
        self._freqs, self._called = 1 / mx.array(inv_freq.tolist()), False  # mlx counts in tokens per radian

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        self._called = True
        if self.size != 1:
            x = x.at[..., : self.dims].multiply(self.size)
        settings = {"traditional": self.traditional, "base": None, "scale": 1.0, "freqs": self._freqs}
        return mx.fast.rope(x, self.dims, offset=offset, **settings)


def load(model: str, adapter: str) -> tuple[nn.Module, Any]:
    """Loads a model as `mlx_lm.load` does, and scales it.

    Args:
        model: folder or Hub id of a model with a `config.json` as transformers has them.
        adapter: folder or Hub id.

    Returns:
        The model and its tokenizer, for `mlx_lm.generate`.

    Raises:
        LayerRopeError: the adapter cannot be read, does not fit, or a layer cannot be scaled.
    """
    loaded, tokenizer = load_plain(model)
    scale(loaded, AutoConfig.from_pretrained(model), load_adapter_config(adapter))
    return loaded, tokenizer


def scale(model: nn.Module, config: PretrainedConfig, adapter: LayerRopeConfig) -> None:
    """Gives each layer of a model of mlx-lm, in place, a rotary embedding with frequencies of its own, and runs it on
    two tokens. `config` is transformers' of the same model; a `dynamic` adapter needs a `target_length`. Raises
    LayerRopeError, which names a layer that cannot be scaled.
    """
    frequencies, made = layer_frequencies(adapter, empty_model(config)), {}
    for index, (layer, (own, scaled)) in enumerate(zip(model.layers, frequencies, strict=True)):
        owners = [module for _, module in layer.named_modules() if isinstance(module.get("rope"), nn.Module)]
        if len(owners) != 1:
            raise UnsupportedModelError(
                f"layer {index} has {len(owners)} rotary embeddings called `rope`, expected one."
            )
        rope = owners[0].rope
        probe = mx.ones((1, 1, 1, 2 * len(own)))
        found = rope(probe, offset=_PROBE)
        size = float(mx.linalg.norm(found) / mx.linalg.norm(probe))
        if not mx.allclose(found, ScaledRope(rope, own, size)(probe, offset=_PROBE), rtol=0, atol=_TOLERANCE):
            raise UnsupportedModelError(f"layer {index}: mlx-lm's {type(rope).__name__} has other frequencies.")
        made[index] = owners[0].rope = ScaledRope(rope, scaled, 1.0 if abs(size - 1) < _TOLERANCE else size)
    mx.eval(model(mx.array([[0, 1]])))
    unused = [index for index, rope in made.items() if not rope._called]
    if unused:
        raise UnsupportedModelError(f"layers {unused} do not rotate by their `rope`.")
