"""What a run that can be resumed kept of itself: read back only by a run that asks for the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import LayerRopeError
from ..fingerprint import first_difference


@contextmanager
def kept_state(
    path: Path, format_version: int, identity: Mapping[str, Any], kind: str, error: type[LayerRopeError]
) -> Iterator[dict[str, Any]]:
    """Yields what the file holds; what fails to be taken from it, in the block, counts as damage of the file.

    Args:
        path: JSON with `format` and `identity`.
        format_version: what `format` must be.
        identity: what the run depends on, as JSON values; the file's must be equal.
        kind: of run, for the message.
        error: what to raise.

    Raises:
        LayerRopeError: `error`: there is no such file, it cannot be read, it is of another format or of another run
            (the message names the difference), or it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as missing:
        raise error(f"nothing to resume: {path} does not exist.") from missing
    except (OSError, ValueError) as unreadable:
        raise error(f"{path} cannot be read: {unreadable}.") from unreadable
    try:
        if content["format"] != format_version:
            raise error(f"{path} has format {content['format']!r}, expected {format_version}.")
        difference = first_difference(content["identity"], identity)
        if difference is not None:
            raise error(f"{path} is from another {kind}: {difference}.")
        yield content
    except error:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as damage:
        raise error(f"{path} is damaged: {damage!r}. Start again with --overwrite.") from damage
