"""The journal: what was written is read back, whatever became of the process; and one process at a time in a folder."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from peft_layerrope.errors import InvalidConfigError
from peft_layerrope.runs import JOURNAL_NAME, LOCK_NAME, Journal, locked

IDENTITY = {"settings": {"seed": 1, "weights": (0.8, 1.0)}, "model": "abc", "splits": [{"name": "search"}]}
ENTRIES = [
    ("stage", None, {"name": "uniform factors"}),
    ("measured", [1.0, 1 / 3], {"values": [0.1, -2.5e-300, None]}),
    ("measured", [1.0, 2.0], "a line\nwith \N{SNOWMAN}, \x85 and \u2028"),
    ("measured", [1.0, 1 / 3], [float(2**53 - 1), -0.0]),
    ("stage", None, {"name": "held-out test"}),
]


def fill(journal: Journal, entries: list[tuple]) -> None:
    for entry in entries:
        journal.append(*entry)


def filled(folder: Path, entries: list[tuple] = ENTRIES) -> bytes:
    with Journal(folder, IDENTITY) as journal:
        fill(journal, entries)
    return (folder / JOURNAL_NAME).read_bytes()


def content(folder: Path) -> list[tuple]:
    """What any reader of JSON lines finds, without the times; numbers that are no JSON are refused."""

    def refuse(text: str) -> None:
        raise ValueError(text)

    lines = (folder / JOURNAL_NAME).read_text(encoding="ascii").split("\n")
    head, *entries = [json.loads(line, parse_constant=refuse) for line in lines[:-1]]
    assert (lines[-1], head["identity"]) == ("", json.loads(json.dumps(IDENTITY)))
    assert [entry["time"] for entry in entries] == sorted(entry["time"] for entry in entries)
    return [(entry["kind"], entry["key"], entry["value"]) for entry in entries]


@pytest.mark.parametrize("on_disk", [True, False])
def test_an_entry_is_found_by_kind_and_key_and_the_last_one_counts(tmp_path, monkeypatch, on_disk):
    monkeypatch.chdir(tmp_path)
    with Journal(tmp_path / "run" if on_disk else None, IDENTITY) as journal:
        assert not (tmp_path / "run" / JOURNAL_NAME).exists()  # before the first entry
        fill(journal, ENTRIES)
        assert journal.get("measured", (1.0, 1 / 3)) == ENTRIES[3][2]
        assert journal.get(*ENTRIES[2][:2]) == ENTRIES[2][2]
        assert journal.get(*ENTRIES[4][:2]) == ENTRIES[4][2]
        assert (journal.get("measured", [2.0]), journal.get("scored", (1.0, 1 / 3))) == (None, None)
    assert any(tmp_path.iterdir()) == on_disk


def test_what_is_not_finite_is_null_and_what_is_not_json_is_refused(tmp_path):
    filled(tmp_path, [("x", [1], [float("nan"), float("inf")])])
    assert content(tmp_path) == [("x", [1], [None, None])]
    with Journal(tmp_path, IDENTITY, resume=True) as journal, pytest.raises(TypeError):
        journal.append("x", [2], {1, 2})
    assert content(tmp_path) == [("x", [1], [None, None])]


@pytest.mark.parametrize("count", range(1, len(ENTRIES) + 1))
def test_killed_between_entries_it_goes_on(tmp_path, count):
    filled(tmp_path, ENTRIES[:count])
    with Journal(tmp_path, IDENTITY, resume=True) as journal:
        fill(journal, ENTRIES[count:])
    assert content(tmp_path) == ENTRIES


def test_killed_at_any_byte_of_the_last_entry_it_goes_on_without_it(tmp_path):
    whole, before = filled(tmp_path), len(filled(tmp_path / "before", ENTRIES[:-1]))
    for end in range(before, len(whole) + 1):
        (tmp_path / JOURNAL_NAME).write_bytes(whole[:end])
        with Journal(tmp_path, IDENTITY, resume=True) as journal:
            assert journal.get("stage", None) == (ENTRIES[-1] if end == len(whole) else ENTRIES[0])[2]
            fill(journal, ENTRIES[-1:])
        assert content(tmp_path) == [*ENTRIES, *ENTRIES[-1:]] if end == len(whole) else ENTRIES


@pytest.mark.parametrize("operation", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_one_that_cannot_begin_leaves_what_it_would_overwrite(tmp_path, monkeypatch, operation, error):
    before = filled(tmp_path)

    def fail(*args: object) -> None:
        raise error

    with Journal(tmp_path, IDENTITY, overwrite=True) as journal, monkeypatch.context() as patched:
        patched.setattr(os, operation, fail)
        with pytest.raises((OSError, KeyboardInterrupt)):
            journal.append("x", 1, 1)
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before
    with Journal(tmp_path, IDENTITY, resume=True) as journal:
        assert journal.get("x", 1) is None
        assert [journal.get(*entry[:2]) for entry in ENTRIES[2:4]] == [entry[2] for entry in ENTRIES[2:4]]


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Files may not grow beyond this, so that a write ends in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("room", [0, 1, 40])
def test_a_disk_that_is_full_takes_no_entry_and_room_lets_it_go_on(tmp_path, room, at_once):
    size = len(filled(tmp_path, ENTRIES[:-1]))
    with Journal(tmp_path, IDENTITY, resume=True) as journal:
        with room_for(size + room), pytest.raises(OSError, match=JOURNAL_NAME):
            journal.append(*ENTRIES[-1])
        assert (tmp_path / JOURNAL_NAME).stat().st_size == size + room
        if at_once:
            journal.append(*ENTRIES[-1])
    with Journal(tmp_path, IDENTITY, resume=True) as journal:
        fill(journal, [] if at_once else ENTRIES[-1:])
    assert content(tmp_path) == ENTRIES


def test_a_journal_is_begun_once_unless_it_is_to_be_overwritten(tmp_path):
    before = filled(tmp_path)
    with pytest.raises(InvalidConfigError, match=str(tmp_path)):
        Journal(tmp_path, IDENTITY)
    for options in ({"resume": True, "overwrite": True}, {"folder": None, "resume": True}):
        with pytest.raises(InvalidConfigError, match="folder"):
            Journal(**{"folder": tmp_path, "identity": IDENTITY, **options})
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before
    with Journal(tmp_path, {"other": 1}, overwrite=True) as journal:
        assert (tmp_path / JOURNAL_NAME).read_bytes() == before
        assert journal.get(*ENTRIES[3][:2]) is None
        journal.append("x", 1, 1)
    with Journal(tmp_path, {"other": 1}, resume=True) as journal:
        assert (journal.get("x", 1), journal.get(*ENTRIES[3][:2])) == (1, None)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"settings": {"seed": 2, "weights": [0.8, 1.0]}}, "settings.seed was 1 there and is 2 now"),
        ({"settings": {"seed": 1}}, r"settings.weights was \[0.8, 1.0\] there and is null now"),
        ({"splits": []}, r'splits was \[{"name": "search"}\] there and is \[\] now'),
        ({"device": "cuda"}, 'device was null there and is "cuda" now'),
    ],
)
def test_of_another_run_the_first_difference_is_named(tmp_path, change, difference):
    before = filled(tmp_path)
    with pytest.raises(InvalidConfigError, match=difference):
        Journal(tmp_path, {**IDENTITY, **change}, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {JOURNAL_NAME: before}


@pytest.mark.parametrize("number", [0, 1, 3, len(ENTRIES)])
@pytest.mark.parametrize("damaged", [b"", b"[]", b'{"kind": [], "key": 1, "value": 1}', b'{"format": 2}', b"\xff"])
def test_a_line_that_is_damaged_is_refused(tmp_path, number, damaged):
    lines = filled(tmp_path).split(b"\n")
    text = b"\n".join([*lines[:number], damaged, *lines[number + 1 :]])
    (tmp_path / JOURNAL_NAME).write_bytes(text)
    with pytest.raises(InvalidConfigError, match=JOURNAL_NAME):
        Journal(tmp_path, IDENTITY, resume=True)
    assert (tmp_path / JOURNAL_NAME).read_bytes() == text


def test_two_processes_at_once_write_one_after_the_other(tmp_path):
    children = []
    for _ in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                done = 0
                while done < 10:
                    with suppress(BlockingIOError), Journal(tmp_path, IDENTITY, resume=True) as journal:
                        fill(journal, [(str(os.getpid()), number, number) for number in (2 * done, 2 * done + 1)])
                        done += 1
                os._exit(0)
            finally:
                os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    entries = content(tmp_path)
    assert len(entries) == 40
    assert all(first[0] == second[0] for first, second in zip(entries[::2], entries[1::2], strict=True))
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL_NAME]


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[int]:
    """A process that is in `folder` until it is killed with SIGKILL at the end; yields its number."""
    ready, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with locked(folder):
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
    with held_by_another_process(tmp_path) as pid:
        for _ in range(2):
            with pytest.raises(BlockingIOError, match=f"in use by process {pid}.*{tmp_path}"), locked(tmp_path):
                pass
    assert (tmp_path / LOCK_NAME).exists()  # of the one that was killed
    with locked(tmp_path):
        pass
    assert not any(tmp_path.iterdir())


def test_a_second_call_of_the_same_process_is_kept_out_and_leaves_the_first_alone(tmp_path):
    with locked(tmp_path):
        for _ in range(2):
            with pytest.raises(BlockingIOError, match=str(os.getpid())), locked(tmp_path):
                pass
        with locked(tmp_path / "another"):
            pass


def test_folders_that_were_made_for_nothing_go_away(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written.*file"), locked(tmp_path / "file" / "run"):
        pass
    with pytest.raises(InvalidConfigError), locked(tmp_path / "a"):
        Journal(tmp_path / "a" / "b" / "c", IDENTITY, resume=True, overwrite=True)
    with Journal(tmp_path / "a" / "b", IDENTITY, resume=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
