"""Makes PEFT know the adapter type `LAYER_ROPE`. The only file that touches PEFT's enum.

`register_peft_method` demands a `PeftType` member and PEFT has no hook to add one, so the closed enum is
extended here, once. If PEFT ships the name itself one day, that member is used and nothing is changed.
"""

from __future__ import annotations

from enum import Enum

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

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
