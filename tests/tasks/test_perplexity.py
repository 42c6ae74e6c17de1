"""Running text: windows, strides, splits that share nothing, sources, and a search on it from end to end."""

from __future__ import annotations

import builtins
import gzip
import json
import sys
import tracemalloc
import types

import numpy as np
import pytest
import torch
from conftest import VOCAB, build_model
from tiny_tokenizer import tiny_bpe

from peft_layerrope import Perplexity, SearchError, TaskError, evaluate, plan_search, search
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.tasks.base import SPLIT_NAMES, Example, Split, Task, check_disjoint
from peft_layerrope.tasks.perplexity import read_source

STREAM = np.arange(1000)
SIZES = {"search": 400, "validation": 200, "test": 400}


def tokens_of(example: Example) -> tuple[int, ...]:
    return example.context_ids + example.query_ids + example.answer_ids


def start_of(task: Perplexity, name: str) -> int:
    return tokens_of(task.split(name, 1).examples[0])[0]


@pytest.mark.parametrize("seed", range(6))
def test_splits_are_stretches_that_follow_each_other(seed):
    task = Perplexity(STREAM, length=50, seed=seed)
    assert isinstance(task, Task)
    parts = sorted((start_of(task, name), SIZES[name]) for name in SPLIT_NAMES)
    assert parts[0][0] == 0
    assert parts[1][0] == parts[0][1]
    assert parts[2][0] == parts[0][1] + parts[1][1]
    for name, size in SIZES.items():
        seen = [token for example in task.split(name, size // 50).examples for token in tokens_of(example)]
        assert seen == list(range(start_of(task, name), start_of(task, name) + size))


def test_the_seed_decides_the_order_of_the_stretches():
    orders = {tuple(start_of(Perplexity(STREAM, length=50, seed=s), name) for name in SPLIT_NAMES) for s in range(20)}
    assert len(orders) > 3


def test_without_a_stride_all_but_the_first_token_is_scored():
    split = Perplexity(STREAM, length=50).split("test", 8)
    assert (split.measure, split.positions, split.num_groups) == ("loss", (0,), 8)
    assert {(len(e.context_ids), len(e.query_ids), len(e.answer_ids)) for e in split.examples} == {(0, 1, 49)}


@pytest.mark.parametrize(("length", "stride"), [(50, 10), (50, 49), (50, 1), (64, 16)])
def test_with_a_stride_every_token_but_the_first_is_scored_once(length, stride):
    task = Perplexity(STREAM, length=length, stride=stride)
    windows = 1 + (400 - length) // stride
    split = task.split("test", windows)
    start = start_of(task, "test")
    scored = [token for example in split.examples for token in example.answer_ids]
    assert scored == list(range(start + 1, start + length + (windows - 1) * stride))
    assert {example.num_tokens for example in split.examples} == {length}
    assert all(list(tokens_of(e)) == list(range(tokens_of(e)[0], tokens_of(e)[-1] + 1)) for e in split.examples)
    with pytest.raises(TaskError, match=rf"its 400 tokens hold {windows} windows of {length}, {windows + 1} were"):
        task.split("test", windows + 1)


def test_strided_windows_of_different_splits_share_no_token():
    task = Perplexity(STREAM, length=50, stride=5)
    sets = []
    for name, size in SIZES.items():
        sets.append({token for e in task.split(name, 1 + (size - 50) // 5).examples for token in tokens_of(e)})
    assert sum(map(len, sets)) == len(set.union(*sets)) == 1000


def test_windows_without_a_context_are_not_taken_for_one():
    task = Perplexity(STREAM, length=50)
    splits = [task.split(name, 4) for name in SPLIT_NAMES]
    check_disjoint([*splits, Perplexity(STREAM, length=20).split("search", 4)])
    copy = Split("copy", 0, (0,), splits[1].examples[2:3], "loss")
    with pytest.raises(TaskError, match="splits 'validation' and 'copy' share 1 contexts"):
        check_disjoint([*splits, copy])


def test_text_is_tokenised_as_one_stream_with_a_bos_before_every_window():
    tokenizer, texts = tiny_bpe(), [f"word{i} baba dab fob" * 9 for i in range(40)]
    stream = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    split = Perplexity(texts, tokenizer=tokenizer, length=33).split("test", 5)
    assert {tokens_of(e)[0] for e in split.examples} == {tokenizer.bos_token_id}
    bodies = [token for e in split.examples for token in tokens_of(e)[1:]]
    start = next(i for i in range(len(stream)) if stream[i : i + len(bodies)] == bodies)
    assert start in [int(f * len(stream) + 1e-9) for f in (0, 0.2, 0.4, 0.6)]
    assert [e.answer_ids for e in split.examples] == [tokens_of(e)[1:] for e in split.examples]
    one = Perplexity("\n\n".join(texts), tokenizer=tokenizer, length=33)
    assert one.split("test", 5) == split
    strided = Perplexity(texts, tokenizer=tokenizer, length=33, stride=8).split("test", 3)
    assert {tokens_of(e)[0] for e in strided.examples} == {tokenizer.bos_token_id}
    assert [len(e.answer_ids) for e in strided.examples] == [32, 8, 8]
    assert tokens_of(strided.examples[1])[1:] == tuple(bodies[8:40])


def test_the_loss_is_the_models_own():
    model = build_model("llama")
    ids = torch.randint(0, VOCAB, (600,), generator=torch.Generator().manual_seed(5))
    task = Perplexity(ids.tolist(), length=32, stride=8)
    scores = evaluate(model, task, num_groups=4)
    start = next(
        i for i in range(569) if tuple(ids[i : i + 32].tolist()) == tokens_of(task.split("test", 1).examples[0])
    )
    for group in range(4):
        window = ids[start + 8 * group : start + 8 * group + 32][None]
        labels = window.clone()
        if group:
            labels[:, :-8] = -100
        with torch.no_grad():
            loss = model(window, labels=labels).loss.item()
        assert -scores.values[group, 0] == pytest.approx(loss, rel=1e-5)


SETTINGS = {"steps": 1, "test_groups": 3}


@pytest.fixture(scope="module")
def task() -> Perplexity:
    return Perplexity(np.random.default_rng(0).integers(0, VOCAB, 1000), length=40)


def test_a_search_on_text_compares_losses(task):
    result = search(build_model("llama"), task, progress=False, **SETTINGS)
    content = json.loads(json.dumps(result.to_dict()))
    rows = {row["name"]: row for row in content["table"]}
    assert rows["none"]["test"]["average_loss"] == pytest.approx(-result.table["none"].scores.average().value, abs=1e-5)
    gap = rows["per_layer"]["test"]["average_loss"] - rows["none"]["test"]["average_loss"]
    value, low, high = rows["per_layer"]["average_loss_minus"]["none"]
    assert value == pytest.approx(gap, abs=1e-5)
    assert low <= value <= high
    assert rows["per_layer"]["ordinary_text"].keys() == {"divergence"}  # nothing is right or wrong at the two ends
    assert result.subtitle() == "perplexity, 40 tokens = 0.6× the trained window, 3 held-out contexts"
    assert result.table["uniform"].fitness < 0  # minus the loss


def test_a_stride_of_few_tokens_is_measured_in_as_many_buckets():
    split = Perplexity(STREAM, length=40, stride=4).split("test", 3)
    scores = Scorer(build_model("llama")).measure(split)
    assert scores.positions == (36, 37, 38, 39)
    assert scores.log_prob.shape == (3, 4)


@pytest.mark.parametrize("run", [search, plan_search])
def test_the_papers_search_is_refused_on_text_before_any_work(task, run):
    def never(*arguments: object, **settings: object) -> None:
        raise AssertionError("the model ran")

    model = build_model("llama")
    model.forward = never
    with pytest.raises(SearchError, match="algorithm='paper' with the task 'perplexity', which measures a loss"):
        run(model, task, algorithm="paper", **SETTINGS)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("words", {"length": 8}, "text needs a tokenizer"),
        ("", {"length": 8, "tokenizer": tiny_bpe()}, "text must hold text"),
        ([], {"length": 8}, "must hold a flat list of token ids"),
        ([1, -1], {"length": 8}, "must hold a flat list of token ids"),
        ([0.5], {"length": 8}, "must hold a flat list of token ids"),
        ([[1], [2, 3]], {"length": 8}, "must hold a flat list of token ids"),
        ([[1, 2]], {"length": 8}, "must hold a flat list of token ids"),
        ([10**30], {"length": 8}, "must hold a flat list of token ids"),
        (STREAM, {"length": 1}, "length=1 must be at least 2"),
        (STREAM, {"length": 8, "stride": 8}, "stride=8 must be at most 7"),
        (STREAM, {"length": 8, "stride": 0}, "stride=0 must be at least 1"),
    ],
)
def test_what_cannot_work(text, settings, message):
    with pytest.raises(TaskError, match=message):
        Perplexity(text, **settings)


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", "one two"), ("a.json", "[1, 2]"), ("a.jsonl", '{"text": "a"}')]
)
def test_a_byte_order_mark_is_no_part_of_the_text(name, content, tmp_path):
    sources = []
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / name).write_text(content, encoding=encoding)
        sources.append(list(read_source(tmp_path / name)))
    assert sources[0] == sources[1]


@pytest.mark.parametrize(
    ("name", "groups", "message"),
    [
        ("train", 1, "split 'train' is unknown"),
        ("test", 0, "num_groups=0 must be at least 1"),
        ("validation", 5, "its 200 tokens hold 4 windows of 50, 5 were asked for"),
    ],
)
def test_splits_that_cannot_be_made(name, groups, message):
    with pytest.raises(TaskError, match=message):
        Perplexity(STREAM, length=50).split(name, groups)


def test_a_split_shorter_than_a_window_has_none():
    with pytest.raises(TaskError, match="its 400 tokens hold 0 windows of 401, 1 were asked for"):
        Perplexity(STREAM, length=401).split("test", 1)


def test_sources(tmp_path):
    texts = ["first text\nof two lines", "second"]
    lines = "".join(json.dumps({"text": text, "more": 1}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.txt").write_text(texts[0])
    (tmp_path / "a.json").write_text("[1, 2, 3]")
    np.save(tmp_path / "a.npy", np.array([1, 2, 3], dtype=np.uint16))
    assert read_source(tmp_path / "a.jsonl") == read_source(tmp_path / "a.jsonl.gz") == texts
    assert read_source(tmp_path / "a.txt") == [texts[0]]
    assert read_source(tmp_path / "a.json").tolist() == read_source(tmp_path / "a.npy").tolist() == [1, 2, 3]
    np.save(tmp_path / "long.npy", STREAM)
    task = Perplexity.from_source(tmp_path / "long.npy", length=50, stride=25)
    assert task.split("test", 3) == Perplexity(STREAM, length=50, stride=25).split("test", 3)
    described = task.describe()
    assert json.loads(json.dumps(described)) == described
    assert (described["data"], described["tokens"]) == ("long.npy", 1000)


def test_a_line_that_unfolds_without_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_layerrope.tasks.prompts._MAX_LINE", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"a" * 2**20))
    with pytest.raises(TaskError, match="line 1: more than 1,000 bytes"):
        read_source(tmp_path / "a.jsonl.gz")


def test_no_more_of_an_endless_line_is_unfolded_than_a_line_may_have(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_layerrope.tasks.prompts._MAX_LINE", 2**20)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"a" * 2**26))
    tracemalloc.start()
    try:
        with pytest.raises(TaskError):
            read_source(tmp_path / "a.jsonl.gz")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", "cannot be read as UTF-8 text"),
        ("a.json", b"[1, 2", "cannot be read as a JSON list of token ids"),
        ("a.json", b'{"a": 1}', "must hold a flat list of token ids"),
        ("a.json", b"[" * 100_000, "cannot be read as a JSON list of token ids"),
        ("a.npy", b"text", "cannot be read as a NumPy array of token ids"),
        ("a.npy", b"", "cannot be read as a NumPy array of token ids"),
        ("a.jsonl", b'{"txt": "a"}', "line 1: text is missing"),
        ("a.jsonl", b'{"text": 3}', "line 1: text=3 must be a valid string"),
    ],
)
def test_sources_that_cannot_be_read(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=message) as caught:
        read_source(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_pickles_are_not_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(TaskError, match="cannot be read as a NumPy array of token ids"):
        read_source(tmp_path / "a.npy")


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(TaskError, match=r"no\.txt cannot be read as UTF-8 text: No such file"):
        read_source(tmp_path / "no.txt")


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("datasets:owner/name", ("owner/name", None, "test")),
        ("datasets:name:train", ("name", None, "train")),
        ("datasets:owner/name@raw:train", ("owner/name", "raw", "train")),
    ],
)
def test_the_datasets_package_is_asked_for_the_column_text(source, asked, monkeypatch):
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str) -> dict:
        calls.append((name, config, split))
        return {"text": ["a", "b"]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_source(source) == ["a", "b"]
    assert calls == [asked]


def test_the_real_datasets_package_reads_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "test.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert read_source(f"datasets:{tmp_path / 'texts'}") == ["a", "b"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"content": ["a"]}, "cannot be loaded as rows with a column 'text'"),
        (ConnectionError("no network\nat all"), "cannot be loaded .*: no network"),
    ],
)
def test_data_sets_that_cannot_be_used(rows, message, monkeypatch):
    def load_dataset(*arguments: object, **settings: object) -> dict:
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(TaskError, match=message):
        read_source("datasets:name")


def test_a_missing_datasets_package_is_named(monkeypatch):
    real = builtins.__import__

    def without(name: str, *arguments: object) -> types.ModuleType:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TaskError, match=r"pip install 'peft-layerrope\[datasets\]'"):
        read_source("datasets:name")
