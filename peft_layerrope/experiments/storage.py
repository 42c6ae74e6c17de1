"""Sections on disk: `NAME.json`, `NAME.md` and a PNG for each figure."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

from ..errors import SearchError
from ..files import read_bytes, read_json_object, to_json, write_atomically, writing
from ..messages import last_component
from ..runs import RUN_FOLDER, locked
from .section import Section, to_markdown


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


_MAX_JSON, _MAX_PNG = 64 * 2**20, 16 * 2**20


def work_folder(folder: Path, name: str) -> Path:
    """Returns where a section's parts are kept, and locked; other sections may be made beside it."""
    return folder / RUN_FOLDER / name


def kept_section(
    folder: Path, name: str, asked: Mapping[str, Any], resume: bool, make: Callable[[Path], Section]
) -> Section:
    """Makes a section and saves it; keeps others from making it in the same folder meanwhile.

    Args:
        folder: for the section's files, and for the parts of an unfinished one; made if it is missing.
        name: of the section.
        asked: what it depends on.
        resume: return the section that is there, if it answers what is asked now.
        make: makes it, given a folder for its parts.

    Raises:
        BlockingIOError: another run is making this section in `folder`.
        OSError: a file cannot be written.
    """
    work = work_folder(folder, name)
    with locked(work):
        section = find_section(folder, name, asked) if resume else None
        if section is None:
            section = make(work / digest_of(asked))
            save_section(section, folder, asked)
        return section


def digest_of(asked: Mapping[str, Any]) -> str:
    """Returns a short hash of what an experiment was asked."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:12]


def save_section(section: Section, folder: Path, asked: Mapping[str, Any] | None = None) -> Path:
    """Writes a section's files; the JSON last, so that what has one is complete.

    Args:
        section: what to write.
        folder: made if it is missing.
        asked: what the section depends on, so that [`find_section`] knows whether it is still the answer.

    Returns:
        The path of the JSON file.

    Raises:
        OSError: a file cannot be written.
    """
    path = folder / f"{section.name}.json"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        for figure in section.figures:
            (folder / section.figure_file(figure)).write_bytes(figure.png)
        write_atomically(folder / f"{section.name}.md", to_markdown(section))
        content = {"asked": digest_of(asked or {}), **section.to_dict()}
        write_atomically(path, to_json(content, indent=2) + "\n")
    return path


def load_section(folder: Path, name: str) -> Section:
    """Reads a section that [`save_section`] wrote.

    Raises:
        SearchError: a file is missing or damaged.
    """
    return _load(folder, name)[0]


def find_section(folder: Path, name: str, asked: Mapping[str, Any]) -> Section | None:
    """Returns a saved section if it is whole and answers what is asked now; else None."""
    try:
        section, digest = _load(folder, name)
    except SearchError:
        return None
    return section if digest == digest_of(asked) else None


def _load(folder: Path, name: str) -> tuple[Section, str]:
    path = folder / f"{name}.json"
    try:
        values = read_json_object(path, _MAX_JSON)
        figures = values.get("figures")
        names = [f["name"] for f in figures if isinstance(f, dict)] if isinstance(figures, list) else []
        # a name from the file becomes a path only if it is one that a figure may have
        pictures = {
            figure: read_bytes(folder / f"{name}-{figure}.png", _MAX_PNG)
            for figure in names
            if isinstance(figure, str) and figure.replace("-", "").isalnum()
        }
    except (ValueError, KeyError) as error:
        raise SearchError(f"{path} cannot be read as a section: {error}.") from error
    return Section.from_dict(values, pictures), str(values.get("asked"))
