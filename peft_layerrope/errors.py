"""The errors this library raises on purpose, how values are shown in them, and which names may be public.

Each one also derives from the built-in a caller would expect (`ValueError`, ...), so code that knows
nothing of this package still catches them.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path, PurePosixPath, PureWindowsPath
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


DEMO_NAME = "peft_layerrope/demo"
"""How reports and adapters call the demo model: its path in the repository, whatever the machine."""

_LONGEST = 200  # characters of a value, or of another library's message, in one of ours

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxdict, _repr.maxlist, _repr.maxtuple, _repr.maxset = 3, 4, 6, 6, 6
_repr.maxstring = _repr.maxother = 80


def demo_model_path() -> str:
    """Returns the folder to load the demo model from, a small Llama trained by `examples/train_demo_model.py`."""
    return str(Path(__file__).with_name("demo"))


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


_CACHED_SNAPSHOT = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")  # how the Hub's cache names a folder


def is_local_path(name: str) -> bool:
    """Whether a model's name is a path rather than an id of the Hub. `owner/name` counts as a path where it holds a
    model or an adapter, as it does for transformers and PEFT.
    """
    if name == DEMO_NAME:  # in this project's own folder it would look like a path
        return False
    folder = Path(name)
    is_folder = any((folder / file).is_file() for file in ("config.json", "adapter_config.json"))
    return is_machine_path(name) or name.count("/") > 1 or "\\" in name or is_folder or name.endswith(".gguf")


def is_machine_path(text: str) -> bool:
    """Whether a text begins as a path does: `/`, `./`, `../`, `~`, `$HOME/`, `file:/`, or Windows' kinds."""
    is_absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    other = re.match(r"(~[\w.-]*|\.|\.\.|\$\w+|\$\{\w+\}|%\w+%|file:)([/\\]|$)", text, re.ASCII)
    return is_absolute or other is not None


def public_name(name: str) -> str:
    """Returns the name of a model without a path: the id, or the last component of a folder's path."""
    if not is_local_path(name):
        return name
    path = Path(os.path.expanduser(name))
    if path.is_dir() and path.resolve() == Path(demo_model_path()).resolve():
        return DEMO_NAME
    cached = _CACHED_SNAPSHOT.search(name)
    if cached is not None:
        return f"{cached[1]}/{cached[2]}"
    return last_component(name)


def last_component(path: str) -> str:
    """Returns the last component of a path of any system, `..` and `.` resolved."""
    if "\\" in path:
        return PureWindowsPath(path).name
    return Path(os.path.expanduser(path)).resolve().name  # of pathlib's an unknown `~user` is an error


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
