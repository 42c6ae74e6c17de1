"""Proves on a model's live rotary module that scaling its frequencies scales the rotation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .frequencies import inv_freq_names
from .tables import family_table, map_table, split_tables, stacked_tables

# What a family's code raises when it is not called the way it expects.
_CALL_ERRORS = (TypeError, AttributeError, RuntimeError, ValueError, KeyError, IndexError)


def prove_rotary_scales(rotary: nn.Module, kind: str) -> None:
    """Proves that the rotary's tables follow the frequencies that it is given, for each of its layer types.

    The table for `inv_freq / 2` at positions `2p` must equal the one for `inv_freq` at `p` (halving and doubling
    are exact in floating point), and differ from the one for `inv_freq` at `2p`. Runs on the CPU with
    frequencies of its own, so it needs neither the model's device nor its weights.

    Args:
        rotary: the model's rotary module, unwrapped; not changed.
        kind: the model type, for the message.

    Raises:
        UnsupportedModelError: the family recomputes its frequencies, so scaling would silently do nothing.
    """
    x = torch.zeros(1, 8, 1)
    for arguments in _layer_types(rotary):
        positions = torch.arange(8)[None]
        mrope = positions.expand(3, -1, -1)  # where transformers is older, mrope takes no other
        if _takes(rotary, x, mrope, arguments) and not _takes(rotary, x, positions, arguments):
            positions = mrope
        try:
            reference = _table(rotary, 1, x, positions, arguments)
            halved = _table(rotary, 2, x, positions * 2, arguments)
            unscaled = _table(rotary, 1, x, positions * 2, arguments)
        except _CALL_ERRORS as error:
            raise UnsupportedModelError(
                f"{kind}: {type(rotary).__name__} cannot be called with another `inv_freq` ({error})."
            ) from error
        follows = all(torch.allclose(a, b, atol=1e-6) for a, b in zip(halved, reference, strict=True))
        changes = any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(halved, unscaled, strict=True))
        if not (follows and changes):
            raise UnsupportedModelError(
                f"{kind}: {type(rotary).__name__} does not rotate by the `inv_freq` it is given, so scaling it would "
                "silently do nothing."
            )


def tables_can_be_stacked(rotary: nn.Module) -> bool:
    """Whether [`stacked_tables`] gives bit for bit what [`family_table`] gives, on this module.

    Compared with two sets of frequencies on two rows of different positions, and on one row.
    """
    x = torch.zeros(2, 5, 1)
    two_rows = torch.stack([torch.arange(5), torch.arange(3, 8)])
    divisors = torch.tensor([1.0, 2.0])
    for arguments in _layer_types(rotary):
        for positions in (two_rows, two_rows[:1], two_rows.expand(3, -1, -1)):
            if not _takes(rotary, x, positions, arguments):
                continue
            try:
                single = [_table(rotary, d, x, positions, arguments) for d in divisors]
                table = stacked_tables(
                    rotary, lambda _, v: _frequencies(v) / divisors[:, None], 2, x, positions, *arguments
                )
                split = split_tables(table, positions.shape[-2])
            except _CALL_ERRORS:
                return False
            if len(split) != 2:
                return False
            for one, parts in zip(split, single, strict=True):
                if not all(torch.equal(a, b) for a, b in zip(_parts(one), parts, strict=True)):
                    return False
    return True


def _takes(rotary: nn.Module, x: torch.Tensor, positions: torch.Tensor, arguments: tuple) -> bool:
    """Whether the module can be called with such positions; those of mrope have a third axis."""
    try:
        _table(rotary, 1, x, positions, arguments)
    except _CALL_ERRORS:
        return False
    return True


def _layer_types(rotary: nn.Module) -> Iterator[tuple[str, ...]]:
    """The further arguments that reach each of the module's frequency vectors: none, or the layer type."""
    for name in inv_freq_names(rotary):
        layer_type = name.removesuffix("inv_freq").removesuffix("_")
        yield (layer_type,) if layer_type else ()


def _frequencies(like: torch.Tensor) -> torch.Tensor:
    """Frequencies of our own, on the CPU: the module's may be on the meta device."""
    pairs = like.shape[0]
    return 1.0 / 100.0 ** (torch.arange(pairs, dtype=torch.float32) / pairs)


def _table(
    rotary: nn.Module, divisor: float | torch.Tensor, x: torch.Tensor, positions: torch.Tensor, arguments: tuple
) -> list[torch.Tensor]:
    return _parts(family_table(rotary, lambda _, v: _frequencies(v) / divisor, x, positions, *arguments))


def _parts(table: Any) -> list[torch.Tensor]:
    parts: list[torch.Tensor] = []
    map_table(lambda part: parts.append(torch.view_as_real(part) if part.is_complex() else part), table)
    return parts
