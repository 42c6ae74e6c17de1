"""The errors this library raises on purpose, and how values are shown in them.

Each one also derives from the built-in a caller would expect (`ValueError`, ...), so code that knows
nothing of this package still catches them.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from numbers import Integral
from typing import Any


class LayerRopeError(Exception):
    """Base class: everything `peft_layerrope` raises deliberately."""


class InvalidConfigError(LayerRopeError, ValueError):
    """A value that cannot work: of a field of `LayerRopeConfig`, of an argument, or in a folder."""


class UnsupportedModelError(LayerRopeError, ValueError):
    """The model's rotary embedding cannot be scaled per layer; the message says why."""


class AdapterMismatchError(LayerRopeError, ValueError):
    """An adapter does not fit the model, or its two files disagree."""


class TaskError(LayerRopeError, ValueError):
    """A task cannot be built, or its prompts do not fit the model or the memory."""


class HubError(LayerRopeError):
    """The Hub did not do what was asked; the message says why, and what to do."""


class SearchError(LayerRopeError, ValueError):
    """A search was asked for with settings that cannot work."""


_LONGEST = 200  # characters of a value, or of another library's message, in one of ours

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxdict, _repr.maxlist, _repr.maxtuple, _repr.maxset = 3, 4, 6, 6, 6
_repr.maxstring = _repr.maxother = 80


def shown(value: Any) -> str:
    """Returns a value for a message: its `repr`, cut short, without control characters, at a cost that is bounded."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to print very long ones
        return f"an integer of {value.bit_length()} bits"
    return _cut(_repr.repr(value))


def shown_names(names: Sequence[Any], limit: int = 5) -> str:
    """Returns the first of several names, for a message; "nothing" for none."""
    listed = ", ".join(shown(name).strip("'\"") if isinstance(name, str) else shown(name) for name in names[:limit])
    return (listed + (", ..." if len(names) > limit else "")) or "nothing"


def one_line(error: Exception | str) -> str:
    """Returns the first line of another library's message, cut short; the error's kind if it has none. A line that ends
    in a colon goes on with the next one.
    """
    text = str(error).strip()[: 10 * _LONGEST]
    lines = [line.strip() for line in text.splitlines()] or [type(error).__name__]
    stop = next((i for i, line in enumerate(lines, start=1) if not line.endswith(":")), len(lines))
    line = " ".join(lines[:stop])
    return _cut("".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line))


def named(value: Any) -> str:
    """Returns a short name of what was passed: plain values as they are written, of others the type."""
    if value is None or isinstance(value, (int, float, str, bytes, list, tuple, dict, set)):
        return shown(value)
    return value.__name__ if isinstance(value, type) else f"<{type(value).__name__}>"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Returns a whole number, also NumPy's, as an `int`; raises TaskError of a truth value or any other."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        expected = "a whole number" + ("" if least is None else f" of at least {least}")
    elif least is not None and value < least:
        expected = f"at least {least}"
    elif most is not None and value > most:
        expected = f"at most {most}"
    else:
        return int(value)
    raise TaskError(f"{name}={named(value)} must be {expected}.")
