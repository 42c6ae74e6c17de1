"""Which decoder families of the installed transformers can be scaled, found out by trying each on a tiny model."""

from .shrink import FamilyNotBuilt, build_tiny, model_types, tiny_inputs
from .trial import NOT_BUILT, REFUSED, SUPPORTED, WRONG, Trial, try_family, try_model

__all__ = [
    "NOT_BUILT",
    "REFUSED",
    "SUPPORTED",
    "WRONG",
    "FamilyNotBuilt",
    "Trial",
    "build_tiny",
    "model_types",
    "tiny_inputs",
    "try_family",
    "try_model",
]
