"""The scores of a comparison on disk, part by part, so that an interrupted one goes on where it stopped; one comparison
at a time in a folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import TaskError
from ..files.atomic import write_atomically, writing
from ..files.kept_state import kept_state
from ..files.run_lock import locked
from ..files.strict_json import to_json
from ..scoring.scores import PositionScores

SCORES_NAME = "scores.json"
LOCK_NAME = "scores.lock"
_FORMAT = 1


@contextmanager
def comparing_in(folder: Path | None, identity: Mapping[str, Any], resume: bool = False) -> Iterator[ComparisonState]:
    """Yields the state of a comparison, and keeps others out of its folder meanwhile.

    Args:
        folder: see [`ComparisonState`].
        identity: see [`ComparisonState`].
        resume: see [`ComparisonState`].

    Raises:
        FolderInUseError: another comparison is at work in `folder`.
        TaskError: see [`ComparisonState`].
        WriteError: see [`ComparisonState`].
    """
    if folder is None:
        yield ComparisonState(None, identity, resume)
        return
    with locked(folder, LOCK_NAME):
        yield ComparisonState(folder, identity, resume)


def discard_comparison(folder: Path) -> None:
    """Removes the state of an earlier comparison, if there is one.

    Raises:
        FolderInUseError: a comparison is at work in `folder`.
        WriteError: it cannot be removed.
    """
    path = folder / SCORES_NAME
    if path.exists():
        with locked(folder, LOCK_NAME), writing(path):
            path.unlink()


class ComparisonState:
    """The parts that each contender was scored on, in `folder/scores.json`.

    Args:
        folder: where it is kept; None: in memory only.
        identity: what the scores depend on, as JSON values.
        resume: go on from what is there.

    Raises:
        TaskError: there is a state but `resume` was not asked for, none although it was, one that cannot be read, or
            one of another comparison; the message names the difference.
        WriteError: it cannot be written, here or later; what was there before is.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], resume: bool = False) -> None:
        self._path = folder / SCORES_NAME if folder is not None else None
        self._identity = json.loads(to_json(identity))
        self._texts: dict[str, list[str]] = {}  # as JSON text, so that saving does not format everything again
        self._parts: dict[str, list[PositionScores]] = {}
        if self._path is None:
            if resume:
                raise TaskError("resume=True needs the folder of the comparison to go on with.")
            return
        if resume:
            self._load(self._path)
        elif self._path.exists():
            raise TaskError(
                f"{folder} holds an unfinished or finished comparison: resume it, overwrite it, or use another folder."
            )
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._save()

    def parts(self, label: str) -> list[PositionScores]:
        """The parts that a contender was scored on so far, in order."""
        return self._parts.get(label, [])

    def add(self, label: str, scores: PositionScores) -> None:
        """Keeps a contender's next part."""
        self._keep(label, scores)
        self._save()

    def _keep(self, label: str, scores: PositionScores) -> None:
        self._parts.setdefault(label, []).append(scores)
        self._texts.setdefault(label, []).append(to_json(scores.to_plain()))

    def _save(self) -> None:
        if self._path is None:
            return
        head = to_json({"format": _FORMAT, "identity": self._identity})[1:-1]
        lines = (f"{to_json(label)}: [\n" + ",\n".join(texts) + "]" for label, texts in self._texts.items())
        write_atomically(self._path, f'{{{head},\n"scores": {{{",".join(lines)}}}}}\n')

    def _load(self, path: Path) -> None:
        with kept_state(path, _FORMAT, self._identity, "comparison", TaskError) as content:
            for label, parts in content["scores"].items():
                for plain in parts:
                    self._keep(label, PositionScores.from_plain(plain))
