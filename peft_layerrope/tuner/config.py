"""`LayerRopeConfig`: what an adapter says, validated; and how PEFT gets to know its type.

`register_peft_method` demands a member of `PeftType`, and PEFT has no hook to add one. So the closed enum is extended
here, once. If PEFT ships the name itself one day, that member is used and nothing is changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Annotated, Any, Literal, Optional

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, PeftType
from pydantic import Field, TypeAdapter

from ..declaration import declared
from ..errors import AdapterMismatchError, InvalidConfigError, shown, shown_names
from ..files import AdapterFiles, public_name, read_json_object
from .scaling import RopeType

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
    getattr(enum_class, "_hashable_values_", []).append(name)  # Python 3.12 and newer have one
    return member


LAYER_ROPE = PeftType.__members__.get(PEFT_TYPE_NAME) or extend_enum(PeftType, PEFT_TYPE_NAME)


MAX_LAYERS = 4096
"""Upper limit on `len(layer_factors)`: an adapter from a stranger cannot ask for more."""

FACTOR_RANGE = (0.01, 10_000.0)
"""What a layer's factor, the global one and their product may be: beyond, float32 angles say nothing."""

_Factor = Annotated[float, Field(ge=FACTOR_RANGE[0], le=FACTOR_RANGE[1])]
_Tokens = Annotated[int, Field(ge=1, le=2**30)]
_Text = Annotated[str, Field(min_length=0, max_length=4096)]  # PEFT writes "" for a base model without a name


@declared(InvalidConfigError)
class _Values:
    """What the fields of a config may hold: our own, and PEFT's, which it takes as they come."""

    rope_type: RopeType
    factor: _Factor
    layer_factors: Annotated[tuple[_Factor, ...], Field(min_length=1, max_length=MAX_LAYERS)] | None
    original_max_position_embeddings: _Tokens | None
    target_length: _Tokens | None
    # PEFT's classes for the others fail on a method without weights: they look through its `modules_to_save`.
    task_type: Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "FEATURE_EXTRACTION"] | None
    base_model_name_or_path: _Text | None
    revision: _Text | None
    peft_version: _Text | None
    auto_mapping: dict[str, _Text | None] | None
    inference_mode: bool

    def __post_init__(self) -> None:
        if self.rope_type == "default" and self.factor != 1.0:
            raise InvalidConfigError(
                f"factor={self.factor} has no effect with rope_type='default': use rope_type='linear' or 'dynamic', "
                "or put it into layer_factors."
            )
        if self.rope_type != "dynamic" and self.target_length is not None:
            raise InvalidConfigError(
                f"target_length={self.target_length} has no effect with rope_type={self.rope_type!r}: only 'dynamic' "
                "depends on the length."
            )
        low, high = FACTOR_RANGE
        for i, layer_factor in enumerate(self.layer_factors or ()):
            if not low <= self.factor * layer_factor <= high:
                raise InvalidConfigError(
                    f"factor * layer_factors[{i}]={self.factor * layer_factor} must be from {low:g} to {high:g}."
                )


_VALUES = TypeAdapter(_Values)
_FORMER = ("control_points", "scaled_layers", "searcher_version")  # which `search.json` has now


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

    rope_type: str = "default"
    factor: float = 1.0
    layer_factors: Optional[list[float]] = None
    original_max_position_embeddings: Optional[int] = None
    target_length: Optional[int] = None

    files = None  # the `AdapterFiles` it was read from, until injection has checked the other file against it
    origin = None  # where it was read from; None if it was made in Python

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: Optional[str] = None, **kwargs: Any
    ) -> LayerRopeConfig:
        """Loads an adapter's configuration from a folder or the Hub; see [`~peft.PeftConfig`].

        Raises:
            InvalidConfigError: `adapter_config.json` is not JSON, is too large, or has a value that cannot work.
        """
        download, _, _ = cls._split_kwargs(kwargs)
        files = AdapterFiles(str(pretrained_model_name_or_path), subfolder, download)
        load = super().from_pretrained
        return cls._read(files, lambda: load(pretrained_model_name_or_path, subfolder=subfolder, **kwargs))

    @classmethod
    def from_values(cls, values: Mapping[str, Any], files: AdapterFiles) -> LayerRopeConfig:
        """Does what [`from_pretrained`] does, where `adapter_config.json` has been read already."""
        return cls._read(files, lambda: cls.from_peft_type(**cls._known(values)))

    @classmethod
    def _read(cls, files: AdapterFiles, make: Callable[[], LayerRopeConfig]) -> LayerRopeConfig:
        try:
            config = make()
        except (ValueError, RecursionError) as error:
            raise InvalidConfigError(f"{files.location}: {CONFIG_NAME} must hold a LayerRopeConfig: {error}") from error
        factors = None if config.layer_factors is None else tuple(config.layer_factors)
        config.files, config.origin = replace(files, layer_factors=factors), files.location
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Reads `adapter_config.json` as plain values. Names of a newer version are left out, with a warning. Raises
        ValueError if it is no JSON object of reasonable size, or another method's.
        """
        return cls._known(read_json_object(path_json_file))

    @classmethod
    def _known(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        if values.get("peft_type") != PEFT_TYPE_NAME:
            raise ValueError(f"peft_type={shown(values.get('peft_type'))}, expected {PEFT_TYPE_NAME!r}.")
        known = {f.name for f in fields(cls)}
        unknown = [name for name in values if name not in (*known, *_FORMER)]
        if unknown:
            warnings.warn(
                f"{CONFIG_NAME} has fields that this version of peft_layerrope does not know and ignores: "
                f"{shown_names(unknown)}. A newer version may have written it.",
                stacklevel=2,
            )
        return {name: value for name, value in values.items() if name in known}

    def __post_init__(self) -> None:
        checked = _Values(**{one.name: getattr(self, one.name) for one in fields(_Values)})
        super().__post_init__()
        self.peft_type = LAYER_ROPE
        # of our own fields: whole numbers as floats where these are meant, tuples as lists
        vars(self).update(_VALUES.dump_python(checked, mode="json", include=set(LayerRopeConfig.__annotations__)))

    def resolved_layer_factors(self, num_hidden_layers: int, owner: str = "the model") -> list[float]:
        """Returns one factor for each layer of a model, all 1.0 where none were given; raises AdapterMismatchError if
        they are for another number of layers. `owner`, for the message, is whose layers they are.
        """
        factors = [1.0] * num_hidden_layers if self.layer_factors is None else list(self.layer_factors)
        if len(factors) != num_hidden_layers:
            base = self.base_model_name_or_path
            found = f"layer_factors has {len(factors)} entries, but {owner} has {num_hidden_layers} decoder layers."
            raise AdapterMismatchError(found + (f" They are for {shown(public_name(base))}." if base else ""))
        return factors
