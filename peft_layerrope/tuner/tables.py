"""Position tables, one per distinct factor, made by the family's own rotary code; and the hook that hands each
decoder layer its own.

The model computes its table once and passes it to every decoder layer. We answer with opaque [`LayerTables`]
instead; a forward pre-hook on each layer opens it. If a hook were bypassed, attention would fail on the opaque
object: scaling either happens or raises.

Shapes: B = batch, S = sequence, r = rotary dimension, L = number of layers, U = number of distinct factors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import LayerRopeError
from .scaling import scale_inv_freq

BANK_BYTES = 32 * 2**20
"""Tables of all distinct factors are kept together up to this size; above, a layer's is made when it is needed."""


@dataclass(frozen=True, eq=False)
class LayerScaling:
    """What one adapter does to the rotation: `scale_inv_freq`'s arguments, as Python numbers."""

    rope_type: str
    factor: float
    layer_factors: tuple[float, ...]
    original_max_position_embeddings: int | None
    target_length: int | None = None
    distinct: tuple[float, ...] = field(init=False)  # the U distinct factors, ascending
    index: tuple[int, ...] = field(init=False)  # L entries: which of them a layer has
    _on_device: dict[Any, torch.Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        distinct = tuple(sorted(set(self.layer_factors)))
        object.__setattr__(self, "distinct", distinct)
        object.__setattr__(self, "index", tuple(distinct.index(factor) for factor in self.layer_factors))

    def to_plain(self) -> dict[str, Any]:
        """Returns what makes it, as JSON values."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        return {**values, "layer_factors": list(self.layer_factors)}

    def tensor_on(self, device: torch.device, values: tuple, dtype: torch.dtype) -> torch.Tensor:
        """Returns `distinct` or `index` as a tensor, made once for each device."""
        if torch.compiler.is_compiling():  # a cache filled inside a graph would have it compiled again
            return torch.tensor(values, dtype=dtype, device=device)
        if (device, dtype) not in self._on_device:
            self._on_device[device, dtype] = torch.tensor(values, dtype=dtype, device=device)
        return self._on_device[device, dtype]

    @property
    def depends_on_length(self) -> bool:
        """Whether the tables change with the sequence length."""
        return self.rope_type == "dynamic" and self.target_length is None

    def scale(self, inv_freq: torch.Tensor, position_ids: torch.Tensor | None, reached: bool = True) -> torch.Tensor:
        """Returns the frequencies for each distinct factor, shape `(U, r / 2)`; see [`scale_inv_freq`].

        `position_ids` may be None where [`depends_on_length`] is false. `reached` says whether the rope type concerns
        this table; on any other a layer's factor acts as in `default`.
        """
        return scale_inv_freq(
            inv_freq,
            self.tensor_on(inv_freq.device, self.distinct, torch.float32),
            rope_type=self.rope_type if reached else "default",
            factor=self.factor,
            seq_len=position_ids.max() + 1 if self.depends_on_length else self.target_length,
            original_max_position_embeddings=self.original_max_position_embeddings,
        )


class _ScaledView:
    """A rotary module as its `forward` sees it, with other frequencies. Nothing is mutated."""

    def __init__(self, rotary: nn.Module, scale: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        self._rotary = rotary
        self._scale = scale

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._rotary, name)
        # one `inv_freq`, or one per layer type: `sliding_attention_inv_freq`, ...
        return self._scale(name, value) if name.endswith("inv_freq") else value


def family_table(
    rotary: nn.Module,
    scale: Callable[[str, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    position_ids: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Returns the table that the family's own rotary code makes from scaled frequencies.

    Calls the undecorated `forward` (below `torch.no_grad` and transformers' `dynamic_rope_update`), so it is
    differentiable in the frequencies and keeps `attention_scaling`, partial rotary and layout. The table is mostly
    `(cos, sin)`, each `(B, S, r)` in `x.dtype`. The rotary module is not changed.

    `scale`, given the name and the tensor of an `inv_freq`, shape `(r / 2,)`, float32, returns the one to use. All else
    is as the model passes it: `x` of the wanted device and dtype, `position_ids` of shape `(B, S)`, or `(3, B, S)` for
    mrope, and perhaps a layer type.
    """
    forward: Callable = inspect.unwrap(type(rotary).forward)
    return forward(_ScaledView(rotary, scale), x, position_ids, *args, **kwargs)


def stacked_tables(
    rotary: nn.Module,
    scale: Callable[[str, torch.Tensor], torch.Tensor],
    count: int,
    x: torch.Tensor,
    position_ids: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Returns `count` = U tables from one call of the family's code, one after the other: `(U * B, S, r)` each.

    The U sets of frequencies take the place of batch rows. Injection compares the result with [`family_table`]'s
    on the live module; a family that does not bear it gets its tables one by one. Arguments are as there, but `scale`
    returns U sets of frequencies, shape `(U, r / 2)`.
    """
    batch = position_ids.shape[-2]
    if batch > 1:  # rows in the order (u, b)
        position_ids = position_ids.repeat(*[1] * (position_ids.ndim - 2), count, 1)

    def rows(name: str, inv_freq: torch.Tensor) -> torch.Tensor:
        scaled = scale(name, inv_freq)
        return (scaled.repeat_interleave(batch, dim=0) if batch > 1 else scaled).unsqueeze(1)

    return family_table(rotary, rows, x, position_ids, *args, **kwargs)


def split_tables(stacked: Any, batch: int) -> tuple[Any, ...]:
    """Returns the U tables of [`stacked_tables`], each in the family's form; `batch` is B. Any axes of mrope's stand
    before the rows.
    """
    if isinstance(stacked, torch.Tensor):
        return stacked.unflatten(-3, (-1, batch)).unbind(-4)
    return tuple(zip(*[split_tables(part, batch) for part in stacked], strict=True))


def table_parts(table: Any) -> tuple[torch.Tensor, ...]:
    """Returns the tensors of a table: `cos` and `sin`, or a complex `freqs_cis`."""
    return (table,) if isinstance(table, torch.Tensor) else tuple(table)


class LayerTables:
    """The position tables of all layers. Opaque to the model; only [`LayerTableHook`] opens it."""

    for_layer: Callable[[LayerTableHook], Any]  # the layer's table, in the form that the family's own rotary returns

    def __init__(self, scaling: LayerScaling, device: torch.device) -> None:
        self._index = scaling.index
        traced = torch.compiler.is_compiling()  # made inside a graph, as its layers then are too
        self._index_tensor = None if traced else scaling.tensor_on(device, scaling.index, torch.int64)

    def _row_of(self, layer: LayerTableHook) -> torch.Tensor | None:
        """Which of the U tables, as a tensor of one entry, where a layer is compiled on its own: there a Python
        number would have the same code compiled again for each layer. None transfer.
        """
        if self._index_tensor is None or not torch.compiler.is_compiling():
            return None
        return self._index_tensor.index_select(0, layer.number.to(self._index_tensor.device))

    def _refuse(self, *_: Any) -> NoReturn:
        raise LayerRopeError(
            "a decoder layer received the position tables of all layers unopened: its forward pre-hook was removed or "
            "bypassed, so its factor cannot be applied. Load the adapter again on a fresh model."
        )

    __iter__ = __getitem__ = _refuse  # what attention does first with (cos, sin)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)  # copy, pickle and inspection ask for what is not there
        self._refuse()  # or with a complex table: `.to(device)`


class TableBank(LayerTables):
    """All U tables at once, as [`stacked_tables`] returns them."""

    def __init__(self, scaling: LayerScaling, stacked: Any, batch: int, device: torch.device) -> None:
        super().__init__(scaling, device)
        self._stacked = stacked
        self._batch = batch
        self._tables = split_tables(stacked, batch)

    def for_layer(self, layer: LayerTableHook) -> Any:
        row = self._row_of(layer)
        if row is None:
            return self._tables[self._index[layer.layer_idx]]
        rows = row * self._batch + torch.arange(self._batch, device=row.device)
        if isinstance(self._stacked, torch.Tensor):
            return self._stacked.index_select(-3, rows)
        return tuple(part.index_select(-3, rows) for part in self._stacked)


class TablesOnDemand(LayerTables):
    """A layer's table is made when the layer runs, and kept for those after it with the same factor."""

    def __init__(
        self,
        scaling: LayerScaling,
        make: Callable[[Callable[[torch.Tensor], torch.Tensor]], Any],
        device: torch.device,
    ) -> None:
        super().__init__(scaling, device)
        self._make = make  # given how to pick one of U rows of frequencies, makes the table
        self._last: tuple[int, Any] | None = None

    def for_layer(self, layer: LayerTableHook) -> Any:
        row = self._row_of(layer)
        if row is not None:
            return self._make(lambda rows: rows.index_select(0, row).squeeze(0))
        number = self._index[layer.layer_idx]
        if self._last is None or self._last[0] != number:
            self._last = None  # lets go of the old table before the new one is made
            self._last = (number, self._make(lambda rows: rows[number]))
        return self._last[1]


class LayerTableHook:
    """Forward pre-hook (`with_kwargs=True`) of decoder layer `layer_idx`: swaps in that layer's table.

    Finds it among keyword arguments, as most families pass it, or positional ones, or in a dict per layer type.
    """

    def __init__(self, layer_idx: int) -> None:
        self.layer_idx = layer_idx
        self.number = torch.tensor([layer_idx])

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        tables = kwargs.get("position_embeddings")
        if isinstance(tables, LayerTables):
            return args, {**kwargs, "position_embeddings": tables.for_layer(self)}
        if any(map(holds_tables, (*args, *kwargs.values()))):
            return tuple(map(self._open, args)), {name: self._open(value) for name, value in kwargs.items()}
        return None  # the adapter is disabled: the base model's own table passes through

    def _open(self, value: Any) -> Any:
        if isinstance(value, LayerTables):
            return value.for_layer(self)
        if not holds_tables(value):
            return value
        if isinstance(value, dict):
            return {name: self._open(part) for name, part in value.items()}
        return type(value)(map(self._open, value))


def holds_tables(value: Any) -> bool:
    """Whether an argument of a decoder layer is, or directly contains, unopened tables."""
    if isinstance(value, (dict, tuple, list)):
        return any(isinstance(part, LayerTables) for part in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, LayerTables)
