"""The one way in which JSON is written: strictly, so that every reader takes it."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(content: Any, *, indent: int | None = None) -> str:
    """Returns plain values as JSON, which knows no NaN and no infinity: such numbers become null.

    Args:
        content: dicts, lists, tuples, texts, numbers, truth values and None.
        indent: as of `json.dumps`; None writes one line, in ASCII.

    Raises:
        TypeError: something else is among them.
    """
    return json.dumps(_finite(content), indent=indent, ensure_ascii=indent is None, allow_nan=False)


def to_float(value: float | None) -> float:
    """Returns a number that [`to_json`] wrote: what was not finite is null, and is no number again."""
    return math.nan if value is None else float(value)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content
