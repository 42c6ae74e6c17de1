"""The public metrics, on text that trips them up, and beside a normalisation written another way."""

from __future__ import annotations

import random
import unicodedata

import pytest

from peft_layerrope import best_subspan_em
from peft_layerrope.tasks import METRICS, contains_value
from peft_layerrope.tasks.metrics import normalised


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
    assert METRICS["best_subspan_em"] is best_subspan_em
    assert METRICS["contains_value"] is contains_value


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
        assert normalised(text) == reference(text), repr(text)
