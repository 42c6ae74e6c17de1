"""The words that the key-value tasks draw from: pronounceable, distinct, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"

NUM_KEYS = 256
NUM_VALUES = 256
MAX_KEYS = (len(_CONSONANTS) * len(_VOWELS)) ** 2


@cache
def key_words(count: int = NUM_KEYS) -> tuple[str, ...]:
    """Returns `count` keys, up to `MAX_KEYS`: two consonant-vowel syllables each ("baba", "bake", ...)."""
    syllables = [c + v for c, v in product(_CONSONANTS, _VOWELS)]
    return _evenly([first + second for first, second in product(syllables, syllables)], count)


@cache
def value_words() -> tuple[str, ...]:
    """Returns the 256 values: consonant-vowel-consonant ("bab", "bad", ...)."""
    return _evenly(all_syllables(), NUM_VALUES)


@cache
def all_syllables() -> tuple[str, ...]:
    """Returns all 980 syllables of three letters: consonant-vowel-consonant."""
    return tuple(a + v + b for a, v, b in product(_CONSONANTS, _VOWELS, _CONSONANTS))


def _evenly(words: Sequence[str], count: int) -> tuple[str, ...]:
    return tuple(words[i * len(words) // count] for i in range(count))
