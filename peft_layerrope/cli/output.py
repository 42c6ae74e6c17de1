"""Files that a command is to write: refused before any work where they could not be, in one line where they fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import TaskError
from ..files.atomic import writing
from ..files.strict_json import to_json
from ..runs import LOCK_NAME

_PLOTS = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")


def check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Raises TaskError if a folder cannot be used for results."""
    if resume and overwrite:
        raise TaskError("--resume keeps what is there and --overwrite replaces it: pass one of them.")
    if output.exists() and not output.is_dir():
        raise TaskError(f"--output {output} exists and is not a folder.")
    if not (overwrite or resume) and output.is_dir() and any(path.name != LOCK_NAME for path in output.iterdir()):
        raise TaskError(
            f"--output {output} is not empty; pass --resume to go on with what is in it, --overwrite to replace it."
        )
    existing = next(parent for parent in (output, *output.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise TaskError(f"--output {output} is not writable.")


def check_plot(path: Path | None) -> None:
    """Raises TaskError if a plot, where one is wanted, could not be written."""
    check_file(path, "--plot")
    if path is not None and path.suffix.lower() not in _PLOTS:
        raise TaskError(f"--plot {path} must end in one of {', '.join(_PLOTS)}.")


def check_file(path: Path | None, option: str) -> None:
    """Raises TaskError if a file, where one is wanted, could not be written."""
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise TaskError(f"{option} {path} cannot be written: " + ("a folder." if path.is_dir() else "no such folder."))
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise TaskError(f"{option} {path} cannot be written: no permission, or a read-only file system.")


def write_json(path: Path, content: Any) -> None:
    """Writes a result for `--json`.

    Raises:
        WriteError: it cannot be written.
    """
    with writing(path):
        path.write_text(to_json(content, indent=2) + "\n", encoding="utf-8")
