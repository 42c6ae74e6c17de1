"""The public metrics, on text that trips them up, and beside a normalisation written another way."""

from __future__ import annotations

import random
import unicodedata

import pytest
from tiny_tokenizer import tiny_bpe

from peft_layerrope import TaskError, best_subspan_em
from peft_layerrope.tasks.metrics import METRICS, Judge, contains_value, first_value, normalized


@pytest.mark.parametrize(
    ("prediction", "answers", "right"),
    [
        ("It was Wilhelm Conrad Röntgen.", ["Wilhelm Conrad Röntgen"], True),
        ("the  theatre\tof the absurd", ["A Theatre of Absurd"], True),
        ("the heat", ["eat"], True),  # a substring, not a word
        ("Paris\nLondon", ["London"], False),
        ("\nLondon", ["London"], False),
        ("Paris", ["London", "paris"], True),
        ("Paris", [], False),
        ("", ["Paris"], False),
        ("U.S.A.", ["USA"], True),
        ("at 5 a.m. sharp", ["5 am sharp"], True),  # punctuation goes before articles
        ("don't", ["dont"], True),
        ("don’t", ["dont"], False),  # a curly quote is no ASCII punctuation
        ("“Heat”", ['"Heat"'], True),
        ("wow！", ["wow!"], True),
        ("wow!", ["wow！"], False),
        ("ＡＢＣ", ["ａｂｃ"], True),
        ("ABC", ["ＡＢＣ"], False),
        ("caf\u00e9", ["cafe\u0301"], False),  # composed and decomposed are told apart, as in the public metric
        ("a\u0301 b", ["b a\u0301"], False),
        ("in a\u0301 b", ["a\u0301 b"], True),
        ("Straße", ["STRASSE"], False),
        ("STRAßE", ["straße"], True),
        ("ısparta", ["Isparta"], False),
        ("İzmir", ["i\u0307zmir"], True),
        ("anything", ["The", "?", "", " a "], False),  # nothing is left of these
        ("anything", ["The", "thing"], True),
        ("1,000", ["1000"], True),
        ("a_b", ["ab"], True),
    ],
)
def test_best_subspan_em(prediction, answers, right):
    assert best_subspan_em(prediction, answers) is right


@pytest.mark.parametrize(
    ("prediction", "answers", "right"),
    [
        (' "D1FF29BE-4e2a".\nKey:', ["d1ff29be-4E2A"], True),
        ("first\nsecond", ["second"], True),  # unlike best_subspan_em it reads on
        ("d1ff29be", ["d1ff29be-4e2a"], False),
        ("the bab dad", ["dad bab"], False),
        ("anything", [""], False),
        ("anything", [], False),
    ],
)
def test_contains_value(prediction, answers, right):
    assert contains_value(prediction, answers) is right


def test_metrics_by_name():
    assert {name: metric.is_right for name, metric in METRICS.items()} == {
        "best_subspan_em": best_subspan_em,
        "contains_value": contains_value,
    }
    assert METRICS["contains_value"].is_strictly_right is first_value
    assert METRICS["best_subspan_em"].is_strictly_right is None


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        (' "v1-b"', True),
        (" v1-b", True),
        (' "v1-b', True),  # the quote may still be open
        ('"V1-B", "v0-a"', True),  # what comes afterwards does not count
        ('"k1": "v1-b"', True),  # the key that was asked for may stand before it
        ('The value of "K1" is "v1-b".', True),
        ('"k1": "k1": "v1-b"', True),
        ('{"k0": "v0-a",\n "k1": "v1-b",\n "k2": "v2-c"}', False),  # the object, recited
        ('"v0-a", "v1-b"', False),
        ('"k0": "v1-b"', True),  # a wrong key, and no other value
        ('The value of "k0" in the object is "v1-b".', True),
        ('"v0-a" is not\nThis is "v1-b"', False),
        ('"v0-a" and "v1-b"', False),
        ('"v0-a", v1-b', False),
        ('"k1": "v0-a"', False),
        ('"k1": "v0-a" or rather "v1-b"', False),
        ("", False),
        ("no idea", False),
    ],
)
def test_first_value(prediction, right):
    assert first_value(prediction, ["v1-b"], "k1") is right
    assert contains_value(prediction, ["v1-b"]) is ("v1-b" in prediction.lower())


def test_first_value_takes_the_first_of_several_accepted_ones():
    assert first_value('"b" "a"', ["a", "b"], "k") is True
    assert first_value('"c" "a"', ["a", "b"], "k") is False
    assert first_value('"a"', ["", "a"], "k") is True
    with pytest.raises(TaskError, match="must be a list of texts"):
        first_value("a", "a", "k")


@pytest.mark.parametrize(
    ("metric", "text", "over"),
    [
        ("best_subspan_em", "", False),
        ("best_subspan_em", "Paris", False),
        ("best_subspan_em", "Paris\n", True),
        ("best_subspan_em", "\nParis", True),
        ("contains_value", "", False),
        ("contains_value", "no\nidea\n", False),
    ],
)
def test_a_text_is_over_where_nothing_can_make_it_right(metric, text, over):
    assert METRICS[metric].is_over(text) is over
    assert METRICS[metric].is_right(f"{text} v1-b", ["v1-b"]) is not over  # what is written next counts, or does not


@pytest.mark.parametrize("metric", METRICS)
def test_an_answer_is_settled_once_and_for_all(metric):
    rng = random.Random(0)
    judge = Judge(metric, tiny_bpe())
    seen = set()
    for _ in range(300):
        text = "".join(rng.choices(["a ", "the ", "b", "c", " ", "\n", '"', "B", "an"], k=12))
        verdicts = [judge.is_right(text[:stop], ["b c"]) for stop in range(len(text) + 1)]
        settled = [judge.is_settled(text[:stop], ["b c"]) for stop in range(len(text) + 1)]
        first = settled.index(True) if True in settled else len(text)
        assert len(set(verdicts[first:])) == 1
        assert all(settled[first:]) or first == len(text)
        seen.add(verdicts[-1])
    assert seen == {True, False}


def reference(text: str) -> str:
    """Character by character: what is ASCII and neither letter, digit nor space is left out, then words are read off
    as runs of letters, marks and digits, and articles among them are dropped.
    """
    kept = [c for c in text.lower() if not (c.isascii() and c.isprintable() and not c.isalnum() and c != " ")]
    pieces, word = [], ""
    for c in [*kept, " "]:
        if unicodedata.category(c)[0] in "LMN":
            word += c
            continue
        pieces += [" " if word in ("a", "an", "the") else word, c]
        word = ""
    return " ".join("".join(pieces).split())


@pytest.mark.parametrize("seed", range(20))
def test_normalisation_agrees_with_another_one(seed):
    rng = random.Random(seed)
    parts = ["a", "an", "the", "A", "The", "x", "é", "e\u0301", "\u0301", "ß", "İ", "ı", "Ａ", "，", "“", "’", "—", "1"]
    parts += [" ", " ", "\t", "\u00a0", "\u3000", ".", "_", "-", "'", "漢", "क्षि", "٣", "Σ", "ς"]
    for _ in range(200):
        text = "".join(rng.choices(parts, k=rng.randint(0, 12)))
        assert normalized(text) == reference(text), repr(text)
