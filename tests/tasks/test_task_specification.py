"""From plain settings to a task: defaults, what belongs to which task, and what is missing."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import numpy as np
import pytest
from tiny_tokenizer import tiny_bpe

from peft_layerrope import KeyValueRetrieval, KeyValueWords, MultiDocumentQA, Perplexity, TaskError
from peft_layerrope.tasks.base import SPLIT_NAMES, Task
from peft_layerrope.tasks.specification import TASK_NAMES, TaskSpecification, make_task

OTHER_VALUES = {
    "num_positions": 3,
    "data": "file",
    "num_keys": 9,
    "keys": "words",
    "num_documents": 4,
    "stride": 8,
    "difficulty": "auto",
    "chat_template": True,
    "chat_template_args": {"enable_thinking": False},
    "system_prompt": "Be brief.",
    "chat_date": "2024-07-26",
    "max_new_tokens": 30,
}
CHAT = {"chat_template", "chat_template_args", "system_prompt", "chat_date"}
KNOWN = {
    "kv_words": {"num_positions"},
    "kv_retrieval": {"num_positions", "data", "num_keys", "keys", "difficulty", *CHAT, "max_new_tokens"},
    "kv_mix": {"num_positions", "keys", *CHAT, "max_new_tokens"},
    "multi_doc_qa": {"num_positions", "data", "num_documents", "difficulty", *CHAT, "max_new_tokens"},
    "perplexity": {"data", "stride"},
}


def test_every_setting_is_tried_here():
    assert {field.name for field in fields(TaskSpecification)} == {"name", "length", "task_seed", *OTHER_VALUES}
    assert set(KNOWN) == set(TASK_NAMES)


@pytest.mark.parametrize("name", TASK_NAMES)
@pytest.mark.parametrize("setting", OTHER_VALUES)
def test_a_setting_that_the_task_does_not_have_is_refused(name, setting):
    value = OTHER_VALUES[setting]
    TaskSpecification(**{setting: value})  # the name is still open
    if setting in KNOWN[name]:
        TaskSpecification(name, length=9, task_seed=4, **{setting: value})
    else:
        with pytest.raises(
            TaskError, match=re.escape(f"{setting}={value!r} is no setting of {name}, which has length, task_seed")
        ):
            TaskSpecification(name, **{setting: value})


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    pairs = [[[f"k{n}-{i}", f"v{n}-{i}"] for i in range(6)] for n in range(10)]
    keys = [{"ordered_kv_records": p, "key": p[1][0], "value": p[1][1]} for p in pairs]
    documents = [{"title": "t", "text": f"gold{n}", "isgold": True} for n in range(30)]
    questions = [{"question": "q", "answers": [d["text"]], "ctxs": [d]} for d in documents]
    for name, records in (("kv", keys), ("qa", questions)):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    np.save(tmp_path / "ids.npy", np.arange(600))
    return {name: str(tmp_path / name) for name in ("kv", "qa", "ids.npy")}


def assert_same(made: Task, direct: Task) -> None:
    """Both give the same examples, judged alike."""
    found, expected = (task.split("test", 2) for task in (made, direct))
    assert found.examples == expected.examples
    assert (found.describe(), found.judged()) == (expected.describe(), expected.judged())


def test_each_task_gets_its_settings(files):
    tokenizer = tiny_bpe()
    words = make_task(TaskSpecification("kv_words", num_positions=3, task_seed=2), tokenizer, window=400)
    assert words.describe() == KeyValueWords(tokenizer, 400, num_positions=3, seed=2).describe()
    made = TaskSpecification("kv_retrieval", 900, 3, 2, num_keys=9, keys="words", max_new_tokens=30)
    direct = KeyValueRetrieval(
        tokenizer, num_keys=9, keys="words", num_positions=3, length=900, seed=2, max_new_tokens=30
    )
    assert_same(make_task(made, tokenizer, None), direct)
    assert direct.split("test", 1).judge.max_new_tokens == 30
    made = TaskSpecification("kv_retrieval", 900, 3, 2, data=files["kv"], num_keys=4, chat_template=True)
    direct = KeyValueRetrieval(
        tiny_bpe(chat=True), data=files["kv"], num_keys=4, num_positions=3, length=900, seed=2, chat_template=True
    )
    assert_same(make_task(made, tiny_bpe(chat=True), None), direct)
    made = TaskSpecification("multi_doc_qa", 900, 4, 2, data=files["qa"], num_documents=6)
    direct = MultiDocumentQA(tokenizer, files["qa"], num_documents=6, num_positions=4, length=900, seed=2)
    assert_same(make_task(made, tokenizer, None), direct)
    made = TaskSpecification("perplexity", 40, task_seed=2, data=files["ids.npy"], stride=8)
    direct = Perplexity(np.arange(600), tokenizer=tokenizer, length=40, stride=8, seed=2)
    assert_same(make_task(made, tokenizer, None), direct)


def test_defaults(files):
    tokenizer = tiny_bpe()
    task = make_task(TaskSpecification(), tokenizer, window=800)
    assert (task.name, task.keys, task.length, len(task.positions)) == ("kv_retrieval", "uuid", 800, 5)
    assert task.split("test", 4).max_tokens <= 800
    assert len(make_task(TaskSpecification("kv_words"), tokenizer, 800).positions) == 11
    assert make_task(TaskSpecification("multi_doc_qa", data=files["qa"]), tokenizer, 800).positions == (0, 4, 9)
    for name in SPLIT_NAMES:
        assert make_task(TaskSpecification(data=files["kv"]), tokenizer, 800).prompts(name, 1)


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        (TaskSpecification("kv_words"), "names no trained window"),
        (TaskSpecification("multi_doc_qa", 100), "multi_doc_qa needs data"),
        (TaskSpecification("perplexity", 100), "perplexity needs data"),
        (TaskSpecification(length=100, stride=8), "stride=8 is no setting of kv_retrieval"),
    ],
)
def test_what_is_missing_is_named(specification, message):
    with pytest.raises(TaskError, match=message):
        make_task(specification, tiny_bpe(), window=None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "kv"}, "name='kv' must be 'kv_words'"),
        ({"length": 0}, "length=0 must"),
        ({"length": 99_999_999}, "length=99999999 must"),
        ({"num_positions": 2}, "num_positions=2 must"),
        ({"num_keys": 1}, "num_keys=1 must"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must"),
        ({"difficulty": "hard"}, "difficulty='hard' must"),
        ({"name": "kv_retrieval", "difficulty": "auto", "num_keys": 5}, "difficulty='auto' finds the number of pairs"),
        ({"task_seed": -1}, "task_seed=-1 must"),
        ({"task_seed": True}, "task_seed=True must"),
        ({"chat_template": "yes"}, "chat_template='yes' must"),
        ({"chat_template_args": "{"}, "chat_template_args='{' must be JSON"),
        ({"chat_template_args": "[1]"}, "chat_template_args=[1] must"),
        ({"data": ""}, "data='': "),
        ({"positions": 5}, "positions is unknown; did you mean num_positions?"),
    ],
)
def test_values_that_cannot_work(values, message):
    with pytest.raises(TaskError) as caught:
        TaskSpecification(**values)
    assert str(caught.value).startswith(message)
