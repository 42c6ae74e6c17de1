"""Key-value retrieval in the public format: the prompt to the byte, what is generated, and damaged files."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest
from tiny_tokenizer import tiny_bpe

from peft_layerrope import KeyValueRetrieval, TaskError
from peft_layerrope.tasks.base import SPLIT_NAMES, Task, check_disjoint
from peft_layerrope.tasks.kv import KeyValueMix
from peft_layerrope.tasks.metrics import contains_value
from peft_layerrope.tasks.prompts import ASKED_EVERYWHERE, GOLD_MOVES

PUBLIC = Path(__file__).parents[2] / "../shared/data/kv-retrieval-75_keys.jsonl.gz"
needs_public = pytest.mark.skipif(not PUBLIC.exists(), reason="the public data is not here")


def record(number: int, num_keys: int = 6) -> dict:
    pairs = [[f"k{number}-{i}", f"v{number}-{i * 7}"] for i in range(num_keys)]
    key, value = pairs[number % num_keys]
    return {"ordered_kv_records": pairs, "key": key, "value": value}


def write(path: Path, records: list) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return write(tmp_path / "kv.jsonl.gz", [record(i) for i in range(20)])


def published_prompt(content: dict, position: int) -> str:
    """The prompt, put together line by line."""
    pairs = [pair for pair in content["ordered_kv_records"] if pair[0] != content["key"]]
    pairs = [*pairs[:position], [content["key"], content["value"]], *pairs[position:]]
    lines = ["Extract the value corresponding to the specified key in the JSON object below.", "", "JSON data:"]
    for i, (key, value) in enumerate(pairs):
        lines.append("{ "[min(i, 1)] + f'"{key}": "{value}"' + (",}"[i == len(pairs) - 1]))
    lines += ["", 'Key: "' + content["key"] + '"', "Corresponding value:"]
    return "\n".join(lines)


def contents(splits: list) -> list:
    """All of some splits but their judges, which are as many objects."""
    return [(split.examples, split.positions, split.describe(), split.judged()) for split in splits]


@needs_public
def test_prompts_of_the_public_file_are_the_published_ones_to_the_byte():
    with gzip.open(PUBLIC, "rt") as lines:
        contents = {content["key"]: content for content in map(json.loads, lines)}
    task = KeyValueRetrieval(tiny_bpe(), data=PUBLIC)
    assert task.positions == (0, 18, 37, 55, 74)
    prompts = [prompt for name in SPLIT_NAMES for prompt in task.prompts(name, 8)]
    assert len(prompts) == 3 * 8 * 5
    for prompt in prompts:
        content = contents[prompt.text.rsplit('Key: "', 1)[1].split('"')[0]]
        assert prompt.text.encode() == published_prompt(content, prompt.position).encode()
        assert prompt.answers == (content["value"],)
        assert prompt.text[slice(*prompt.gold)] == content["value"]


@needs_public
def test_the_public_file_is_cut_into_200_100_200():
    task = KeyValueRetrieval(tiny_bpe(), data=PUBLIC)
    sizes = {"search": 200, "validation": 100, "test": 200}
    parts = [{p.text for p in task.prompts(name, size, [0])} for name, size in sizes.items()]
    assert len(set.union(*parts)) == 500
    with pytest.raises(TaskError, match=r"split 'validation': the file has 100 contexts for it, 101 were asked for"):
        task.prompts("validation", 101)


@pytest.mark.parametrize("chat", [False, True])
def test_examples_hold_the_prompt_the_answer_and_where_the_value_stands(file, chat):
    tokenizer = tiny_bpe(chat=chat)
    task = KeyValueRetrieval(tokenizer, data=file, num_positions=3, chat_template=chat)
    assert isinstance(task, Task)
    split, prompts = task.split("test", 3), task.prompts("test", 3)
    assert split.positions == (0, 2, 5)
    assert [(e.group, task.positions[e.position]) for e in split.examples] == [(p.group, p.position) for p in prompts]
    for example, prompt in zip(split.examples, prompts, strict=True):
        written = tokenizer.decode(example.context_ids + example.query_ids)
        assert written == (f"<|bos|><|user|>{prompt.text}<|end|><|assistant|>" if chat else "<|bos|>" + prompt.text)
        assert len(example.query_ids) == 1
        assert tokenizer.decode(example.answer_ids) == ("" if chat else " ") + prompt.answers[0]
        assert example.answers == prompt.answers
        assert prompt.answers[0] in tokenizer.decode(example.context_ids[slice(*example.gold_span)])
        assert contains_value(f' "{prompt.answers[0].upper()}"', example.answers)


@pytest.mark.parametrize("position", [-1, 6])
def test_a_gold_index_out_of_range_is_refused(file, position):
    message = "must be distinct, ascending and from 0 to 5: a context has 6 pairs"
    with pytest.raises(TaskError, match=message):
        KeyValueRetrieval(tiny_bpe(), data=file).prompts("test", 1, [position])


def test_splits_are_seeded_and_disjoint_and_a_file_may_be_plain(file, tmp_path):
    plain = write(tmp_path / "kv.jsonl", [record(i) for i in range(20)])
    sizes = {"search": 8, "validation": 4, "test": 8}

    def splits(path: Path, seed: int) -> list:
        task = KeyValueRetrieval(tiny_bpe(), data=path, seed=seed)
        return [task.split(name, size) for name, size in sizes.items()]

    first = splits(file, 0)
    assert contents(first) == contents(splits(plain, 0))
    assert contents(first) != contents(splits(file, 1))
    check_disjoint(first)


def test_a_context_that_stands_twice_goes_to_one_split(tmp_path):
    path = write(tmp_path / "kv.jsonl", [record(i // 2) for i in range(40)])
    task = KeyValueRetrieval(tiny_bpe(), data=path)
    check_disjoint([task.split(name, size) for name, size in (("search", 14), ("validation", 6), ("test", 14))])


def test_fewer_keys_than_the_file_keep_the_gold_pair(file):
    task = KeyValueRetrieval(tiny_bpe(), data=file, num_keys=4, num_positions=3)
    for prompt in task.prompts("search", 8):
        data = json.loads(prompt.text.split("JSON data:\n")[1].split("\n\nKey")[0])
        assert len(data) == 4
        key = prompt.text.rsplit('Key: "', 1)[1].split('"')[0]
        assert list(data).index(key) == prompt.position
        assert data[key] == prompt.answers[0]
        number = int(key[1:].split("-")[0])
        others = [k for k, _ in record(number)["ordered_kv_records"] if k != key][:3]
        assert [k for k in data if k != key] == others


def test_prompts_beyond_the_length_are_refused_with_both_lengths(file):
    longest = KeyValueRetrieval(tiny_bpe(), data=file).split("test", 8).max_tokens
    KeyValueRetrieval(tiny_bpe(), data=file, length=longest).split("test", 8)
    with pytest.raises(TaskError, match=rf"has {longest} tokens with its answer, more than length={longest - 1}\."):
        KeyValueRetrieval(tiny_bpe(), data=file, length=longest - 1).split("test", 8)


@pytest.mark.parametrize("keys", ["uuid", "words"])
@pytest.mark.parametrize("length", [400, 1500])
def test_generated_prompts_fill_the_length_and_never_exceed_it(keys, length):
    task = KeyValueRetrieval(tiny_bpe(), keys=keys, length=length, num_positions=3)
    split = task.split("test", 30)
    assert 0.75 * length < split.max_tokens <= length
    more = KeyValueRetrieval(tiny_bpe(), keys=keys, num_keys=int(1.4 * task.num_items) + 1, num_positions=3)
    assert more.split("test", 3).max_tokens > length


@pytest.mark.parametrize(("keys", "num_keys"), [("uuid", 40), ("words", 40), ("words", 300)])
def test_generated_records_have_the_public_format(keys, num_keys):
    task = KeyValueRetrieval(tiny_bpe(), keys=keys, num_keys=num_keys)
    for prompt in task.prompts("search", 4):
        data = json.loads(prompt.text.split("JSON data:\n")[1].split("\n\nKey")[0])
        content = {"ordered_kv_records": list(data.items()), "value": prompt.answers[0]}
        content["key"] = list(data)[prompt.position]
        assert prompt.text == published_prompt(content, prompt.position)
        assert len(data) == len(set(data.values())) == num_keys
        if keys == "uuid":
            assert all(text[14] == "4" and text[19] in "89ab" and len(text) == 36 for text in [*data, *data.values()])


def pairs_of(prompt) -> dict[str, str]:
    return json.loads(prompt.text.split("JSON data:\n")[1].split("\n\nKey")[0])


@pytest.mark.parametrize("keys", [None, "syllables"])
def test_a_mix_takes_turns_between_lengths_and_kinds_of_keys(keys):
    length, expected = 4000, ("uuid", "words", "syllables") if keys is None else (keys,)
    task = KeyValueMix(tiny_bpe(), length=length, keys=keys)
    split, prompts = task.split("test", 18), task.prompts("test", 18)
    assert (split.positions, split.protocol, split.num_groups) == ((0, 25, 50, 75, 100), ASKED_EVERYWHERE, 18)
    tokens, kinds = {}, {}
    for example, prompt in zip(split.examples, prompts, strict=True):
        pairs, key = pairs_of(prompt), prompt.question
        depth = list(pairs).index(key) / (len(pairs) - 1)
        assert (prompt.answers, example.answers) == ((pairs[key],), (pairs[key],))
        assert 0 <= prompt.position / 100 - depth < 1 / (len(pairs) - 1)
        tokens[prompt.group] = example.num_tokens
        value = pairs[key]
        kinds[prompt.group] = "uuid" if len(value) == 36 else "words" if " " in value else "syllables"
    shares = [next(share for share in (4, 2, 1) if count <= length / share) for count in tokens.values()]
    assert all(count > 0.6 * length / share for count, share in zip(tokens.values(), shares, strict=True))
    turns = list(zip(shares, kinds.values(), strict=True))
    assert turns[: task.num_turns] == turns[task.num_turns : 2 * task.num_turns]
    assert len(set(turns)) == task.num_turns
    assert set(turns) == set(itertools.product((1, 2, 4), expected))
    assert all(one != other for one, other in itertools.pairwise(shares))
    assert task.describe().get("keys") == keys


def test_splits_of_a_mix_are_seeded_and_disjoint_and_grow_at_the_end():
    splits = [
        KeyValueMix(tiny_bpe(), length=2600, seed=seed).split(name, 12) for seed in (0, 1) for name in SPLIT_NAMES
    ]
    check_disjoint(splits)
    assert KeyValueMix(tiny_bpe(), length=2600).split("test", 5).examples == splits[2].examples[:25]


def test_a_mix_whose_short_contexts_have_no_room_is_refused():
    with pytest.raises(TaskError, match=r"length=1500.* 375 tokens.*uuid.*gold positions among"):
        KeyValueMix(tiny_bpe(), length=1500)


def test_generated_splits_are_seeded_and_disjoint_and_grow_at_the_end():
    def splits(seed: int) -> list:
        task = KeyValueRetrieval(tiny_bpe(), num_keys=6, num_positions=3, seed=seed)
        return [task.split(name, 10) for name in SPLIT_NAMES]

    assert contents(splits(0)) == contents(splits(0))
    check_disjoint([*splits(0), *splits(1)])
    task = KeyValueRetrieval(tiny_bpe(), num_keys=6, num_positions=3)
    assert task.split("test", 10).examples[:9] == task.split("test", 3).examples


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("keys", ["uuid", "words", "syllables"])
def test_a_generated_context_is_asked_for_the_pair_at_every_position(keys, chat):
    tokenizer = tiny_bpe(chat=chat)
    task = KeyValueRetrieval(tokenizer, keys=keys, num_keys=9, num_positions=3, chat_template=chat)
    split, prompts = task.split("test", 4), task.prompts("test", 4)
    assert split.protocol == ASKED_EVERYWHERE
    assert len({e.context_ids for e in split.examples}) == 4
    for example, prompt in zip(split.examples, prompts, strict=True):
        data = json.loads(prompt.text.split("JSON data:\n")[1].split("\n\nKey")[0])
        key = list(data)[prompt.position]
        assert (prompt.question, prompt.answers) == (key, (data[key],))
        assert (example.question, example.answers) == (key, (data[key],))
        whole = tokenizer.decode(example.context_ids + example.query_ids)
        assert whole == (f"<|bos|><|user|>{prompt.text}<|end|><|assistant|>" if chat else "<|bos|>" + prompt.text)
        shared = tokenizer.decode(example.context_ids)
        assert "JSON data:" in shared
        assert data[key] in tokenizer.decode(example.context_ids[slice(*example.gold_span)])
        assert shared.count('": "') == 9  # all of the object is shared
        assert len(example.query_ids) > 1


def test_a_file_keeps_the_public_protocol(file):
    """The gold pair moves, so that no two prompts share more than what stands before it."""
    split = KeyValueRetrieval(tiny_bpe(), data=file, num_positions=3).split("search", 3)
    assert split.protocol == GOLD_MOVES
    assert len({e.context_ids for e in split.examples}) == 9
    assert {len(e.query_ids) for e in split.examples} == {1}


@pytest.mark.parametrize("source", ["file", "generated"])
def test_shortened_prompts_fit_and_differ_from_the_long_ones(file, source):
    settings = {"data": file} if source == "file" else {"num_keys": 6}
    task = KeyValueRetrieval(tiny_bpe(), num_positions=3, **settings)
    split = task.split("search", 8)
    length = int(0.8 * split.max_tokens)
    short = task.shortened(length)
    assert short.split("search", 8).max_tokens <= length
    assert 3 <= short.num_items < 6
    check_disjoint([split, short.split("search", 8)])
    with pytest.raises(TaskError, match="length=20 tokens holds fewer pairs than 3 gold positions"):
        task.shortened(20)


def changed(**changes: object) -> dict:
    return {**record(0), **changes}


DAMAGED = {
    "not JSON": (["{"], "line 1: Invalid JSON"),
    "a list": (["[1]"], "line 1: Input should be an object"),
    "a field missing": ([record(0), {"key": "a"}], "line 2: ordered_kv_records is missing"),
    "pairs are no pairs": ([changed(ordered_kv_records=[["a"], ["b", "c"]])], r"line 1: ordered_kv_records\[0\]"),
    "a number": ([changed(ordered_kv_records=[["a", 1], ["b", "c"]])], r"records\[0\]\[1\]=1 must be a valid string"),
    "an empty value": ([changed(ordered_kv_records=[["a", ""], ["b", "c"]])], "at least 1 character"),
    "one pair": ([record(0, 1)], "line 1: ordered_kv_records.* at least 2 items"),
    "a key twice": ([changed(ordered_kv_records=[["a", "1"], ["a", "2"]])], "line 1: .* must have distinct keys"),
    "an unknown key": ([changed(key="x")], "line 1: ordered_kv_records must .* hold key='x'"),
    "a key that is no text": ([changed(key=["x"])], "line 1: key=.* must be a valid string"),
    "another value": ([changed(value="x")], "line 1: ordered_kv_records must .* with value='x'"),
    "another size": ([record(0), "", record(1, 5)], "line 3: a context of 5 items, expected 6 as in the first record."),
    "half a character": (['{"ordered_kv_records": [], "key": "\\ud800", "value": ""}'], "line 1: Invalid JSON"),
    "nothing": ([], "is empty, expected one JSON object a line"),
    "too few": ([record(0), record(1)], "has 2 records, 2 of them independent: too few, split 'search' would be empty"),
}


@pytest.mark.parametrize(("lines", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_records_are_named_by_file_and_line(lines, message, tmp_path):
    for name in ("kv.jsonl", "kv.jsonl.gz"):
        path = write(tmp_path / name, lines)
        with pytest.raises(TaskError, match=message) as caught:
            KeyValueRetrieval(tiny_bpe(), data=path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("kv.jsonl.gz", lambda raw: b"plain text", "cannot be read: Not a gzipped file"),
        ("kv.jsonl.gz", lambda raw: raw[:-20], "cannot be read: Compressed file ended"),
        ("kv.jsonl.gz", lambda raw: raw[:40] + b"\x00" * 40 + raw[80:], "cannot be read: "),
        ("kv.jsonl.gz", lambda raw: b"", "is empty"),
        ("kv.jsonl", lambda raw: b"\xff\xfe{}", "line 1: Invalid JSON"),
    ],
)
def test_damaged_files_are_named(name, damage, message, tmp_path):
    path = write(tmp_path / name, [record(i) for i in range(20)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TaskError, match=message) as caught:
        KeyValueRetrieval(tiny_bpe(), data=path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TaskError, match=r"no\.jsonl cannot be read: No such file"):
        KeyValueRetrieval(tiny_bpe(), data=tmp_path / "no.jsonl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "pass num_keys or length"),
        ({"num_keys": 1}, "num_keys=1 must be at least 2"),
        ({"num_keys": 9, "num_positions": 0}, "0 gold positions among 9 items"),
        ({"num_keys": 9, "keys": "hex"}, "keys='hex', expected one of uuid, words, syllables."),
        ({"length": 60}, "length=60 tokens holds fewer than 2 pairs"),
        ({"num_keys": 4}, "5 gold positions among 4 items"),
        ({"num_keys": 9, "chat_template": True}, "no chat template"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(TaskError, match=message):
        KeyValueRetrieval(tiny_bpe(), **settings)


def test_settings_that_a_file_excludes(file):
    with pytest.raises(TaskError, match="keys='uuid', expected nothing: data has keys of its own"):
        KeyValueRetrieval(tiny_bpe(), data=file, keys="uuid")
    with pytest.raises(TaskError, match=r"num_keys=7, but the records of .* have 6 pairs"):
        KeyValueRetrieval(tiny_bpe(), data=file, num_keys=7)
    with pytest.raises(TaskError, match="num_keys=4901 must be at most 4900"):
        KeyValueRetrieval(tiny_bpe(), num_keys=4901, keys="words")


def test_describe_is_plain_and_names_no_folder(file):
    described = KeyValueRetrieval(tiny_bpe(), data=file, num_positions=3).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["data"] == "kv.jsonl.gz"
    assert (described["num_keys"], described["positions"]) == (6, [0, 2, 5])


def test_a_split_may_be_asked_at_other_positions():
    task = KeyValueRetrieval(tiny_bpe(), num_keys=9, num_positions=3, keys="syllables", length=300)
    usual, dense = task.split("search", 2), task.split("search", 2, [0, 2, 4, 8])
    assert (dense.positions, len(dense.examples)) == ((0, 2, 4, 8), 8)
    for example in usual.examples:
        place = dense.positions.index(usual.positions[example.position])
        same = next(e for e in dense.examples if (e.group, e.position) == (example.group, place))
        assert same.prompt_ids == example.prompt_ids
        assert same.answers == example.answers
    for wrong in ([0, 9], [4, 2], [2, 2], []):
        with pytest.raises(TaskError, match="must be distinct, ascending and from 0 to 8"):
            task.split("search", 1, wrong)
