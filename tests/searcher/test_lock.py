"""One process at a time in a folder, whatever becomes of the one that was there before."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes import token_task
from test_cli import run as run_command
from test_resume import SMALL, small_model

from peft_layerrope import run_lock, search
from peft_layerrope.atomic import WriteError
from peft_layerrope.run_lock import FolderInUseError, locked
from peft_layerrope.searcher import plan_search
from peft_layerrope.searcher.state import LOCK_NAME

pytestmark = pytest.mark.skipif(run_lock.fcntl is None, reason="no such locks on this system")


@contextmanager
def held_by_another_process(folder: Path, name: str = LOCK_NAME) -> Iterator[int]:
    """A process that is in `folder` until it is killed with SIGKILL at the end; yields its number."""
    ready, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with locked(folder, name):
                os.write(say, b"!")
                signal.pause()
        finally:
            os._exit(1)
    os.close(say)
    try:
        assert os.read(ready, 1) == b"!"  # empty where the other process failed
        yield child
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_another_process_is_named_and_its_death_frees_the_folder(tmp_path):
    with (
        held_by_another_process(tmp_path) as pid,
        pytest.raises(FolderInUseError, match=f"^{tmp_path} is in use by process {pid}: wait until it is done"),
        locked(tmp_path, LOCK_NAME),
    ):
        pass
    assert (tmp_path / LOCK_NAME).read_text() == str(pid)  # which was killed, and holds nothing any more
    with locked(tmp_path, LOCK_NAME):
        assert (tmp_path / LOCK_NAME).read_text() == str(os.getpid())
    assert not any(tmp_path.iterdir())


def test_a_second_call_of_the_same_process_is_kept_out_and_leaves_the_first_alone(tmp_path):
    with locked(tmp_path, LOCK_NAME):
        for _ in range(2):
            with pytest.raises(FolderInUseError, match=str(os.getpid())), locked(tmp_path, LOCK_NAME):
                pass
        with locked(tmp_path, "another.lock"), locked(tmp_path / "another", LOCK_NAME):
            pass


def test_a_lock_file_that_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    """Its holder is done between our opening and our locking it: two processes must not hold two files."""
    lock, path = run_lock._lock, tmp_path / LOCK_NAME
    seen = []

    def late(descriptor: int, at: Path) -> None:
        if not seen:
            at.unlink()
        seen.append(descriptor)
        lock(descriptor, at)

    monkeypatch.setattr(run_lock, "_lock", late)
    with locked(tmp_path, LOCK_NAME):
        assert len(seen) == 2
        assert path.read_text() == str(os.getpid())


def test_where_the_system_has_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "fcntl", None)
    with locked(tmp_path, LOCK_NAME), locked(tmp_path, LOCK_NAME):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"file.* cannot be written"), locked(tmp_path / "file" / "run", LOCK_NAME):
        pass


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_search_is_kept_out_before_it_writes(tmp_path, resume):
    with held_by_another_process(tmp_path) as pid:
        with pytest.raises(FolderInUseError, match=f"process {pid}"):
            search(small_model(), token_task(groups=40), **SMALL, folder=tmp_path, resume=resume, progress=False)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
        assert plan_search(small_model(), token_task(groups=40), **SMALL).seconds > 0


@pytest.mark.parametrize(
    ("command", "folder", "lock"),
    [("search", "run", "search.lock"), ("search", "run", "state.lock"), ("evaluate", ".", "evaluation.lock")],
)
def test_overwriting_what_another_process_writes_is_refused(tmp_path, command, folder, lock):
    precious = [tmp_path / folder / "scores.json", tmp_path / "adapter_config.json"]
    (tmp_path / folder).mkdir(exist_ok=True)
    for path in precious:
        path.write_text("{}")
    with held_by_another_process(tmp_path / folder, lock) as pid:
        done = run_command(command, "--length", "128", "--positions", "3", "--output", str(tmp_path), "--overwrite")
    assert done.exit_code == 1
    assert done.stderr.count("error:") == 1
    assert f"is in use by process {pid}" in done.stderr
    assert all(path.read_text() == "{}" for path in precious)


def test_a_dry_run_needs_no_lock(tmp_path):
    with held_by_another_process(tmp_path / "run", "search.lock"):
        arguments = ("--length", "128", "--positions", "3", "--search-groups", "2", "--test-groups", "2")
        done = run_command("search", *arguments, "--output", str(tmp_path), "--resume", "--dry-run")
    assert done.exit_code == 0
    assert "evaluations" in done.stdout
