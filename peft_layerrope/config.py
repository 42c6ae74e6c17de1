"""`LayerRopeConfig`: what an adapter says, validated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Optional

from peft.config import PeftConfig

from .errors import InvalidConfigError
from .registration import LAYER_ROPE
from .scaling import ROPE_TYPES

MAX_LAYERS = 4096
"""Upper limit on `len(layer_factors)`: an adapter from a stranger cannot ask for more."""


@dataclass
class LayerRopeConfig(PeftConfig):
    """Configuration of a [`LayerRopeModel`]: one RoPE scaling factor per layer (arXiv 2503.04355).

    Args:
        rope_type (`str`, defaults to `"default"`):
            transformers' names: `"default"` divides each layer's positions by its factor, on top of whatever
            rotary embedding the model has; `"linear"` is Position Interpolation, by `factor` times the layer's
            factor; `"dynamic"` is Dynamic-NTK with that product as its factor.
        factor (`float`, defaults to 1.0):
            Global factor of `"linear"` and `"dynamic"` (target length / trained length).
        layer_factors (`list[float]`, *optional*):
            One positive factor per layer, first layer first. `None` means 1.0 for every layer.
        original_max_position_embeddings (`int`, *optional*):
            Trained window in tokens, for `"dynamic"`. Defaults to the model's `max_position_embeddings`.
        target_length (`int`, *optional*):
            For `"dynamic"`: scale for this length, in tokens, whatever the current one is. Then a KV cache keeps no
            keys that were rotated for a shorter length. By default the frequencies follow the current length, as
            transformers' own do.
        control_points (`list[list[float]]`, *optional*):
            Provenance: the four `(x, y)` points of the Bézier curve that the factors came from.
        scaled_layers (`list[int]`, *optional*):
            Provenance: indices of the layers that the search was allowed to scale.
        searcher_version (`str`, *optional*):
            Provenance: the version of `peft_layerrope` that searched.

    Raises:
        InvalidConfigError: a `ValueError` that names the field, its value and what was expected.

    Example:
    ```py
    >>> from peft import get_peft_model
    >>> from peft_layerrope import LayerRopeConfig

    >>> config = LayerRopeConfig(layer_factors=[1.0, 1.4, 1.6, 1.2], task_type="CAUSAL_LM")
    >>> model = get_peft_model(model, config)
    ```
    """

    rope_type: str = field(default="default", metadata={"help": "One of 'default', 'linear' (PI), 'dynamic' (NTK)."})
    factor: float = field(default=1.0, metadata={"help": "Global factor of 'linear' and 'dynamic'."})
    layer_factors: Optional[list[float]] = field(
        default=None, metadata={"help": "One positive factor per layer; None means 1.0 everywhere."}
    )
    original_max_position_embeddings: Optional[int] = field(
        default=None, metadata={"help": "Trained window in tokens, for 'dynamic'; default: the model's own."}
    )
    target_length: Optional[int] = field(
        default=None, metadata={"help": "Fixed length in tokens for 'dynamic'; default: the current length."}
    )
    control_points: Optional[list[list[float]]] = field(
        default=None, metadata={"help": "Provenance: four (x, y) control points of the Bézier curve."}
    )
    scaled_layers: Optional[list[int]] = field(
        default=None, metadata={"help": "Provenance: indices of the layers the search could scale."}
    )
    searcher_version: Optional[str] = field(
        default=None, metadata={"help": "Provenance: version of peft_layerrope that searched."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LAYER_ROPE
        if self.rope_type not in ROPE_TYPES:
            raise InvalidConfigError(
                f"rope_type={self.rope_type!r} is unknown, expected one of {', '.join(ROPE_TYPES)}."
            )
        self.factor = _positive_float("factor", self.factor)
        if self.rope_type == "default" and self.factor != 1.0:
            raise InvalidConfigError(
                f"factor={self.factor} has no effect with rope_type='default': use rope_type='linear' or 'dynamic', "
                "or put it into layer_factors."
            )
        if self.layer_factors is not None:
            values = _checked_list("layer_factors", self.layer_factors, maximum=MAX_LAYERS)
            self.layer_factors = [_positive_float(f"layer_factors[{i}]", v) for i, v in enumerate(values)]
        for name in ("original_max_position_embeddings", "target_length"):
            value = getattr(self, name)
            if value is not None and _checked_int(name, value) < 1:
                raise InvalidConfigError(f"{name}={value} must be at least 1 token.")
        if self.target_length is not None and self.rope_type != "dynamic":
            raise InvalidConfigError(
                f"target_length={self.target_length} has no effect with rope_type={self.rope_type!r}: only 'dynamic' "
                "depends on the length."
            )
        self._check_provenance()

    def _check_provenance(self) -> None:
        if self.control_points is not None:
            points = _checked_list("control_points", self.control_points, maximum=4)
            if len(points) != 4:
                raise InvalidConfigError(f"control_points has {len(points)} points, expected 4 (x, y) pairs.")
            self.control_points = [
                [
                    _finite_float(f"control_points[{i}]", v)
                    for v in _checked_list(f"control_points[{i}]", p, minimum=2, maximum=2)
                ]
                for i, p in enumerate(points)
            ]
        if self.scaled_layers is not None:
            layers = _checked_list("scaled_layers", self.scaled_layers, minimum=0, maximum=MAX_LAYERS)
            self.scaled_layers = [_checked_int(f"scaled_layers[{i}]", v) for i, v in enumerate(layers)]
            if any(v < 0 for v in self.scaled_layers):
                raise InvalidConfigError(f"scaled_layers={self.scaled_layers} must be layer indices, 0 or more.")
        if self.searcher_version is not None and not isinstance(self.searcher_version, str):
            raise InvalidConfigError(f"searcher_version={self.searcher_version!r} must be a string.")

    def resolved_layer_factors(self, num_hidden_layers: int) -> list[float]:
        """Returns one factor per layer of a model with `num_hidden_layers`, all 1.0 where none were given."""
        return list(self.layer_factors) if self.layer_factors is not None else [1.0] * num_hidden_layers


def _finite_float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidConfigError(f"{name}={value!r} must be a number.")
    number = float(value)
    if not math.isfinite(number):
        raise InvalidConfigError(f"{name}={value!r} must be finite.")
    return number


def _positive_float(name: str, value: Any) -> float:
    number = _finite_float(name, value)
    if number <= 0:
        raise InvalidConfigError(f"{name}={value!r} must be greater than 0.")
    return number


def _checked_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidConfigError(f"{name}={value!r} must be an integer.")
    return value


def _checked_list(name: str, value: Any, *, minimum: int = 1, maximum: int) -> Sequence[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise InvalidConfigError(f"{name} must be a list, got {type(value).__name__}.")
    if not minimum <= len(value) <= maximum:
        expected = f"{minimum}" if minimum == maximum else f"{minimum} to {maximum}"
        raise InvalidConfigError(f"{name} has {len(value)} entries, expected {expected}.")
    return value
