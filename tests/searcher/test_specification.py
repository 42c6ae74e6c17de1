"""`search.yaml`: the round trip, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from peft_layerrope import SearchError
from peft_layerrope.searcher import FactorGrid, Guards, SearchSettings
from peft_layerrope.searcher.specification import SearchSpecification, merge, read_specification
from peft_layerrope.tasks import TaskSpecification

FULL = SearchSpecification(
    model="some/model",
    dtype="bfloat16",
    task=TaskSpecification("kv_retrieval", 300, positions=5, seed=3, data="a.jsonl.gz", num_keys=9, chat_template=True),
    search=SearchSettings(
        rope_type="linear",
        factor=2.0,
        grid=FactorGrid(0.8, 3.0, 0.2),
        guards=Guards(None, 0.1),
        scaled_layers=(1, 2, 5),
        weights=(1.0, 2.0, 3.0),
        algorithm="cma-es",
        curve="direct",
        race=False,
        bootstrap=7,
    ),
)


@pytest.mark.parametrize("specification", [FULL, SearchSpecification()], ids=["full", "defaults"])
def test_what_is_saved_is_read_back(specification, tmp_path):
    path = tmp_path / "search.yaml"
    specification.save(path)
    assert SearchSpecification.of(read_specification(path), str(path)) == specification
    text = path.read_text()
    assert text.startswith("# layerrope search --config search.yaml")
    assert set(yaml.safe_load(text)["search"]) == set(SearchSettings().to_dict())  # every value spelled out


def test_changes_go_first_and_leave_the_rest():
    values = {"task": {"seed": 3}, "search": {"grid": {"high": 3.0}}}
    merged = merge(values, {("task", "length"): 64, ("search", "grid", "step"): 0.5, ("model",): "m"})
    made = SearchSpecification.of(merged, "test")
    assert made.task == TaskSpecification(length=64, seed=3)
    assert made.search == replace(SearchSettings(), grid=FactorGrid(1.0, 3.0, 0.5))
    assert values == {"task": {"seed": 3}, "search": {"grid": {"high": 3.0}}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"serch": {}}, "f.yaml: serch is unknown; did you mean search?"),
        ({"search": {"generation": 3}}, "f.yaml: search.generation is unknown; did you mean search.generations?"),
        ({"search": {"grid": {"hi": 3}}}, "f.yaml: search.grid.hi is unknown; did you mean search.grid.high?"),
        ({"task": {"name": "kv"}}, "f.yaml: task.name='kv': input should be 'kv_words', 'kv_retrieval',"),
        ({"task": {"nam": "kv"}}, "f.yaml: task.nam is unknown; did you mean task.name?"),
        (
            {"task": {"name": "kv_words", "stride": 8}},
            "stride=8 is no setting of kv_words, which has length, seed",
        ),
        ({"task": {"keys": "hex"}}, "f.yaml: task.keys='hex': input should be 'uuid' or 'words'."),
        ({"search": {"population": "many"}}, "f.yaml: search.population='many': input should be a valid integer"),
        ({"search": {"weights": [1, 2]}}, "f.yaml: search.weights.2="),
        ({"search": {"population": 1}}, "population=1 must be an integer of at least 4."),
        ({"search": {"grid": {"low": 3}}}, "max_factor=2.0 must be greater than min_factor=3.0."),
    ],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(SearchError) as caught:
        SearchSpecification.of(values, "f.yaml")
    assert str(caught.value).startswith(message)


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
