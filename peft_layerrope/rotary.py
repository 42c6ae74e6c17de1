"""The rotary wrapper, its per-layer tables, and the hook that hands each decoder layer its own.

A transformers decoder computes `position_embeddings = self.rotary_emb(hidden_states, position_ids)` once and
passes it to every layer. The wrapper answers with an opaque `LayerTables` instead of `(cos, sin)`; a forward
pre-hook on each layer opens it. If a hook were bypassed, attention would fail on the opaque object: scaling
either happens or raises. Attention modules stay where they are, so LoRA's targets and keys do not change.

Shapes: B = batch, S = sequence, r = rotary dimension, L = number of layers, U = number of distinct factors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .errors import LayerRopeError
from .scaling import scale_inv_freq

LENGTH_DEPENDENT_ROPE_TYPES = ("dynamic", "longrope")
"""transformers' types whose forward decorator rewrites `inv_freq` by length."""


@dataclass(frozen=True)
class LayerScaling:
    """What one adapter does to the rotation: `scale_inv_freq`'s arguments, as Python numbers."""

    rope_type: str
    factor: float
    layer_factors: tuple[float, ...]
    original_max_position_embeddings: int

    @property
    def distinct(self) -> tuple[float, ...]:
        """The U distinct factors, ascending."""
        return tuple(sorted(set(self.layer_factors)))

    @property
    def depends_on_length(self) -> bool:
        """Whether the tables change with the sequence length."""
        return self.rope_type == "dynamic"


class LayerTables:
    """The position tables of all layers. Opaque to the model; only `LayerTableHook` opens it."""

    __slots__ = ("_index", "_tables")

    def __init__(self, tables: Sequence[Any], index: Sequence[int]) -> None:
        self._tables = tables  # U tables, each what the family's rotary returns: (cos, sin) of shape (B, S, r)
        self._index = index  # L entries: which of the U tables a layer uses

    def for_layer(self, layer_idx: int) -> Any:
        """Returns layer `layer_idx`'s table, in the form the family's own rotary returns."""
        return self._tables[self._index[layer_idx]]

    def __iter__(self) -> NoReturn:
        raise LayerRopeError(
            "a decoder layer received the position tables of all layers unopened: its forward pre-hook was removed "
            "or bypassed, so its factor cannot be applied. Load the adapter again on a fresh model."
        )


class LayerTableHook:
    """Forward pre-hook (`with_kwargs=True`) of decoder layer `layer_idx`: swaps in that layer's table."""

    def __init__(self, layer_idx: int) -> None:
        self.layer_idx = layer_idx

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        tables = kwargs.get("position_embeddings")
        if not isinstance(tables, LayerTables):
            return None  # the adapter is disabled: the base model's own table passes through
        return args, {**kwargs, "position_embeddings": tables.for_layer(self.layer_idx)}


class _InvFreqView:
    """A rotary module as its `forward` sees it, with another `inv_freq`. Nothing is mutated."""

    def __init__(self, rotary: nn.Module, inv_freq: torch.Tensor) -> None:
        self._rotary = rotary
        self.inv_freq = inv_freq

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rotary, name)


def family_table(rotary: nn.Module, inv_freq: torch.Tensor, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
    """Returns the table that the family's own rotary code makes from `inv_freq`.

    Calls the undecorated `forward` (below `torch.no_grad` and transformers' `dynamic_rope_update`), so it is
    differentiable in `inv_freq` and keeps `attention_scaling`, partial rotary and layout.

    Args:
        rotary: a transformers rotary module; not changed.
        inv_freq: shape `(r / 2,)`, float32.
        x: any tensor with the wanted device and output dtype, as the model passes it.
        position_ids: shape `(B, S)` (mrope: as the family passes them), int64.

    Returns:
        `(cos, sin)`, each `(B, S, r)` in `x.dtype`, for every family supported so far.
    """
    forward: Callable = inspect.unwrap(type(rotary).forward)
    return forward(_InvFreqView(rotary, inv_freq), x, position_ids)


class _RotaryShell(nn.Module):
    """What the tuner layer and the baked module share: a rotary module kept in float32."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self._device_factors: dict[tuple[LayerScaling, torch.device], torch.Tensor] = {}

    def _original(self) -> nn.Module:
        raise NotImplementedError

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """Moves like any module, but keeps the frequencies' dtype: `.to(torch.bfloat16)` would round them."""
        rotary = self._original()
        before = {name: buffer for name, buffer in rotary.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(rotary, name)
            if after.dtype != buffer.dtype:
                rotary._buffers[name] = buffer.to(after.device)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if name in ("base_layer", "rotary") or not modules:
                raise
            return getattr(self._original(), name)  # some models read attributes of their `rotary_emb`

    def _factors_on(self, scaling: LayerScaling, device: torch.device) -> torch.Tensor:
        """The U distinct factors as a float32 tensor on `device`, made once."""
        key = (scaling, device)
        if key not in self._device_factors:
            self._device_factors[key] = torch.tensor(scaling.distinct, dtype=torch.float32, device=device)
        return self._device_factors[key]

    def forget_scalings(self) -> None:
        """Drops the cached factor tensors of scalings no longer in use."""
        self._device_factors.clear()

    def layer_tables(self, scaling: LayerScaling, x: torch.Tensor, position_ids: torch.Tensor) -> LayerTables:
        """Returns every layer's table for `scaling`; see [`family_table`] for the arguments."""
        rotary = self._original()
        if getattr(rotary, "rope_type", "default") in LENGTH_DEPENDENT_ROPE_TYPES:
            rotary(x, position_ids)
        inv_freqs = scale_inv_freq(
            rotary.inv_freq.to(x.device),
            self._factors_on(scaling, x.device),
            rope_type=scaling.rope_type,
            factor=scaling.factor,
            seq_len=position_ids.max() + 1 if scaling.depends_on_length else None,
            original_max_position_embeddings=scaling.original_max_position_embeddings,
        )
        distinct = scaling.distinct
        tables = [family_table(rotary, inv_freq, x, position_ids) for inv_freq in inv_freqs]
        return LayerTables(tables, [distinct.index(factor) for factor in scaling.layer_factors])


class LayerRopeLayer(_RotaryShell, BaseTunerLayer):
    """PEFT tuner layer around a model's shared rotary embedding (kept as `base_layer`).

    Holds no parameter and no buffer of its own: factors are Python floats, so neither the base model's state
    dict nor a LoRA's file sees them. At most one LAYER_ROPE adapter is active at a time.
    """

    def __init__(self, base_layer: nn.Module, num_layers: int) -> None:
        super().__init__(num_layers)
        self.base_layer = base_layer
        self.scalings: dict[str, LayerScaling] = {}
        self.hook_handles: list[Any] = []
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self.merged_adapters = []

    def _original(self) -> nn.Module:
        return self.base_layer

    def set_scaling(self, adapter_name: str, scaling: LayerScaling) -> None:
        """Sets what adapter `adapter_name` does; adding it does not activate it."""
        self.scalings[adapter_name] = scaling
        self.forget_scalings()

    def active_scaling(self) -> LayerScaling | None:
        """Returns the scaling in force, or None while disabled or without an active adapter."""
        if self.disable_adapters or not self.active_adapters:
            return None
        return self.scalings[self.active_adapters[0]]

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        scaling = self.active_scaling()
        if scaling is None:
            return self.base_layer(x, position_ids, *args, **kwargs)
        return self.layer_tables(scaling, x, position_ids)

    # PEFT's layer interface, for an adapter that has no weights.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        own = [name for name in names if name in self.scalings]
        if len(own) > 1:
            raise ValueError(f"adapters {own} cannot be active together: a layer has one rotation. Activate one.")
        if own or not names:
            self._active_adapter = own  # names of other methods' adapters (a LoRA's) leave ours as it is

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled

    def delete_adapter(self, adapter_name: str) -> None:
        if self.scalings.pop(adapter_name, None) is None:
            return
        self.forget_scalings()
        if adapter_name in self._active_adapter:
            self._active_adapter = sorted(self.scalings)[:1]

    def _get_available_adapters(self) -> set[str]:
        return set(self.scalings)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.scalings)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Nothing to do: there are no weights."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Keeps the output as it is, which is all that an in-place merge promises; there are no weights."""

    def unmerge(self) -> None:
        """Counterpart of [`merge`]."""

    def unload_and_optionally_merge_module(self, **kwargs: Any) -> nn.Module:
        """Called when another tuner (a LoRA) unloads the model around us: the rotary scaling stays."""
        return self

    def remove_hooks(self) -> None:
        """Takes the decoder layers' hooks away, leaving the model as it was before injection."""
        for handle in self.hook_handles:
            handle.remove()
        self.hook_handles.clear()


class BakedLayerRope(_RotaryShell):
    """What stands in the rotary's place after `merge_and_unload()`: one scaling, no PEFT interface.

    Has no attribute called `base_layer`, by which PEFT would take it for a tuner layer and unwrap it.
    """

    def __init__(self, rotary: nn.Module, num_layers: int, scaling: LayerScaling) -> None:
        super().__init__(num_layers)
        self.rotary = rotary
        self.scaling = scaling

    def _original(self) -> nn.Module:
        return self.rotary

    def active_scaling(self) -> LayerScaling:
        """Returns the scaling in force: always the baked one."""
        return self.scaling

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> LayerTables:
        return self.layer_tables(self.scaling, x, position_ids)
