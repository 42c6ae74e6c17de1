"""Splits: complete, seeded, disjoint; answers really stand where the examples say."""

from __future__ import annotations

import pytest
from tiny_tokenizer import tiny_bpe

from peft_layerrope import Example, KeyValueWords, Split, Task, TaskError, TokenTask
from peft_layerrope.tasks.base import SPLIT_NAMES, check_disjoint, spread_positions
from peft_layerrope.tasks.kv import NUM_KEYS, NUM_VALUES, key_words, value_words

TOO_FEW = "of 256 pairs, too few for num_pairs or gold positions"


def token_examples(groups: int, positions: int = 3) -> list[Example]:
    return [
        Example((100 * g + 5, 100 * g + 6), (7, i), (8, i), position=i, group=g)
        for g in range(groups)
        for i in range(positions)
    ]


def test_words_are_distinct_and_disjoint():
    keys, values = key_words(), value_words()
    assert (len(set(keys)), len(set(values))) == (NUM_KEYS, NUM_VALUES)
    assert not set(keys) & set(values)


@pytest.mark.parametrize("length", [128, 256, 512, 1024])
def test_kv_prompts_fill_the_length_and_hold_the_answer_where_they_say(demo_tokenizer, length):
    task = KeyValueWords(demo_tokenizer, length, num_positions=5)
    split = task.split("search", 3)
    assert length - 4 < split.max_tokens <= length
    for example in split.examples:
        words = demo_tokenizer.decode(example.context_ids).split()[1:]  # after [BOS]
        pairs = [words[i : i + 4] for i in range(0, len(words), 4)]
        question = demo_tokenizer.decode(example.query_ids).split()
        gold = pairs[task.positions[example.position]]
        assert question == ["?", gold[0]]
        assert demo_tokenizer.decode(example.answer_ids).split() == gold[1:3]
        assert len({pair[0] for pair in pairs}) == len(pairs) == task.num_pairs


@pytest.mark.parametrize(("length", "times"), [(512, 1), (1024, 2)])
def test_a_value_word_stands_as_seldom_as_it_can(demo_tokenizer, length, times):
    example = KeyValueWords(demo_tokenizer, length).split("test", 1).examples[0]
    words = demo_tokenizer.decode(example.context_ids).split()
    counts = [words.count(value) for value in value_words()]
    assert max(counts) == times


def test_kv_examples_say_where_the_answer_stands_and_how_it_is_written(demo_tokenizer):
    split = KeyValueWords(demo_tokenizer, 128, num_positions=5).split("test", 3)
    for example in split.examples:
        assert example.context_ids[slice(*example.gold_span)] == example.answer_ids
        assert example.answers == (demo_tokenizer.decode(example.answer_ids),)


@pytest.mark.parametrize("tokenizer", ["demo", "bpe"])
def test_kv_prompts_are_tokenised_into_exactly_the_examples(demo_tokenizer, tokenizer):
    tokenizer = demo_tokenizer if tokenizer == "demo" else tiny_bpe()
    task = KeyValueWords(tokenizer, 300, num_positions=3)
    examples, prompts = task.split("test", 3).examples, task.prompts("test", 3)
    for example, prompt in zip(examples, prompts, strict=True):
        assert tokenizer(prompt.text)["input_ids"] == [*example.context_ids, *example.query_ids]
        assert (prompt.position, prompt.group) == (task.positions[example.position], example.group)
        assert prompt.answers == example.answers == (prompt.text[slice(*prompt.gold)],)
        assert prompt.text.endswith(f", ? {prompt.text[: prompt.gold[0]].split()[-1]}")
    other = task.prompts("test", 3, [1])
    assert [p.text.split(" ? ")[0] for p in other] == [p.text.split(" ? ")[0] for p in prompts[::3]]
    with pytest.raises(TaskError, match=r"gold positions \(99,\) must be"):
        task.prompts("test", 1, [99])


def test_kv_prompts_that_no_text_gives_are_refused(demo_tokenizer):
    task = KeyValueWords(demo_tokenizer, 64, num_positions=3)
    task.tokenizer = lambda text: {"input_ids": [0]}
    task.tokenizer.decode = demo_tokenizer.decode
    with pytest.raises(TaskError, match="kv_words: no text gives these token ids"):
        task.prompts("test", 1)


def test_kv_prompt_reads_as_text(demo_tokenizer):
    example = KeyValueWords(demo_tokenizer, 64, num_positions=3).split("search", 1).examples[0]
    text = demo_tokenizer.decode(example.context_ids + example.query_ids)
    assert demo_tokenizer(text.removeprefix("[BOS]"))["input_ids"] == [*example.context_ids, *example.query_ids]


def test_splits_are_seeded_and_disjoint(demo_tokenizer):
    def splits(seed: int) -> list[Split]:
        task = KeyValueWords(demo_tokenizer, 128, num_positions=3, seed=seed)
        return [task.split(name, 20) for name in SPLIT_NAMES]

    first, again, other = splits(0), splits(0), splits(1)
    assert first == again
    assert [s.fingerprint() for s in first] == [s.fingerprint() for s in again]
    check_disjoint([*first, *other])  # raises if any two share a context


def test_a_larger_split_begins_with_the_smaller(demo_tokenizer):
    task = KeyValueWords(demo_tokenizer, 128, num_positions=3)
    assert task.split("test", 9).examples[: 3 * 4] == task.split("test", 4).examples


def test_overlapping_splits_are_refused():
    split = Split("search", 0, (0, 1, 2), tuple(token_examples(2)))
    other = Split("test", 0, (0, 1, 2), tuple(token_examples(1)))
    with pytest.raises(TaskError, match="splits 'search' and 'test' share 1 contexts"):
        check_disjoint([split, other])


def test_incomplete_groups_are_refused():
    with pytest.raises(TaskError, match=r"group 1 has position indices \[0, 1\], expected one example for each of"):
        Split("search", 0, (0, 1, 2), tuple(token_examples(2)[:-1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 30}, f"length=30 tokens holds 6 {TOO_FEW}, 11 were asked for."),
        ({"length": 64, "num_pairs": 20}, f"length=64 tokens holds 14 {TOO_FEW}, 20 were asked for."),
        (
            {"length": 4096, "num_pairs": 500},
            f"length=4096 tokens holds 256 {TOO_FEW}, 500 were asked for.",
        ),
        (
            {"length": 64, "num_positions": 2},
            "2 gold positions among 14 items: expected 3 (first, middle, last) to 14.",
        ),
    ],
)
def test_kv_settings_that_cannot_work(demo_tokenizer, arguments, message):
    with pytest.raises(TaskError) as caught:
        KeyValueWords(demo_tokenizer, **arguments)
    assert str(caught.value) == message


def test_spread_positions_are_the_published_ones():
    assert spread_positions(75, 5) == (0, 18, 37, 55, 74)
    assert spread_positions(140, 5) == (0, 34, 69, 104, 139)
    assert spread_positions(3, 3) == (0, 1, 2)


def test_token_task_splits_whole_groups():
    task = TokenTask(token_examples(10), positions=(0, 18, 37), seed=3)
    assert isinstance(task, Task)
    sizes = {name: len(task._groups[name]) for name in SPLIT_NAMES}
    assert sizes == {"search": 4, "validation": 2, "test": 4}
    check_disjoint([task.split(name, size) for name, size in sizes.items()])
    assert task.split("test", 2).positions == (0, 18, 37)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenTask([]), "token_task has 0 records"),
        (
            lambda: TokenTask(token_examples(2)),
            "2 records, 2 of them independent: too few",
        ),
        (lambda: TokenTask(token_examples(10)).split("test", 5), "split 'test' has 4 groups, 5 were asked for."),
        (lambda: TokenTask(token_examples(10)).split("train", 1), "split 'train' is unknown"),
        (lambda: TokenTask(token_examples(10), fractions=(0.9, 0.2, 0.1)), "split 'test' would be empty"),
    ],
)
def test_token_task_errors(make, message):
    with pytest.raises(TaskError, match=message):
        make()
