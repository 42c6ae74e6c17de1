"""CONTRIBUTING.md: its example runs, and its table of layers is the package's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from fakes import LEAST_SEARCH

from peft_layerrope import Task, evaluate, search
from peft_layerrope.tasks import SPLIT_NAMES, check_disjoint

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peft_layerrope"
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


NAME = r"`(\w+(?:/\w+)?)`"


def layers() -> dict[str, int]:
    """Module or folder of the package -> its row in the table, from the top."""
    table = TEXT.split("## The layers")[1].split("\n## ")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    return {name: number for number, row in enumerate(rows) for name in re.findall(NAME, row)}


def place(parts: tuple[str, ...]) -> str:
    """Where a module, as the names on its path, stands in the table: by itself, or as part of its folder."""
    split_up = {name.split("/")[0] for name in layers() if "/" in name}
    return "/".join(parts[:2]) if parts[0] in split_up else parts[0]


def modules() -> dict[str, list[Path]]:
    """Place in the table -> its files."""
    found: dict[str, list[Path]] = {"demo": [PACKAGE / "demo" / "__init__.py"]}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__init__.py":
            found.setdefault(place(path.relative_to(PACKAGE).with_suffix("").parts), []).append(path)
    return found


def imported(path: Path) -> set[str]:
    """The places that a file imports from, also where it does so late or for types alone."""
    folder = path.relative_to(PACKAGE).parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or (node.level == 0 and node.module.split(".")[0] != PACKAGE.name):
            continue
        named = tuple(node.module.split(".")) if node.module else ()
        base = folder[: len(folder) - node.level + 1] + named if node.level else named[1:]
        found |= {place((*base, alias.name)) for alias in node.names}
    return found & modules().keys()


def test_the_table_names_every_module_once():
    listed = re.findall(NAME, "".join(re.findall(r"^\| .*\| (`.*) \|$", TEXT, re.MULTILINE)))
    assert len(listed) == len(set(listed))
    assert set(layers()) == set(modules())


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name):
    rows = layers()
    found = {(path.name, other) for path in modules()[name] for other in imported(path)}
    upward = {f"{file} imports {other}" for file, other in found if rows[other] < rows[name]}
    assert not upward


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("tuner/model.py", {"tuner/rotary", "tuner/config", "errors"}),
        ("tuner/config.py", {"tuner/registration", "tuner/scaling", "files", "errors"}),
        ("cli/search.py", {"searcher", "report", "cli"}),
        ("scoring/scores.py", {"scoring", "errors"}),
    ],
)
def test_imports_are_seen(file, found):
    assert imported(PACKAGE / file) >= found


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
    task = needle(range(6, demo_model.config.vocab_size))
    result = search(demo_model, task, **groups, **LEAST_SEARCH, progress=False)
    assert result.to_dict()["task"]["name"] == "needle"
