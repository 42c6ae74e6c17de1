"""Makes PEFT know the adapter type `LAYER_ROPE`. The only file that touches PEFT's enum.

`register_peft_method` demands a `PeftType` member and PEFT has no hook to add one, so the closed enum is
extended here, once. If PEFT ships the name itself one day, that member is used and nothing is changed.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

PEFT_TYPE_NAME = "LAYER_ROPE"
PREFIX = "inv_freq_scaling_"
"""PEFT's per-method prefix. PEFT warns when an adapter's name is a substring of it, hence no plain "rope"."""


def _extend_enum(name: str) -> PeftType:
    """Adds a member to `PeftType` the way `EnumType` itself builds one (lookup, copy, pickle, JSON work)."""
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    type.__setattr__(PeftType, name, member)  # EnumType refuses plain assignment
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    hashable_values = getattr(PeftType, "_hashable_values_", None)  # Python 3.12 and newer
    if hashable_values is not None:
        hashable_values.append(name)
    return member


def ensure_peft_type() -> PeftType:
    """Returns the member `PeftType.LAYER_ROPE`, adding it first if PEFT lacks it."""
    existing = PeftType.__members__.get(PEFT_TYPE_NAME)
    return existing if existing is not None else _extend_enum(PEFT_TYPE_NAME)


LAYER_ROPE = ensure_peft_type()


def register(config_cls: type, model_cls: type) -> None:
    """Registers config and tuner with PEFT; a second call changes nothing."""
    if LAYER_ROPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=PEFT_TYPE_NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
