"""The modules that stand in a rotary embedding's place: PEFT's tuner layer, and the baked one.

A rotary embedding shared by the decoder layers answers with opaque `LayerTables` (see `tables`); one that sits
inside a decoder layer (moshi, recurrent_gemma) answers with that layer's table itself. Attention modules stay
where they are, so LoRA's targets and keys do not change.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import LayerRopeError
from .frequencies import frequencies_at, is_length_dependent
from .tables import BANK_BYTES, LayerScaling, TableBank, TablesOnDemand, family_table, stacked_tables


@contextmanager
def use_adapter(model: nn.Module, adapter_name: str | None) -> Iterator[None]:
    """Runs a model with one of its LAYER_ROPE adapters, in the current thread or asynchronous task only.

    The model is not changed, so threads may use different adapters of one model at the same time, where
    `set_adapter` and `disable_adapter()` would switch all of them. Contexts nest; the innermost one decides, also over
    `set_adapter` and `disable_adapter()`. A LoRA beside it stays as it is switched.

    It concerns forward passes (`generate()` included); saving, merging and `active_adapters` go by the model's own
    switch. Adding, changing or deleting adapters while requests run still needs a lock of the caller's.

    Enter it in the thread that runs the model: one that is started inside (`nn.DataParallel`, a streamer's) does not
    inherit the choice, unless it is given the context, as by `asyncio.to_thread` or `contextvars.copy_context().run`.

    While any context is open, a model under `torch.compile` is compiled again with graph breaks, and raises with
    `fullgraph=True`. Layers compiled one by one are not concerned.

    Args:
        model: a model with LAYER_ROPE adapters, or one that contains it.
        adapter_name: one of them; None for the base model's own rotation.

    Raises:
        LayerRopeError: the model has no LAYER_ROPE adapter.
        ValueError: no such adapter.

    Example:
    ```py
    >>> with use_adapter(model, "long"):
    ...     answer = model.generate(**request)
    ```
    """
    layers = [module for module in model.modules() if isinstance(module, LayerRopeLayer)]
    if not layers:
        raise LayerRopeError("use_adapter: this model has no LAYER_ROPE adapter, or it was merged or unloaded.")
    if adapter_name is not None:
        layers[0].check_known([adapter_name])
    _count(1)
    token = _choices.set({**_choices.get(), **dict.fromkeys(layers, adapter_name)})
    try:
        yield
    finally:
        _choices.reset(token)
        _count(-1)


_NO_CHOICE = object()  # where the model's own switch decides

_choices: ContextVar[Mapping[nn.Module, str | None]] = ContextVar("layer_rope_choices", default=MappingProxyType({}))

# How many choices are in force in the whole process, and whether there are any. Compiled code cannot read a context
# variable and would keep the answer it was traced with. It does check a flag, and has another form for when it is up.
_lock = threading.Lock()
_in_force = 0
_any_in_force = False


def _count(change: int) -> None:
    global _in_force, _any_in_force
    with _lock:
        _in_force += change
        _any_in_force = _in_force > 0


_REASON = "a context variable cannot be read in a graph: with fullgraph=True, use set_adapter, not use_adapter"


@torch.compiler.disable(reason=_REASON)
def _look_up(layer: nn.Module) -> str | object | None:
    return _choices.get().get(layer, _NO_CHOICE)


_refreshing = threading.Lock()  # one for all modules: a lock of their own could be neither copied nor pickled


def _one_at_a_time(rotary: nn.Module) -> AbstractContextManager[Any]:
    """Held while `rotary` rewrites its frequencies by length and answers with them: else another thread's come in."""
    return nullcontext() if torch.compiler.is_compiling() or not is_length_dependent(rotary) else _refreshing


@dataclass(frozen=True)
class RotaryTraits:
    """What injection found out about a rotary module."""

    frequencies: dict[str, torch.Tensor]  # its own, by name: see `own_frequencies`
    reached: frozenset[str]  # names of those that an adapter's rope type scales; a layer's factor scales all
    stackable: bool  # whether `stacked_tables` was proven to give the family's own tables

    def on(self, device: torch.device) -> RotaryTraits:
        """Returns the same on a device; `meta`, which would lose the values, leaves them where they are."""
        if device.type == "meta" or all(value.device == device for value in self.frequencies.values()):
            return self
        return replace(self, frequencies={name: value.to(device) for name, value in self.frequencies.items()})


class RotaryShell(nn.Module):
    """What the tuner layer and the baked module share: the model's own rotary, its frequencies in float32, its tables,
    and the index of the decoder layer that it sits in, None when the decoder layers share it.
    """

    _place: str  # the attribute that holds the model's own rotary

    def __init__(self, original: nn.Module, layer_idx: int | None, traits: RotaryTraits) -> None:
        super().__init__()
        setattr(self, self._place, original)
        self.layer_idx = layer_idx
        self.traits = traits
        self._scaled: dict[Any, torch.Tensor] = {}

    @property
    def original(self) -> nn.Module:
        """The model's own rotary."""
        return getattr(self, self._place)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """Moves and casts like any module. Only the frequencies that we scale are moved and not cast."""
        super()._apply(fn, recurse)
        self.traits = self.traits.on(next(self.original.buffers()).device)
        self._scaled.clear()
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "rotary") or not self.__dict__.get("_modules"):
                raise
            return getattr(self.original, name)  # some models read attributes of their `rotary_emb`

    def scaled_output(
        self, scaling: LayerScaling, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Returns what the rotary's forward answers under `scaling`: every layer's tables, unopened, or for a rotary
        inside a decoder layer that layer's table. See [`family_table`] for the arguments.
        """
        rotary = self.original
        length_dependent = is_length_dependent(rotary)
        frequencies = self.traits.on(x.device).frequencies
        if length_dependent:
            frequencies = frequencies_at(rotary, frequencies, position_ids)
        depends_on_length = scaling.depends_on_length or length_dependent

        def rows(name: str, _: torch.Tensor) -> torch.Tensor:
            reached = name in self.traits.reached
            if depends_on_length or torch.compiler.is_compiling():  # asked here: a layer may be compiled on its own
                return scaling.scale(frequencies[name], position_ids, reached)
            key = (scaling, name, x.device)
            if key not in self._scaled:
                self._scaled[key] = scaling.scale(frequencies[name], None, reached)
            return self._scaled[key]

        def make(pick: Callable[[torch.Tensor], torch.Tensor]) -> Any:
            return family_table(rotary, lambda name, v: pick(rows(name, v)), x, position_ids, *args, **kwargs)

        if self.layer_idx is not None:
            number = scaling.index[self.layer_idx]
            return make(lambda rows: rows[number])
        if not self.traits.stackable or self._bank_bytes(scaling, x, position_ids) > BANK_BYTES:
            # Not the tensor itself: it is the first layer's input, and where layers are compiled one by one, that
            # sameness would have the hook compiled again for the others.
            x = x.detach()
            return TablesOnDemand(scaling, make, x.device)
        stacked = stacked_tables(rotary, rows, len(scaling.distinct), x, position_ids, *args, **kwargs)
        return TableBank(scaling, stacked, position_ids.shape[-2], x.device)

    def _bank_bytes(self, scaling: LayerScaling, x: torch.Tensor, position_ids: torch.Tensor) -> int:
        """Upper bound of the size of all tables: cos and sin for each frequency, twice."""
        if torch.compiler.is_compiling():
            return 0  # a size read inside a graph would fix it; and compiled code need not keep what it can fuse
        pairs = max(inv_freq.shape[0] for inv_freq in self.traits.frequencies.values())
        tokens = position_ids.shape[-1] * position_ids.shape[-2]
        return len(scaling.distinct) * tokens * 4 * pairs * x.element_size()


class LayerRopeLayer(RotaryShell, BaseTunerLayer):
    """PEFT tuner layer around a rotary embedding of the model (kept as `base_layer`).

    Holds no parameter and no buffer of its own: factors are Python floats, so neither the base model's state
    dict nor a LoRA's file sees them. At most one LAYER_ROPE adapter is active at a time.
    """

    _place = "base_layer"

    def __init__(self, original: nn.Module, layer_idx: int | None, traits: RotaryTraits) -> None:
        super().__init__(original, layer_idx, traits)
        self.scalings: dict[str, LayerScaling] = {}
        self.hook_handles: list[Any] = []  # of the decoder layers' hooks; the first wrapper of a model keeps them
        self.frozen_by_injection: list[nn.Parameter] = []  # likewise; given back at unload
        self.record: Callable[[LayerScaling | None], None] | None = None  # likewise; writes to the model's config
        self.is_recording = False  # whether the model's config has to say which scaling is in force
        self.has_peft_model = False  # a LAYER_ROPE PeftModel switches us; else whoever walks over the tuner layers
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self.merged_adapters = []

    def check_known(self, names: Sequence[str]) -> None:
        """Raises ValueError of names that are no adapters."""
        unknown = [name for name in names if name not in self.scalings]
        if unknown:
            raise ValueError(f"adapters {unknown} do not exist; this model has {sorted(self.scalings)}.")

    def set_scaling(self, adapter_name: str, scaling: LayerScaling) -> None:
        """Sets what adapter `adapter_name` does; adding it does not activate it."""
        self.scalings[adapter_name] = scaling
        self._scaled.clear()  # those of scalings no longer in use
        self._update_record()

    def start_recording(self) -> None:
        """From now on keeps the scaling in force in the model's config, as for a baked model: nothing else remembers
        it when the model is saved with `save_pretrained`.
        """
        self.is_recording = True
        self._update_record()

    def _update_record(self) -> None:
        if self.is_recording and self.record is not None:
            self.record(self._switched_scaling())

    def _switched_scaling(self) -> LayerScaling | None:
        """The scaling that `set_adapter` and `disable_adapter` have left in force."""
        active = self.active_adapters  # read once: another thread may be switching
        return None if self.disable_adapters or not active else self.scalings[active[0]]

    def active_scaling(self) -> LayerScaling | None:
        """Returns the scaling in force for the caller, or None while disabled or without an active adapter; raises
        LayerRopeError if the adapter that the caller has chosen by `use_adapter` was deleted.
        """
        name = _look_up(self) if _any_in_force else _NO_CHOICE
        if name is _NO_CHOICE:
            return self._switched_scaling()
        if name is not None and name not in self.scalings:
            raise LayerRopeError(f"use_adapter: adapter {name!r} was deleted while in use.")
        return self.scalings.get(name)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        scaling = self.active_scaling()
        if scaling is None:
            with _one_at_a_time(self.base_layer):
                return self.base_layer(x, position_ids, *args, **kwargs)
        return self.scaled_output(scaling, x, position_ids, *args, **kwargs)

    # PEFT's layer interface, for an adapter that has no weights.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        own = [name for name in names if name in self.scalings]
        if len(own) > 1:
            raise ValueError(f"adapters {own} cannot be active together: a layer has one rotation. Activate one.")
        if own or not names:
            self._active_adapter = own  # names of other methods' adapters (a LoRA's) leave ours as it is
            self._update_record()

    def enable_adapters(self, enabled: bool) -> None:
        """Called for every tuner layer, by a LoRA's `disable_adapter()` as well. That is about the LoRA, so it has no
        effect where a PeftModel of our own has a `disable_adapter()`; adapters injected without one have only this.
        """
        if not self.has_peft_model:
            self.switch(enabled)

    def switch(self, enabled: bool) -> None:
        """Turns the scaling on or off."""
        self._disable_adapters = not enabled
        self._update_record()

    def delete_adapter(self, adapter_name: str) -> None:
        if self.scalings.pop(adapter_name, None) is None:
            return
        self._scaled.clear()  # those of scalings no longer in use
        if adapter_name in self._active_adapter:
            self._active_adapter = sorted(self.scalings)[:1]
            self._update_record()
            if self._active_adapter:
                warnings.warn(
                    f"the active adapter {adapter_name!r} was deleted; {self._active_adapter[0]!r} is active now.",
                    stacklevel=2,
                )

    def _get_available_adapters(self) -> set[str]:
        return set(self.scalings)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Keeps the output as it is, which is all that an in-place merge promises; there are no weights."""

    def unmerge(self) -> None:
        """Counterpart of [`merge`]."""

    def unload_and_optionally_merge_module(self, **kwargs: Any) -> nn.Module:
        """Called when another tuner (a LoRA) unloads the model around us: the rotary scaling stays."""
        self.start_recording()  # what is left looks like a plain model, and may be saved as one
        return self

    def release(self) -> nn.Module:
        """Undoes what injection did beside replacing the rotary, and returns the model's own rotary."""
        for handle in self.hook_handles:
            handle.remove()
        self.hook_handles.clear()
        if self.is_recording and self.record is not None:
            self.record(None)
        self.thaw()
        return self.base_layer

    def thaw(self) -> None:
        """Lets the parameters that injection froze be trained again."""
        for parameter in self.frozen_by_injection:
            parameter.requires_grad_(True)
        self.frozen_by_injection.clear()


class BakedLayerRope(RotaryShell):
    """What stands in the rotary's place after `merge_and_unload()`: one scaling, no PEFT interface.

    Has no attribute called `base_layer`, by which PEFT would take it for a tuner layer and unwrap it.
    """

    _place = "rotary"

    def __init__(self, original: nn.Module, layer_idx: int | None, traits: RotaryTraits, scaling: LayerScaling) -> None:
        super().__init__(original, layer_idx, traits)
        self.scaling = scaling

    def active_scaling(self) -> LayerScaling:
        """Returns the scaling in force: always the baked one."""
        return self.scaling

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.scaled_output(self.scaling, x, position_ids, *args, **kwargs)
