"""The words that the word-level key-value task draws from: pronounceable, distinct, the same on every machine."""

from __future__ import annotations

from itertools import product

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"

NUM_KEYS = 384
NUM_VALUES = 120


def key_words() -> list[str]:
    """Returns the 384 keys: two consonant-vowel syllables each ("baba", "babe", ...), evenly thinned."""
    syllables = [c + v for c, v in product(_CONSONANTS, _VOWELS)]
    every = [first + second for first, second in product(syllables, syllables)]
    return every[:: len(every) // NUM_KEYS][:NUM_KEYS]


def value_words() -> list[str]:
    """Returns the 120 values: consonant-vowel-consonant ("bab", ...), evenly thinned."""
    every = [a + v + b for a, v, b in product(_CONSONANTS, _VOWELS, _CONSONANTS)]
    return every[:: len(every) // NUM_VALUES][:NUM_VALUES]
