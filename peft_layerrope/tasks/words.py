"""The words that the word-level key-value task draws from: pronounceable, distinct, the same on every machine."""

from __future__ import annotations

from itertools import product

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"

NUM_KEYS = 256
NUM_VALUES = 256


def key_words() -> list[str]:
    """Returns the 256 keys: two consonant-vowel syllables each ("baba", "bake", ...)."""
    syllables = [c + v for c, v in product(_CONSONANTS, _VOWELS)]
    return _evenly([first + second for first, second in product(syllables, syllables)], NUM_KEYS)


def value_words() -> list[str]:
    """Returns the 256 values: consonant-vowel-consonant ("bab", "bad", ...)."""
    return _evenly([a + v + b for a, v, b in product(_CONSONANTS, _VOWELS, _CONSONANTS)], NUM_VALUES)


def _evenly(words: list[str], count: int) -> list[str]:
    return [words[i * len(words) // count] for i in range(count)]
