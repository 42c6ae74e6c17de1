"""One process at a time in a folder. The kernel holds the lock, so a process that dies leaves none behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import LayerRopeError
from .atomic import writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NO_LOCKS_HERE = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)


class FolderInUseError(LayerRopeError, RuntimeError):
    """Another process is writing into the folder."""


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Keeps other processes, and other calls in this one, out of a folder. Does not wait.

    Where there are no such locks (Windows, a few network file systems) it lets everybody in.

    Args:
        folder: created if missing; taken away again if nothing was put into it.
        name: of the lock file, which is there while the lock is held; one that a killed process left does no harm.

    Raises:
        FolderInUseError: somebody else is in; the message names the process.
        WriteError: the folder or the file cannot be made.
    """
    if fcntl is None:
        yield
        return
    path = folder / name
    is_new = not folder.exists()
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # while it is still locked: whoever waits for it looks again
            if is_new:
                folder.rmdir()  # unless there is something in it
        os.close(descriptor)


def check_free(folder: Path, name: str) -> None:
    """Looks whether [`locked`] would let us in, where nothing is to be written yet.

    Raises:
        FolderInUseError: somebody else is in.
        WriteError: the lock file that is there cannot be opened.
    """
    if (folder / name).exists():
        with locked(folder, name):  # one that a killed process left goes away
            pass


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, path)
            if _is_at(descriptor, path):
                with suppress(OSError):  # a full disk: the lock is what counts
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between opening and locking


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        text = os.read(descriptor, 20).decode(errors="replace").strip()
        who = f"process {text}" if text.isdecimal() else "another process"
        raise FolderInUseError(
            f"{path.parent} is in use by {who}: wait until it is done, end it, or use another folder."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)
