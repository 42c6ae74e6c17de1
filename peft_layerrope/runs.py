"""The journal of a run, from which it goes on when it was killed; and one run at a time in a folder.

A search or a comparison is a function of its settings, its seeds and what it measured. So resuming means to run it
again from the start with the measurements that are there: it arrives where it was killed without running the model, and
goes on. `journal.jsonl` is state and log in one: strict JSON, one entry per line, only ever appended to. Its first line
has `format` and `identity`; each other one `kind`, `key`, `value`, and for readers `time`, in seconds since 1970.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import InvalidConfigError
from .files import to_json, write_atomically, writing

JOURNAL_NAME, LOCK_NAME = "journal.jsonl", ".lock"
RUN_FOLDER = "run"
"""Where a command keeps its journal, in the folder of its results."""

_FORMAT = 1
_SHOWN = 120  # characters of a differing value that a message shows


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes, and other calls in this one, out of a folder. Does not wait: raises BlockingIOError, which
    names the process that is in.

    The folder is created if missing, and taken away again if nothing was put into it. Its lock file is there while the
    lock is held; one that a killed process left is in nobody's way, for the lock itself is the system's.
    """
    path = folder / LOCK_NAME
    new = [parent for parent in (folder, *folder.absolute().parents) if not parent.exists()]
    lock = FileLock(path)
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(Timeout):
            lock.acquire(blocking=False)
    if not lock.is_locked:
        who = ""
        with suppress(OSError):  # which is done by now, perhaps
            who = path.read_text(errors="replace")
        who = f"process {who}" if who.isdecimal() else "another process"
        advice = "wait until it is done, end it, or use another folder"
        raise BlockingIOError(errno.EAGAIN, f"in use by {who}: {advice}", str(folder))
    try:
        with suppress(OSError):  # a full disk: the lock is what counts
            path.write_text(str(os.getpid()))
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: filelock takes no lock of a file that was removed
        lock.release()
        with suppress(OSError):
            for parent in new:
                parent.rmdir()  # unless there is something in it


def check_free(folder: Path) -> None:
    """Raises what [`locked`] would raise, where nothing is to be written yet."""
    if (folder / LOCK_NAME).exists():
        with locked(folder):  # one that a killed process left goes away
            pass


class Journal(AbstractContextManager):
    """What a run has found so far, kept in `folder`. To be used in a `with` statement, which locks the folder.

    Nothing is written before the first entry; a journal that is to be overwritten is there until then.

    Args:
        folder: where `journal.jsonl` is; None keeps everything in memory only.
        identity: what the run depends on: settings, data, model, versions. JSON values.
        resume: go on from what is there; where nothing is, begin.
        overwrite: begin anew, whatever is there.

    Raises:
        InvalidConfigError: there is a journal, and neither `resume` nor `overwrite` was asked for; or it is damaged, or
            of another run, and the message names the first difference.
        BlockingIOError: another run is at work in `folder`.
    """

    def __init__(
        self, folder: Path | None, identity: Mapping[str, Any], resume: bool = False, overwrite: bool = False
    ) -> None:
        self.folder = folder
        self._path = folder / JOURNAL_NAME if folder is not None else None
        self._head = json.loads(to_json({"format": _FORMAT, "identity": identity}))
        self._values: dict[str, dict[str, Any]] = {}
        self._size: int | None = None  # in bytes, without what is left of an entry that was being written
        self.resumed = False  # whether there was something to go on with
        if resume and (overwrite or folder is None):
            raise InvalidConfigError("resume=True needs the folder of the run to go on with, and no overwrite=True.")
        with ExitStack() as stack:
            if folder is not None:
                stack.enter_context(locked(folder))
                if resume:
                    self._load()
                elif self._path.exists() and not overwrite:
                    raise InvalidConfigError(
                        f"{folder} holds an unfinished or finished run: resume it, overwrite it, or use another folder."
                    )
            self._lock = stack.pop_all()

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def append(self, kind: str, key: Any, value: Any) -> None:
        """Adds an entry of JSON values, in the place of an earlier one of its kind and key. It is on the disk when this
        returns; after an OSError the entries before are there.
        """
        line = to_json({"kind": kind, "key": key, "value": value, "time": round(time.time(), 3)})
        if self._path is not None:
            self._write(line + "\n")
        self._keep(json.loads(line))

    def get(self, kind: str, key: Any) -> Any:
        """Returns the value of an entry, as JSON has it; None if there is none."""
        return self._values.get(kind, {}).get(to_json(key))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """In its block, values that are not what they should be count as damage of the journal."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError) as damage:
            raise InvalidConfigError(f"{self._path} is damaged ({damage!r}): begin anew, overwriting it.") from damage

    def _keep(self, entry: Mapping[str, Any]) -> None:
        self._values.setdefault(entry["kind"], {})[to_json(entry["key"])] = entry["value"]

    def _write(self, line: str) -> None:
        if self._size is None:
            text = f"{to_json(self._head)}\n{line}"
            write_atomically(self._path, text)
            self._size = len(text)
            return
        with writing(self._path):
            os.truncate(self._path, self._size)
            with open(self._path, "a", encoding="ascii") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self._size += len(line)

    def _load(self) -> None:
        if not self._path.exists():  # killed before its first entry
            return
        *lines, _ = self._path.read_bytes().split(b"\n")  # what was being written at the kill has no line end
        self._size = sum(len(line) + 1 for line in lines)
        with self.reading():
            head, *entries = map(json.loads, lines)
            for entry in entries:
                self._keep(entry)
            runs = [{"format": run["format"], **run["identity"]} for run in (head, self._head)]
        difference = first_difference(*runs)
        if difference is not None:
            raise InvalidConfigError(f"{self._path} is of another run: {difference}.")
        self.resumed = True


def recorded_identity(folder: Path) -> dict[str, Any]:
    """Returns the identity of the run whose journal is in a folder; empty if there is none, or it cannot be read, of
    which [`Journal`] tells.
    """
    with suppress(OSError, ValueError, KeyError, TypeError), (folder / JOURNAL_NAME).open("rb") as lines:
        return dict(json.loads(next(lines, b""))["identity"])
    return {}


def first_difference(before: Any, now: Any, name: str = "") -> str | None:
    """Returns where two trees of JSON values first differ, and how, in words; None if they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        above = f"{name}." if name else ""
        found = (first_difference(before.get(key), now.get(key), above + key) for key in before | now)
        return next(filter(None, found), None)
    if before == now:
        return None
    was, is_now = (json.dumps(value)[:_SHOWN] for value in (before, now))
    return f"{name} was {was} there and is {is_now} now"
