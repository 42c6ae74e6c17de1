"""Inverse frequencies per layer: the mathematics, as pure tensor functions.

Shapes: L = number of layers, r = rotary dimension of a head (`head_dim`, or less with partial rotary).
Everything is differentiable in `layer_factors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch

RopeType = Literal["default", "linear", "dynamic"]
ROPE_TYPES: tuple[RopeType, ...] = get_args(RopeType)
"""transformers' names for plain per-layer scaling, Position Interpolation and Dynamic-NTK."""


def scale_inv_freq(
    inv_freq: torch.Tensor,
    layer_factors: torch.Tensor,
    *,
    rope_type: str = "default",
    factor: float = 1.0,
    seq_len: int | torch.Tensor | None = None,
    original_max_position_embeddings: int | None = None,
) -> torch.Tensor:
    """Returns the inverse frequencies of every layer, shape `(L, r / 2)`, from base ones of shape `(r / 2,)`, float32.

    With `s > 0` a layer's factor (or a distinct one), `n` the current length `seq_len` and `N` the trained
    window, both in tokens and needed for `dynamic` alone:

    - `default`: `inv_freq / s` (arXiv 2503.04355: positions divided by `s`).
    - `linear`: `inv_freq / (factor * s)`; `s = 1` is transformers' `_compute_linear_scaling_rope_parameters`.
    - `dynamic`: `inv_freq * alpha ** (-2i / (r - 2))`, `alpha = f * n / N - (f - 1)`, `f = factor * s`, for
      `n > N`, unchanged otherwise; `s = 1` is transformers' `_compute_dynamic_ntk_parameters`.

    Raises ValueError if `rope_type` is unknown, or `dynamic` lacks one of its two lengths.
    """
    factors = layer_factors.to(device=inv_freq.device, dtype=inv_freq.dtype)[:, None]
    if rope_type == "default":
        return inv_freq / factors
    if rope_type == "linear":
        return inv_freq / (factor * factors)
    if rope_type != "dynamic":
        raise ValueError(f"rope_type={rope_type!r} is unknown, expected one of {', '.join(ROPE_TYPES)}.")
    if seq_len is None or original_max_position_embeddings is None:
        raise ValueError("rope_type='dynamic' needs seq_len and original_max_position_embeddings.")
    # Dynamic-NTK's growth of the base, as 1 + f * (n - N) / N with n - N in integers: a length inside the window gives
    # exactly 1 and leaves the base frequencies bit for bit, and one just beyond it loses no digits. A length that is a
    # tensor stays one: no device synchronisation.
    beyond = torch.as_tensor(seq_len, device=inv_freq.device) - original_max_position_embeddings
    excess = beyond.clamp(min=0).to(inv_freq.dtype) / original_max_position_embeddings
    alpha = 1 + factor * factors * excess
    pairs = inv_freq.shape[0]
    # 2i / (r - 2) with r = 2 * pairs; a single pair has i = 0 only and keeps its frequency.
    exponents = torch.arange(pairs, device=inv_freq.device, dtype=inv_freq.dtype) / max(pairs - 1, 1)
    return inv_freq * alpha**-exponents


def plain_rope(inv_freq: torch.Tensor) -> tuple[float, float] | None:
    """Returns the base and the linear factor by which a config can state frequencies, `base ** (-2i / r) / factor`;
    None if no such two numbers give them. They have shape `(r / 2,)` with r > 2.
    """
    exact, pairs = inv_freq.double(), len(inv_freq)
    if not exact[-1] > 0:
        return None
    # float32 has seven digits: more would be those of its rounding, and 10000.0 is a layer that is not scaled
    base = float(f"{(exact[0] / exact[-1]).item() ** (pairs / (pairs - 1)):.7g}")
    factor = float(f"{1 / exact[0].item():.7g}")
    stated = base ** -(torch.arange(pairs, dtype=exact.dtype) / pairs) / factor
    return (base, factor) if torch.allclose(stated, exact.cpu(), rtol=1e-5, atol=0) else None


def rotation_table(inv_freq: torch.Tensor, length: int) -> torch.Tensor:
    """Returns the cosines and sines of positions 0 to `length - 1`, in the form that servers keep: shape `(length, r)`,
    the cosines first. Of frequencies in float64, shape `(r / 2,)`, the angles of large positions lose no digits.
    """
    angles = torch.outer(torch.arange(length, dtype=inv_freq.dtype, device=inv_freq.device), inv_freq)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def merged_factors(layer_factors: Sequence[float], most: int, weights: Sequence[float] | None = None) -> list[float]:
    """Returns factors of which at most some are distinct, and which are nearest to those given: the weighted sum of
    squares by which logarithms move is least. The groups are exact, by dynamic programming over the sorted factors.

    Each layer gets the weighted geometric mean of its group, or what was given where that has few enough. All factors
    and weights are > 0, `most` is at least 1.
    """
    logs, place = np.unique(np.log(layer_factors), return_inverse=True)
    count = len(logs)
    if count <= most:
        return list(layer_factors)
    mass = np.bincount(place, weights)
    sums = np.cumsum([np.zeros(3), *np.stack([mass, mass * logs, mass * logs**2], axis=1)], axis=0)

    def squares(starts: np.ndarray, end: int) -> np.ndarray:
        """Of the groups from each start up to an end, around their means."""
        total, first, second = (sums[end] - sums[starts]).T
        return second - first**2 / total

    least, cuts = np.full(count + 1, np.inf), []
    least[0] = 0.0
    for _ in range(most):
        totals = [least[:end] + squares(np.arange(end), end) for end in range(1, count + 1)]
        cuts.append([0, *(int(np.argmin(row)) for row in totals)])
        least = np.array([np.inf, *(row.min() for row in totals)])
    means, end = np.empty(count), count
    for cut in reversed(cuts):
        total, first, _ = sums[end] - sums[cut[end]]
        means[cut[end] : end], end = first / total, cut[end]
    return np.exp(means[place]).tolist()
