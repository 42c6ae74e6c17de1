"""CONTRIBUTING.md: its example runs, and its table of layers is the package's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from peft_layerrope import Task, evaluate, search
from peft_layerrope.tasks import SPLIT_NAMES, check_disjoint

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peft_layerrope"
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def layers() -> dict[str, int]:
    """Module of the package -> its row in the table, from the top."""
    table = TEXT.split("## The layers")[1].split("\n## ")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    return {name: number for number, row in enumerate(rows) for name in re.findall(r"`(\w+)`", row)}


def modules() -> dict[str, Path]:
    found = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    folders = (path for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py")))
    return found | {path.name: path for path in folders}


def imported(path: Path) -> set[str]:
    """The package's modules (and folders) that a file imports, also where it does so late or for types alone."""
    depth = len(path.relative_to(PACKAGE).parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.startswith("peft_layerrope."):
            names.add(node.module.split(".")[1])
    return names & modules().keys()


def test_the_table_names_every_module_once():
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| .*\| (`.*) \|$", TEXT, re.MULTILINE)))
    assert len(listed) == len(set(listed))
    assert set(layers()) == set(modules())


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name):
    rows = layers()
    files = [modules()[name]] if modules()[name].is_file() else sorted(modules()[name].rglob("*.py"))
    found = {(path.name, other) for path in files for other in imported(path)}
    upward = {f"{file} imports {other}" for file, other in found if rows[other] < rows[name]}
    assert not upward


@pytest.fixture
def needle():
    code = re.search(r"<!-- example: task -->\n```py\n(.*?)```", TEXT, re.DOTALL)[1]
    names: dict = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    return names["Needle"]


def test_the_example_is_a_task(needle, demo_model):
    task = needle(range(6, demo_model.config.vocab_size))
    assert isinstance(task, Task)
    splits = [task.split(name, 4) for name in SPLIT_NAMES]
    check_disjoint(splits)
    assert task.split("test", 4) == splits[2]
    assert needle(range(6, 300), seed=1).split("test", 4) != needle(range(6, 300)).split("test", 4)
    for example in splits[0].examples:
        place = task.positions[example.position]
        assert example.context_ids[place : place + 2] == (*example.query_ids, *example.answer_ids)
        assert example.context_ids.count(example.answer_ids[0]) == 1
    assert evaluate(demo_model, task, num_groups=2).correct.shape == (2, 3)


def test_the_example_can_be_searched(needle, demo_model):
    groups = {"search_groups": 1, "validation_groups": 1, "test_groups": 2}
    few = {"population": 4, "generations": 0, "refine": False, "controls": False, "progress": False}
    result = search(demo_model, needle(range(6, demo_model.config.vocab_size)), **groups, **few)
    assert result.to_dict()["task"]["name"] == "needle"
