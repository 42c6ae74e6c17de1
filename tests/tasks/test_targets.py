"""Targets: what stands before an answer and by which tokens it is written, taken from what a model wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from tiny_tokenizer import tiny_bpe

from peft_layerrope import Example, Split
from peft_layerrope.tasks.metrics import Judge
from peft_layerrope.tasks.targets import MIN_SAMPLES, Target, Targets, common_opening, rendered, target_of

TOKENIZER = tiny_bpe()
JUDGE = Judge("contains_value", TOKENIZER)
PAIRS = [(f"{n:04x}-{n * 37:03x}", f"{n * 7919 % 65536:04x}-{n * 11:03x}") for n in range(1, 9)]
PLAIN, KEYED, SAID = ' "', '\n"{question}": "', 'The value of "{question}" in the object is "'


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def bytes_of(text: str) -> tuple[int, ...]:
    """The same text by tokens of one character, as no tokenizer writes it."""
    return tuple(i for letter in text for i in ids_of(letter))


def example(number: int, position: int = 0, group: int = 0) -> Example:
    key, value = PAIRS[number]
    context, query = ids_of('JSON data: {"key": "value"}'), ids_of(f'\n\nKey: "{key}"\nCorresponding value:')
    return Example(context, query, ids_of(f" {value}"), position, group, (value,), question=key)


def opened(opening: str, number: int) -> str:
    return opening.replace("{question}", PAIRS[number][0])


@pytest.mark.parametrize(
    ("written", "opening"),
    [
        (' "{v}" is it', ' "'),
        (" {v}", None),
        ("{v}", ""),
        (' "{k}": "{v}"}}', ' "{k}": "'),
        ("The value is\n{v}.", "The value is\n"),
        (" {v} {v}", None),  # the first one counts
    ],
)
@pytest.mark.parametrize("number", range(4))
def test_a_target_is_the_first_answer_and_what_stands_before_it(written, opening, number):
    key, value = PAIRS[number]
    ids = ids_of(written.format(k=key, v=value))
    found = target_of(ids, [value], JUDGE)
    assert ids[: len(found.opening_ids) + len(found.answer_ids)] == found.opening_ids + found.answer_ids
    answer = TOKENIZER.decode(found.answer_ids)
    assert value in answer
    assert value not in TOKENIZER.decode(found.answer_ids[1:])
    assert value not in TOKENIZER.decode(found.answer_ids[:-1])
    assert answer in (value, f" {value}")
    if opening is not None:
        assert TOKENIZER.decode(found.opening_ids) == opening.format(k=key)


def test_of_several_accepted_answers_the_first_that_is_written_counts():
    ids = ids_of(' "1234" or "5678"')
    for answers in (["5678", "1234"], ["1234", "5678"]):
        assert TOKENIZER.decode(target_of(ids, answers, JUDGE).answer_ids) == "1234"


@pytest.mark.parametrize("written", ["", ' "something else"', " "])
def test_a_wrong_answer_has_no_target(written):
    assert target_of(ids_of(written), [PAIRS[0][1]], JUDGE) is None


def learnt(texts: Sequence[str], encode=ids_of) -> Targets | None:
    """From the answers of as many examples."""
    examples = [example(number) for number in range(len(texts))]
    found = [target_of(encode(text), e.answers, JUDGE) for text, e in zip(texts, examples, strict=True)]
    return common_opening(examples, found, TOKENIZER)


@pytest.mark.parametrize("opening", [PLAIN, KEYED, "\n", "The value is: '"])
def test_an_opening_is_learnt_and_may_repeat_what_was_asked(opening):
    found = learnt([opened(opening, n) + PAIRS[n][1] for n in range(5)])
    assert (found.opening, found.own, found.num_samples, found.num_agreeing) == (opening, {}, 5, 5)


@pytest.mark.parametrize("opening", [PLAIN, KEYED])
def test_too_few_right_answers_teach_nothing(opening):
    right = [opened(opening, n) + PAIRS[n][1] for n in range(MIN_SAMPLES)]
    wrong = [" no idea"] * 5
    assert learnt(right[:-1] + wrong) is None
    assert learnt(right + wrong).num_samples == MIN_SAMPLES


def test_answers_of_other_tokens_than_a_tokenizer_writes_teach_nothing():
    texts = [PLAIN + PAIRS[n][1] for n in range(6)]
    assert bytes_of(texts[0]) != ids_of(texts[0])
    assert learnt(texts, bytes_of) is None

    def mixed(share: int):
        return lambda text: ids_of(text) if text in texts[:share] else bytes_of(text)

    assert learnt(texts, mixed(2)) is None
    found = learnt(texts, mixed(3))
    assert (found.opening, found.num_samples, found.num_agreeing) == (PLAIN, 6, 3)


def test_openings_of_which_none_is_common_teach_nothing():
    assert learnt([f"{'x' * n}: {PAIRS[n][1]}" for n in range(1, 7)][:6]) is None
    mostly = learnt([opened(PLAIN if n else KEYED, n) + PAIRS[n][1] for n in range(4)])
    assert (mostly.opening, mostly.num_samples, mostly.num_agreeing, mostly.others) == (PLAIN, 4, 3, (KEYED,))


def test_an_example_is_opened_as_its_answer_is():
    """By the longest known opening that it begins with, or where it is wrong in the middle by its own beginning."""
    alone = replace(split_of(), positions=(0,), examples=(example(0),))
    [asked] = Targets(KEYED, others=("", "The ")).applied(alone, TOKENIZER).examples
    value = PAIRS[0][1]
    for opening in (KEYED, "", "The "):
        target = rendered(opening, example(0), TOKENIZER)
        written = ids_of(opened(opening, 0) + value)
        assert asked.opened_as(written) == replace(asked, **target._asdict())
    keyed = ids_of(opened(KEYED, 0))
    assert asked.opened_as(keyed[: len(keyed) // 2]) is None
    assert asked.opened_as(ids_of('"' + value)) == replace(asked, **rendered("", example(0), TOKENIZER)._asdict())
    [said] = Targets(SAID).applied(alone, TOKENIZER).examples
    wrong = ids_of('The value of "another" in the object is "' + value)
    start = len(wrong) - len(said.answer_ids)
    assert said.opened_as(wrong) == replace(said, opening_ids=wrong[:start])
    assert said.opened_as(ids_of(value)) is None
    [only] = Targets(KEYED).applied(alone, TOKENIZER).examples
    assert only.opened_as(ids_of(value)) is None


@pytest.mark.parametrize("opening", [PLAIN, KEYED, "", " "])
@pytest.mark.parametrize("number", range(4))
def test_what_is_rendered_follows_the_prompt_as_text(opening, number):
    tokenizer = TOKENIZER
    key, value = PAIRS[number]
    text = f'{{"{key}": "{value}"}}\n\nKey: "{key}"\nCorresponding value:'
    ids = tuple(tokenizer(text)["input_ids"])
    asked = Example(ids[:-2], ids[-2:], (1,), 0, 0, (value, "another"), question=key)
    target = rendered(opening, asked, tokenizer)
    assert target.answer_ids
    written = opened(opening, number)
    assert tokenizer.decode(target.opening_ids + target.answer_ids) == written + value
    assert value.endswith(tokenizer.decode(target.answer_ids)[-1])
    assert (*ids, *target.opening_ids, *target.answer_ids) == tuple(tokenizer(text + written + value)["input_ids"])
    assert tokenizer.decode(target.answer_ids).strip() == value


def test_an_opening_that_a_tokenizer_merges_with_the_prompt_is_not_learnt():
    """A model cannot write it so: it goes on after the prompt's last token."""
    tokenizer = tiny_bpe(across_words=True)
    examples, found = [], []
    for key, value in PAIRS:
        ids = tuple(tokenizer(f'Key: "{key}"\nCorresponding value:')["input_ids"])
        examples.append(Example(ids[:-2], ids[-2:], (1,), 0, 0, (value,), question=key))
        written = tokenizer(PLAIN + value, add_special_tokens=False)["input_ids"]
        found.append(target_of(written, [value], Judge("contains_value", tokenizer)))
    assert None not in found
    assert common_opening(examples, found, tokenizer) is None


def test_what_is_rendered_is_what_the_model_wrote():
    for number in range(len(PAIRS)):
        for opening in (PLAIN, KEYED):
            written = ids_of(opened(opening, number) + PAIRS[number][1] + '"')
            assert rendered(opening, example(number), TOKENIZER) == target_of(written, [PAIRS[number][1]], JUDGE)


@pytest.mark.parametrize(
    "targets",
    [
        Targets(),
        Targets(KEYED, num_samples=9, num_agreeing=7, others=("", PLAIN)),
        Targets(None, {"who?": Target((1, 2), (3,)), "wo?": Target((), (4, 5))}, 5, 2),
    ],
)
def test_targets_survive_json(targets):
    again = Targets.from_plain(json.loads(json.dumps(targets.to_plain())))
    assert again == targets
    assert all(isinstance(target, Target) for target in again.own.values())
    assert again.describe() == targets.describe()


def split_of() -> Split:
    examples = tuple(example(3 * group + position, position, group) for group in range(2) for position in range(3))
    return Split("search", 0, (0, 1, 2), examples, judge=JUDGE)


@pytest.mark.parametrize("opening", [PLAIN, KEYED])
def test_a_common_opening_is_applied_to_every_example(opening):
    split = split_of()
    targets = Targets(opening, num_samples=4, num_agreeing=4)
    applied = targets.applied(split, TOKENIZER)
    for number, (before, after) in enumerate(zip(split.examples, applied.examples, strict=True)):
        assert after.prompt_ids == before.prompt_ids
        assert TOKENIZER.decode(after.opening_ids) == opened(opening, number)
        assert TOKENIZER.decode(after.answer_ids) == PAIRS[number][1]
        assert replace(after, opening_ids=(), answer_ids=before.answer_ids) == before
    assert applied.targets == targets.describe()
    assert applied.describe()["targets"]["opening"] == opening
    assert applied.fingerprint() != split.fingerprint()


def test_a_questions_own_target_comes_first_and_what_has_none_keeps_its_answer():
    split, own = split_of(), {PAIRS[2][0]: Target((7, 8), (9,))}
    applied = Targets(None, own, 3, 1).applied(split, TOKENIZER)
    for number, (before, after) in enumerate(zip(split.examples, applied.examples, strict=True)):
        if number == 2:
            assert (after.opening_ids, after.answer_ids) == ((), (7, 8, 9))  # scored together
        else:
            assert after == before
    both = Targets(PLAIN, own, 3, 1).applied(split, TOKENIZER)
    assert both.examples[2] == applied.examples[2]
    assert both.examples[1] == Targets(PLAIN).applied(split, TOKENIZER).examples[1] != split.examples[1]


def test_the_description_holds_no_text_of_questions_and_tells_targets_apart():
    own = {"a secret question": Target((1,), (2,))}
    described = Targets(None, own, 3, 1).describe()
    assert "secret" not in json.dumps(described)
    assert described["opening"].startswith("each question's own")
    others = [
        Targets(None, {"a secret question": Target((1,), (3,))}, 3, 1),
        Targets(None, {"b": own.popitem()[1]}, 3, 1),
    ]
    assert len({described["hash"], *(o.describe()["hash"] for o in others)}) == 3
