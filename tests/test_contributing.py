"""CONTRIBUTING.md: its example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fakes import LEAST_SEARCH

from peft_layerrope import Task, evaluate, search
from peft_layerrope.tasks.base import SPLIT_NAMES, check_disjoint

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


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
    task = needle(range(6, demo_model.config.vocab_size))
    result = search(demo_model, task, **LEAST_SEARCH, progress=False)
    assert result.to_dict()["task"]["name"] == "needle"
