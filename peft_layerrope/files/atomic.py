"""Files that are either the old text or the new, whatever happens in between; and one kind of error where they fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import LayerRopeError

_STAGING = "result.partial"


class WriteError(LayerRopeError, OSError):
    """A file cannot be written: the disk is full, or not writable. What was there before is still there."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says of a failed write into a `WriteError` that names the file.

    Args:
        path: file or folder to name where the system names none.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"{error.filename or path} cannot be written: {error.strerror or error}.") from error
    except SafetensorError as error:  # its writer has no OSError
        raise WriteError(f"{path} cannot be written: {error}.") from error


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step: whoever reads it, or resumes after a crash, finds the old text or the new.

    Raises:
        WriteError: it cannot be written; the old text is still there.
    """
    temporary = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)  # on a full disk it is in the way
            raise


@contextmanager
def replacing_files(folder: Path, last: str) -> Iterator[Path]:
    """Puts several files into a folder together, so that a half of them is never taken for the whole.

    They are written into an empty folder, and moved when all are there. While they are moved, the file without which
    the others are nothing is missing.

    Args:
        folder: where they go; created if missing.
        last: name of the file that is removed first and moved last.

    Yields:
        The folder to write them into.

    Raises:
        WriteError: one cannot be written; as long as they are not all there, `folder` is as it was.
    """
    staging = folder / _STAGING
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if staging.exists():  # of a process that was killed here
            shutil.rmtree(staging)
        staging.mkdir()
        try:
            yield staging
            names = sorted((path.name for path in staging.iterdir()), key=lambda name: (name == last, name))
            for name in names:
                _flush(staging / name)
            (folder / last).unlink(missing_ok=True)
            for name in names:
                os.replace(staging / name, folder / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
