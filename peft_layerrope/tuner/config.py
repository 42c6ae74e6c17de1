"""`LayerRopeConfig`: what an adapter says, validated; and how PEFT gets to know its type.

`register_peft_method` demands a member of `PeftType`, and PEFT has no hook to add one. So the closed enum is extended
here, once. If PEFT ships the name itself one day, that member is used and nothing is changed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Optional

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, PeftType, TaskType, register_peft_method

from ..errors import InvalidConfigError
from ..files import AdapterFiles, read_json_object
from ..messages import is_integer, is_number, shown, shown_names
from .scaling import ROPE_TYPES

PEFT_TYPE_NAME = "LAYER_ROPE"
PREFIX = "inv_freq_scaling_"
"""PEFT's per-method prefix. PEFT warns when an adapter's name is a substring of it, hence no plain "rope"."""


def extend_enum(enum_class: type[Enum], name: str) -> Enum:
    """Adds the member `name = "name"` to a `(str, Enum)` class, the way `EnumType` itself builds one.

    Lookup by name and value, iteration, copy, pickle and JSON work as for any member.
    """
    member = str.__new__(enum_class, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum_class
    member._sort_order_ = len(enum_class)
    type.__setattr__(enum_class, name, member)  # EnumType refuses plain assignment
    enum_class._member_names_.append(name)
    enum_class._member_map_[name] = member
    enum_class._value2member_map_[name] = member
    hashable_values = getattr(enum_class, "_hashable_values_", None)  # Python 3.12 and newer
    if hashable_values is not None:
        hashable_values.append(name)
    return member


def ensure_peft_type() -> PeftType:
    """Returns the member `PeftType.LAYER_ROPE`, adding it first if PEFT lacks it."""
    existing = PeftType.__members__.get(PEFT_TYPE_NAME)
    return existing if existing is not None else extend_enum(PeftType, PEFT_TYPE_NAME)


LAYER_ROPE = ensure_peft_type()


def register(config_cls: type, model_cls: type) -> None:
    """Registers config and tuner with PEFT; a second call changes nothing."""
    if LAYER_ROPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=PEFT_TYPE_NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)


MAX_LAYERS = 4096
"""Upper limit on `len(layer_factors)`: an adapter from a stranger cannot ask for more."""

FACTOR_RANGE = (0.01, 10_000.0)
"""What a layer's factor, the global one and their product may be: beyond, float32 angles say nothing."""

MAX_TOKENS = 2**30
"""Upper limit on lengths."""

_MAX_TEXT = 4096  # characters of a name or a path

# PEFT's classes for the two others fail on a method without weights: they look through its `modules_to_save`.
_TASK_TYPES = tuple(task.value for task in TaskType if task not in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS))


@dataclass
class LayerRopeConfig(PeftConfig):
    """Configuration of a [`LayerRopeModel`]: one RoPE scaling factor per layer (arXiv 2503.04355).

    Args:
        rope_type (`str`, defaults to `"default"`):
            transformers' names: `"default"` divides each layer's positions by its factor; `"linear"` is Position
            Interpolation, by `factor` times the layer's factor; `"dynamic"` is Dynamic-NTK with that product as its
            factor. Where sliding layers have a table of their own (Gemma 3), `"linear"` and `"dynamic"` are the
            full-attention layers', as with transformers' `rope_scaling`, and the sliding ones are scaled as with
            `"default"`. All act on top of whatever rotary embedding the model has, a scaling of its own (llama3,
            YaRN) included, and take the place of none.
        factor (`float`, defaults to 1.0):
            Global factor of `"linear"` and `"dynamic"` (target length / trained length).
        layer_factors (`list[float]`, *optional*):
            One positive factor per layer, first layer first. `None` means 1.0 for every layer. A factor, and its
            product with `factor`, is from 0.01 to 10000.
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

    files = None  # the `AdapterFiles` it was read from, until injection has checked the other file against it

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: Optional[str] = None, **kwargs: Any
    ) -> LayerRopeConfig:
        """Loads an adapter's configuration from a folder or the Hub; see [`~peft.PeftConfig`].

        Raises:
            InvalidConfigError: `adapter_config.json` is not JSON, is too large, or has a value that cannot work.
        """
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except InvalidConfigError as error:
            raise InvalidConfigError(f"{pretrained_model_name_or_path}: {CONFIG_NAME}: {error}") from error
        download, _, _ = cls._split_kwargs(kwargs)
        factors = None if config.layer_factors is None else tuple(config.layer_factors)
        config.files = AdapterFiles(str(pretrained_model_name_or_path), subfolder, download, factors)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Reads `adapter_config.json` as plain values. Names of a newer version are left out, with a warning.

        Raises:
            InvalidConfigError: not a JSON object of reasonable size, or another method's.
        """
        try:
            values = read_json_object(path_json_file)
        except ValueError as error:
            raise InvalidConfigError(f"it {error}; expected a JSON object, as save_pretrained writes it.") from error
        if values.get("peft_type") != PEFT_TYPE_NAME:
            raise InvalidConfigError(f"peft_type={shown(values.get('peft_type'))}, expected {PEFT_TYPE_NAME!r}.")
        known = {f.name for f in fields(cls)}
        unknown = [name for name in values if name not in known]
        if unknown:
            warnings.warn(
                f"{CONFIG_NAME} has fields that this version of peft_layerrope does not know and ignores: "
                f"{shown_names(unknown)}. A newer version may have written it.",
                stacklevel=2,
            )
        return {name: value for name, value in values.items() if name in known}

    def __post_init__(self) -> None:
        self._check_peft_fields()
        super().__post_init__()
        self.peft_type = LAYER_ROPE
        if self.rope_type not in ROPE_TYPES:
            raise InvalidConfigError(
                f"rope_type={shown(self.rope_type)} is unknown, expected one of {', '.join(ROPE_TYPES)}."
            )
        self.factor = _factor("factor", self.factor)
        if self.rope_type == "default" and self.factor != 1.0:
            raise InvalidConfigError(
                f"factor={self.factor} has no effect with rope_type='default': use rope_type='linear' or 'dynamic', "
                "or put it into layer_factors."
            )
        if self.layer_factors is not None:
            values = _checked_list("layer_factors", self.layer_factors, maximum=MAX_LAYERS)
            self.layer_factors = [_factor(f"layer_factors[{i}]", v) for i, v in enumerate(values)]
            for i, value in enumerate(self.layer_factors):
                _check_range(f"factor * layer_factors[{i}]", self.factor * value)
        for name in ("original_max_position_embeddings", "target_length"):
            value = getattr(self, name)
            if value is not None and _checked_int(name, value) < 1:
                raise InvalidConfigError(f"{name}={shown(value)} must be at least 1 token.")
            if value is not None and value > MAX_TOKENS:
                raise InvalidConfigError(f"{name}={shown(value)} must be at most {MAX_TOKENS} tokens.")
        if self.target_length is not None and self.rope_type != "dynamic":
            raise InvalidConfigError(
                f"target_length={self.target_length} has no effect with rope_type={self.rope_type!r}: only 'dynamic' "
                "depends on the length."
            )
        self._check_provenance()

    def _check_peft_fields(self) -> None:
        """PEFT's own fields, which it takes as they come."""
        for name in ("base_model_name_or_path", "revision", "peft_version"):
            _check_text(name, getattr(self, name))
        if self.task_type is not None and self.task_type not in _TASK_TYPES:
            expected = ", ".join(_TASK_TYPES)
            raise InvalidConfigError(f"task_type={shown(self.task_type)} cannot be used, expected one of {expected}.")
        if not isinstance(self.inference_mode, bool):
            raise InvalidConfigError(f"inference_mode={shown(self.inference_mode)} must be true or false.")
        if self.auto_mapping is not None:
            if not isinstance(self.auto_mapping, dict):
                raise InvalidConfigError(f"auto_mapping={shown(self.auto_mapping)} must be a mapping.")
            for name, value in self.auto_mapping.items():
                _check_text(f"auto_mapping[{shown(name)}]", value)

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
                raise InvalidConfigError(f"scaled_layers={shown(self.scaled_layers)} must be layer indices, 0 or more.")
            if any(v >= MAX_LAYERS for v in self.scaled_layers):
                raise InvalidConfigError(f"scaled_layers={shown(self.scaled_layers)} must be below {MAX_LAYERS}.")
        _check_text("searcher_version", self.searcher_version)

    def resolved_layer_factors(self, num_hidden_layers: int) -> list[float]:
        """Returns one factor per layer of a model with `num_hidden_layers`, all 1.0 where none were given."""
        return list(self.layer_factors) if self.layer_factors is not None else [1.0] * num_hidden_layers


def _finite_float(name: str, value: Any) -> float:
    if not is_number(value):
        raise InvalidConfigError(f"{name}={shown(value)} must be a number.")
    try:
        number = float(value)
    except OverflowError as error:
        raise InvalidConfigError(f"{name}={shown(value)} must fit a float.") from error
    if not math.isfinite(number):
        raise InvalidConfigError(f"{name}={shown(value)} must be finite.")
    return number


def _factor(name: str, value: Any) -> float:
    number = _finite_float(name, value)
    if number <= 0:
        raise InvalidConfigError(f"{name}={shown(value)} must be greater than 0.")
    _check_range(name, number)
    return number


def _check_range(name: str, number: float) -> None:
    low, high = FACTOR_RANGE
    if not low <= number <= high:
        raise InvalidConfigError(f"{name}={number} must be from {low:g} to {high:g}.")


def _checked_int(name: str, value: Any) -> int:
    if not is_integer(value):
        raise InvalidConfigError(f"{name}={shown(value)} must be an integer.")
    return value


def _check_text(name: str, value: Any) -> None:
    if value is None or (isinstance(value, str) and len(value) <= _MAX_TEXT):
        return
    if isinstance(value, str):
        raise InvalidConfigError(f"{name} has {len(value)} characters, expected {_MAX_TEXT} at most.")
    raise InvalidConfigError(f"{name}={shown(value)} must be a string.")


def _checked_list(name: str, value: Any, *, minimum: int = 1, maximum: int) -> Sequence[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise InvalidConfigError(f"{name} must be a list, got {type(value).__name__}.")
    if not minimum <= len(value) <= maximum:
        expected = f"{minimum}" if minimum == maximum else f"{minimum} to {maximum}"
        raise InvalidConfigError(f"{name} has {len(value)} entries, expected {expected}.")
    return value
