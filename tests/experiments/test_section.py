"""Sections survive the disk, and nothing else does."""

from __future__ import annotations

import json

import pytest

from peft_layerrope.experiments import section as storage
from peft_layerrope.experiments.section import Section, SectionFigure, command_line, load_section, save_section
from peft_layerrope.report import Table

PNG = b"\x89PNG\r\n\x1a\nnot really"


def section(**changes) -> Section:
    values = {
        "name": "halves",
        "title": "A title",
        "question": "Why?",
        "measured": "a task",
        "findings": ("first", "second"),
        "tables": (Table(("a", "b"), (("1", "2"),), "t", "c", (0, 1)),),
        "figures": (SectionFigure("one", "a picture", PNG),),
        "data": {"x": [1, 2.5, None]},
        "command": "layerrope experiment halves",
    }
    return Section(**values | changes)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    save_section(section(), tmp_path, {})
    assert load_section(tmp_path, "halves") == section()
    assert (tmp_path / "halves-one.png").read_bytes() == PNG
    assert "![a picture](halves-one.png)" in (tmp_path / "halves.md").read_text()


def test_a_section_is_found_only_for_what_was_asked(tmp_path):
    save_section(section(), tmp_path, {"groups": 3})
    assert load_section(tmp_path, "halves", {"groups": 3}) == section()
    assert load_section(tmp_path, "halves", {"groups": 4}) is None
    assert load_section(tmp_path, "sweep", {"groups": 3}) is None


@pytest.mark.parametrize("harm", ["no picture", "cut", "row", "name", "list"])
def test_a_damaged_section_is_not_found(tmp_path, harm):
    save_section(section(), tmp_path, {})
    path = tmp_path / "halves.json"
    values = json.loads(path.read_text())
    if harm == "no picture":
        (tmp_path / "halves-one.png").unlink()
    elif harm == "row":
        values["tables"][0]["rows"][0].append("3")
    elif harm == "name":
        values["figures"][0]["name"] = "../../etc/passwd"
    elif harm == "list":
        values["findings"] = None
    path.write_text(json.dumps(values)[: 40 if harm == "cut" else None])
    assert load_section(tmp_path, "halves", {}) is None


@pytest.mark.parametrize("name", ["", "../x", "one/../../secret", "A", "a b", "a.b", "-a", "a\n", 1])
def test_a_saved_section_cannot_name_a_file_elsewhere(tmp_path, monkeypatch, name):
    save_section(section(), tmp_path, {})
    path = tmp_path / "halves.json"
    values = json.loads(path.read_text())
    values["figures"][0]["name"] = name
    path.write_text(json.dumps(values))
    opened = []
    monkeypatch.setattr(storage, "read_bytes", lambda path, limit: opened.append(path) or PNG)
    assert load_section(tmp_path, "halves", {}) is None
    assert not opened


def test_a_row_has_as_many_cells_as_the_header():
    with pytest.raises(ValueError, match="expected 2"):
        Table(("a", "b"), (("1",),))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([("--groups", 3), ("--data", None), ("--flag", True), ("--other", False)], "--groups 3 --flag"),
        ([("--try", [1.0, 1.25])], "--try 1 --try 1.25"),
        ([("--adapter", "my adapter; rm -rf x")], "--adapter 'my adapter; rm -rf x'"),
        (
            [("--adapter", "some/adapter"), ("--data", "/home/someone/data.txt")],
            "--adapter some/adapter --data data.txt",
        ),
    ],
)
def test_command_lines_are_quoted_and_name_no_folders_of_this_machine(options, text):
    assert command_line(["experiment", "x"], options) == f"layerrope experiment x {text}"
