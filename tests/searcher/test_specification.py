"""`search.yaml`: the round trip, and what is refused."""

from __future__ import annotations

import datetime
from dataclasses import asdict

import pytest
import yaml

from peft_layerrope import LayerRopeError, SearchError
from peft_layerrope.searcher.settings import SearchSettings, SearchSpecification, read_specification
from peft_layerrope.searcher.space import FactorGrid
from peft_layerrope.tasks.specification import TaskSpecification

FULL = SearchSpecification(
    model="some/model",
    dtype="bfloat16",
    task=TaskSpecification(
        "kv_retrieval", 300, num_positions=5, task_seed=3, data="a.jsonl.gz", num_keys=9, chat_template=True
    ),
    search=SearchSettings(
        rope_type="linear",
        factor=2.0,
        grid=FactorGrid(0.8, 3.0, 0.2),
        layers_to_transform=(1, 2, 5),
        weights=(1.0, 2.0, 3.0),
        algorithm="paper",
        max_harm=None,
        full_controls=True,
        steps=7,
    ),
    keep_task="kv_retrieval:4096",
)


@pytest.mark.parametrize("specification", [FULL, SearchSpecification()], ids=["full", "defaults"])
def test_what_is_saved_is_read_back(specification, tmp_path):
    path = tmp_path / "search.yaml"
    specification.save(path)
    assert SearchSpecification.of(read_specification(path), str(path)) == specification
    text = path.read_text()
    assert text.startswith("# layerrope search --config search.yaml")
    assert set(yaml.safe_load(text)["search"]) == set(asdict(SearchSettings()))  # every value spelled out


def test_what_is_left_out_has_its_default():
    made = SearchSpecification.of({"task": {"task_seed": 3}, "search": {"grid": {"max_factor": 3}}}, "f.yaml")
    assert made.task == TaskSpecification(task_seed=3)
    assert made.search == SearchSettings(grid=FactorGrid(max_factor=3.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"serch": {}}, "serch is unknown; did you mean search?"),
        ({"keep_task": "kv_retrieval:0"}, "keep_task 'kv_retrieval:0': expected one of kv_words"),
        ({"search": {"minute": 3}}, "search.minute is unknown; did you mean search.minutes?"),
        ({"search": {"grid": {"max": 3}}}, "search.grid.max is unknown; did you mean search.grid.max_factor?"),
        ({"task": {"nam": "kv", "length": -1}}, "task.nam is unknown; did you mean task.name?"),
        ({"search": {"seed": 1, None: 3}}, "search.null is unknown"),
        ({("a", "b"): 3}, "keys"),
        ({"task": {"name": "kv"}}, "task.name='kv' must be 'kv_words', 'kv_retrieval',"),
        ({"task": {"name": "kv_words", "stride": 8}}, "stride=8 is no setting of kv_words"),
        ({"task": {"keys": "hex"}}, "task.keys='hex' must be 'uuid', 'words' or 'syllables'."),
        ({"task": []}, "task=[] must be an object."),
        ({"search": {"population": "many"}}, "search.population='many' must be a valid integer"),
        ({"search": {"population": "4"}}, "search.population='4' must be a valid integer"),
        ({"search": {"seed": datetime.date(2025, 1, 1)}}, "search.seed='2025-01-01' must"),
        ({"search": {"weights": [1, 2]}}, "search.weights[2] is missing."),
        ({"search": {"population": 1}}, "search.population=1 must be"),
        ({"search": {"grid": {"min_factor": 5}}}, "max_factor=4.0 must be greater than min_factor=5.0."),
        (
            {"search": {"grid": {"min_factor": 3}, "algorithm": "paper"}},
            "max_factor=2.0 must be greater than min_factor=3.0.",
        ),
        ({"search": {"grid": {"step": float("inf")}}}, "search.grid.step=inf must be"),
        ({"search": {"layers_to_transform": "7-"}}, "layers_to_transform='7-'"),
        ({"model": "\ud800"}, "JSON"),
    ],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(LayerRopeError) as caught:
        SearchSpecification.of(values, "f.yaml")
    said = str(caught.value)
    assert said.startswith("f.yaml: ")
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "is not YAML"),
        (b"- 1", "must hold names and values"),
        (b"\xff\xfe", "is not YAML"),
        (b"!!python/object/apply:os.system ['true']", "is not YAML"),
        (b"#" * 1_000_001, "a search.yaml has at most 1000000"),
    ],
    ids=["syntax", "list", "bytes", "python object", "huge"],
)
def test_files_that_are_no_specification(content, message, tmp_path):
    path = tmp_path / "search.yaml"
    path.write_bytes(content)
    with pytest.raises(SearchError, match=message):
        read_specification(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SearchError, match=r"nothing.yaml cannot be read: No such file"):
        read_specification(tmp_path / "nothing.yaml")
