"""Names of models and files as others may read them: without the paths of this machine."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from .demo import DEMO_NAME, demo_model_path

_CACHED_SNAPSHOT = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")  # how the Hub's cache names a folder


def is_local_path(name: str) -> bool:
    """Whether a model's name is a path rather than an id of the Hub.

    `owner/name` could be either; it counts as a path where it holds a model or an adapter, as it does for
    transformers and PEFT.
    """
    if name == DEMO_NAME:  # in this project's own folder it would look like a path
        return False
    folder = Path(name)
    is_folder = any((folder / file).is_file() for file in ("config.json", "adapter_config.json"))
    return is_machine_path(name) or name.count("/") > 1 or "\\" in name or is_folder or name.endswith(".gguf")


def is_machine_path(text: str) -> bool:
    """Whether a text begins as a path does: `/...`, `./...`, `../...`, `~...`, or Windows' kinds."""
    first = re.split(r"[/\\]", text, maxsplit=1)[0]
    return (
        PurePosixPath(text).is_absolute()
        or PureWindowsPath(text).is_absolute()
        or first in (".", "..")
        or text.startswith("~")
    )


def public_name(name: str) -> str:
    """Returns the name of a model without a path: the id, or the last component of a folder's path."""
    if not is_local_path(name):
        return name
    path = Path(name).expanduser()
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
    return Path(path).expanduser().resolve().name
