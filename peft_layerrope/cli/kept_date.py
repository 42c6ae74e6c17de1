"""The date that a chat template writes, kept beside results: a run resumed on another day has the same prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..files.atomic import write_atomically, writing
from ..tasks.specification import TaskSpecification

DATE_NAME = "chat_date.txt"
_LONGEST = 100  # bytes


def with_kept_date(task: TaskSpecification, folder: Path | None, resume: bool) -> TaskSpecification:
    """Returns a task with the date of the run that is resumed in a folder, if it has one and no other is asked for."""
    path = folder / DATE_NAME if folder is not None else None
    if not resume or path is None or not path.is_file() or task.chat_date is not None or task.chat_template is False:
        return task
    with path.open("rb") as file:
        text = file.read(_LONGEST).decode(errors="replace").strip()
    return replace(task, chat_date=text)


def keep_date(task: TaskSpecification, folder: Path) -> None:
    """Writes down the date of a resolved task, where its chat template writes one.

    Raises:
        WriteError: it cannot be written.
    """
    path = folder / DATE_NAME
    with writing(path):
        if task.chat_date is None:
            path.unlink(missing_ok=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, task.chat_date + "\n")
