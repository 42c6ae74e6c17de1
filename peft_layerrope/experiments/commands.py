"""The command line that repeats an experiment."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from enum import Enum
from pathlib import PurePath
from typing import Any

from ..public_names import last_component


def command_line(words: Iterable[str], options: Iterable[tuple[str, Any]]) -> str:
    """Returns `layerrope WORDS OPTIONS`, quoted for a shell.

    Args:
        words: the command and its arguments.
        options: names and values; None and False are left out, True is a flag, a list repeats its option, a mapping is
            JSON.
    """
    parts = ["layerrope", *map(shareable, words)]
    for name, value in options:
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is None or one is False:
                continue
            parts.append(name)
            if one is not True:
                parts.append(shareable(_text(one)))
    return shlex.join(parts)


def shareable(text: str) -> str:
    """Returns a path without the folders of this machine: relative ones stay, of others the last part."""
    return last_component(text) if PurePath(text).is_absolute() or text.startswith("~") else text


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)
