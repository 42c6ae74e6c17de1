"""What the adapter must equal: models patched by hand, from a formula, without a line of the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel


def plain_rotation(
    position_ids: torch.Tensor, theta: float, head_dim: int, factor: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(cos, sin)` of plain RoPE with its inverse frequencies divided by `factor`, each `(B, S, head_dim)`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=position_ids.device).float() / head_dim
    inv_freq = 1.0 / theta**exponents / factor
    angles = position_ids[..., None].float() * inv_freq
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def hand_patched(model: PreTrainedModel, factors: Sequence[float]) -> PreTrainedModel:
    """Has every decoder layer compute its own table from the `position_ids` that it is given, and returns the model.

    Works for models whose layers all rotate whole heads by plain RoPE, with one theta or one per layer type.
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = next(
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    )
    for index, (layer, factor) in enumerate(zip(layers, factors, strict=True)):
        rope = config.rope_parameters
        if "rope_theta" not in rope:
            rope = rope[config.layer_types[index]]
        assert rope["rope_type"] == "default"
        layer.forward = _with_own_rotation(layer.forward, rope["rope_theta"], head_dim, factor)
    return model


def _with_own_rotation(forward: Callable, theta: float, head_dim: int, factor: float) -> Callable:
    def patched(
        hidden_states: torch.Tensor, *, position_ids: torch.Tensor, position_embeddings: object, **kwargs: object
    ) -> torch.Tensor:
        table = plain_rotation(position_ids, theta, head_dim, factor, hidden_states.dtype)
        return forward(hidden_states, position_ids=position_ids, position_embeddings=table, **kwargs)

    return patched
