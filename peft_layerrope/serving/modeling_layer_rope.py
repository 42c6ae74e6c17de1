"""The model of transformers with a rotary factor for each layer, which its config states as `layer_rope_scaling`."""

from functools import partial

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig


class ScaledLayers:
    """Hands each decoder layer cosines and sines of its own: positions divided by the layer's factor."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        for layer, module in enumerate(self.base_model.layers):
            module.register_forward_pre_hook(partial(self._own_table, layer), with_kwargs=True)

    def _own_table(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        rotary, positions = self.base_model.rotary_emb, kwargs["position_ids"]
        cos, sin = kwargs["position_embeddings"]
        angles = positions[..., None].float() * self._scaled(layer, rotary.inv_freq.float(), positions)
        angles = torch.cat([angles, angles], dim=-1)
        size = rotary.attention_scaling
        table = (angles.cos() * size).to(cos.dtype), (angles.sin() * size).to(sin.dtype)
        return args, {**kwargs, "position_embeddings": table}

    def _scaled(self, layer: int, frequencies: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        rope = self.config.layer_rope_scaling
        factor = rope["factor"] * rope["layer_factors"][layer]
        if rope["rope_type"] != "dynamic":
            return frequencies / factor
        # Dynamic-NTK: the lower a frequency, the more it is divided; nothing inside the trained window
        length, window = rope["target_length"] or position_ids.max() + 1, rope["original_max_position_embeddings"]
        excess = torch.as_tensor(length - window, device=frequencies.device).clamp(min=0) / window
        exponents = torch.arange(len(frequencies), device=frequencies.device) / (len(frequencies) - 1)
        return frequencies * (1 + factor * excess) ** -exponents


class ScaledConfig(LlamaConfig):
    """The model's own, under a name that no program knows: by the model's, some would load it without such layers."""

    model_type = "layer_rope"


class ScaledForCausalLM(ScaledLayers, LlamaForCausalLM):
    """The model with such layers."""

    config_class = ScaledConfig
