"""search.json is a stranger's file."""

from __future__ import annotations

import json

import pytest
from tiny_tokenizer import tiny_bpe

from peft_layerrope.errors import SearchError
from peft_layerrope.searcher.result import read_record
from peft_layerrope.searcher.space import FactorGrid
from peft_layerrope.tasks.specification import TaskSpecification, make_task


def record_values() -> dict:
    """What a search writes, as far as a report reads it."""
    rows = [
        {
            "name": name,
            "label": label,
            "layer_factors": factors,
            "evaluations": 3,
            "test": {
                "positions": [0, 5, 10],
                "accuracy_by_position": [accuracy] * 3,
                "accuracy_intervals": [[accuracy - 0.1, accuracy + 0.1]] * 3,
                "average_accuracy": accuracy,
                "average_accuracy_interval": [accuracy - 0.1, accuracy + 0.1],
                "utilisation": accuracy,
            },
            "average_accuracy_minus": {"none": [accuracy - 0.2, accuracy - 0.3, accuracy - 0.1]},
        }
        for name, label, factors, accuracy in (
            ("none", "no scaling", [1.0] * 6, 0.2),
            ("uniform", "best uniform factor", [1.5] * 6, 0.5),
            ("refined", "per layer: refined", [1.5, 1.9, 1.6, 1.7, 1.4, 1.3], 0.6),
        )
    ]
    return {
        "searcher": "peft_layerrope",
        "searcher_version": "0.1.0",
        "model": "peft_layerrope/demo",
        "model_window": 256,
        "task": {"name": "kv_words", "length": 320, "seed": 0, "positions": [0, 5, 10]},
        "splits": [{"name": "test", "seed": 0, "groups": 200, "max_tokens": 320}],
        "settings": {"grid": {"min_factor": 1.0, "max_factor": 2.0, "step": 0.1}},
        "layer_factors": [1.5, 1.9, 1.6, 1.7, 1.4, 1.3],
        "chosen": "refined",
        "table": rows,
        "evaluations": {"all_methods": 40},
    }


def changed(path: tuple, value) -> dict:
    values = record_values()
    level = values
    for part in path[:-1]:
        level = level[part]
    level[path[-1]] = value
    return values


def test_it_is_read(tmp_path):
    (tmp_path / "search.json").write_text(json.dumps(record_values() | {"later": "field"}))
    record = read_record(tmp_path)
    assert record.grid == FactorGrid(1.0, 2.0, 0.1)
    assert record.test.groups == 200
    assert record.row("refined").scores.average_accuracy == 0.6
    assert record.row("line") is None


@pytest.mark.parametrize("name", ["layers_to_transform", "layers"])  # the latter is what it was called before
def test_the_layers_that_were_searched(tmp_path, name):
    (tmp_path / "search.json").write_text(json.dumps(changed(("settings", name), [1, 4])))
    assert read_record(tmp_path).settings.layers_to_transform == [1, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no search.json"),
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "model is missing"),
        ('{"model": 1, "model": 2}', "twice"),
        ("[" * 100_000, "search.json"),
        ("\ud800", "search.json"),
    ],
)
def test_damaged_files(tmp_path, text, message):
    if text is not None:
        (tmp_path / "search.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SearchError, match=message) as caught:
        read_record(tmp_path)
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model",), 3),
        (("model",), "x" * 1000),
        (("chosen",), "nothing"),
        (("table",), []),
        (("table",), [{}] * 1000),
        (("table", 0, "layer_factors"), ["1"]),
        (("table", 0, "layer_factors"), [1.0] * 100_000),
        (("table", 0, "layer_factors"), [float("nan")]),
        (("table", 0, "layer_factors"), [float("inf")]),
        (("table", 0, "label"), {"a": 1}),
        (("table", 0, "evaluations"), 1.5),
        (("table", 0, "test"), {"positions": [0]}),
        (("table", 0, "test", "accuracy_by_position"), [0.1]),
        (("table", 0, "test", "accuracy_intervals"), [[0.1, 0.2, 0.3]] * 3),
        (("table", 0, "average_accuracy_minus"), {"none": [1, 2]}),
        (("splits",), None),
        (("task",), "kv_words"),
        (("settings", "grid", "step"), 0.0),
        (("settings", "grid", "step"), 1e-9),
        (("settings", "grid", "max_factor"), 0.5),
    ],
)
def test_values_of_the_wrong_type_or_size(tmp_path, path, value):
    (tmp_path / "search.json").write_text(json.dumps(changed(path, value)))
    with pytest.raises(SearchError, match=r"search\.json") as caught:
        read_record(tmp_path)
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


def test_a_message_carries_no_control_characters(tmp_path):
    (tmp_path / "search.json").write_text(json.dumps(changed(("chosen",), "\x1b[31mred\u202e")))
    with pytest.raises(SearchError) as caught:
        read_record(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "asked",
    [
        TaskSpecification("kv_words", 320, num_positions=4, task_seed=3),
        TaskSpecification("kv_retrieval", 2000, num_keys=9, keys="syllables", num_positions=4, max_new_tokens=30),
        TaskSpecification("kv_mix", 2000, keys="syllables", task_seed=2),
    ],
)
def test_the_task_of_a_record_is_the_one_that_was_searched(tmp_path, demo_tokenizer, asked):
    tokenizer = demo_tokenizer if asked.name == "kv_words" else tiny_bpe()
    task = make_task(asked, tokenizer, None)
    (tmp_path / "search.json").write_text(json.dumps({**record_values(), "task": task.describe()}))
    again = make_task(read_record(tmp_path).task.specification(), tokenizer, None)
    assert again.describe() == task.describe()
    assert again.split("test", 2).describe() == task.split("test", 2).describe()
