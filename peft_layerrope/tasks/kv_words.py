"""Key-value retrieval at word level: which two words belong to this key?

The context lists pairs, `key value value ,` each; the query is `? key` and the answer the key's two values.
Asking one context for the key at every gold position gives examples that differ in nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import TaskError
from .base import SPLIT_NAMES, Example, Split, SplitName, spread_positions
from .words import NUM_KEYS, NUM_VALUES, key_words, value_words

SEPARATOR = ","
QUESTION = "?"


class KeyValueWords:
    """Seeded key-value retrieval that fills a prompt of a given length.

    Args:
        tokenizer: any transformers tokenizer; the pieces are encoded without special tokens, after its BOS
            token if it has one.
        length: longest prompt with its answer, in tokens.
        num_positions: gold positions, spread evenly from the first pair to the last.
        seed: base seed. Each split draws from a generator of its own.
        num_pairs: pairs per context; default: as many as fit into `length`.

    Raises:
        TaskError: the length has no room for the positions, or asks for more pairs than there are keys.
    """

    name = "kv_words"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        *,
        num_positions: int = 11,
        seed: int = 0,
        num_pairs: int | None = None,
    ) -> None:
        self.length = length
        self.seed = seed
        self._tokenizer = tokenizer
        self._num_positions = num_positions
        self._bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._keys = [_encode(tokenizer, word) for word in key_words()]
        self._values = [_encode(tokenizer, word) for word in value_words()]
        self._separator = _encode(tokenizer, SEPARATOR)
        self._question = _encode(tokenizer, QUESTION)
        # No prompt can be longer than one whose every word has the most tokens: checked before any work.
        key, value = max(map(len, self._keys)), max(map(len, self._values))
        pair = key + 2 * value + len(self._separator)
        overhead = len(self._bos) + len(self._question) + key + 2 * value
        fitting = min((length - overhead) // pair, NUM_KEYS)
        if num_pairs is None:
            num_pairs = fitting
        elif num_pairs > NUM_KEYS:
            raise TaskError(f"num_pairs={num_pairs}, but the task has {NUM_KEYS} distinct keys.")
        elif num_pairs > fitting:
            raise TaskError(
                f"{num_pairs} pairs need up to {overhead + num_pairs * pair} tokens, more than length={length}."
            )
        if num_pairs < num_positions:
            raise TaskError(
                f"length={length} tokens holds {max(num_pairs, 0)} pairs, fewer than {num_positions} gold positions."
            )
        self.num_pairs = num_pairs
        self.positions = spread_positions(num_pairs, num_positions)

    def split(self, name: SplitName, num_groups: int) -> Split:
        """Returns `num_groups` contexts of the named split, each asked at every gold position.

        Raises:
            TaskError: the split is unknown, or `num_groups` is below 1.
        """
        if name not in SPLIT_NAMES:
            raise TaskError(f"split {name!r} is unknown, expected one of {', '.join(SPLIT_NAMES)}.")
        if num_groups < 1:
            raise TaskError(f"num_groups={num_groups} must be at least 1.")
        # Spawned children of one SeedSequence: independent streams, told apart by the split's number.
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, SPLIT_NAMES.index(name)]))
        examples = [example for group in range(num_groups) for example in self._group(rng, group)]
        return Split(name, self.seed, self.positions, tuple(examples))

    def _group(self, rng: np.random.Generator, group: int) -> list[Example]:
        keys = rng.permutation(NUM_KEYS)[: self.num_pairs]
        values = _draw_evenly(rng, NUM_VALUES, 2 * self.num_pairs).reshape(-1, 2)
        answers = [self._values[a] + self._values[b] for a, b in values]
        context = list(self._bos)
        for key, answer in zip(keys, answers, strict=True):
            context += self._keys[key] + answer + self._separator
        context_ids = tuple(context)
        return [
            Example(context_ids, tuple(self._question + self._keys[keys[gold]]), tuple(answers[gold]), index, group)
            for index, gold in enumerate(self.positions)
        ]

    def shortened(self, length: int) -> KeyValueWords:
        """Returns the same task with prompts of at most `length` tokens.

        Raises:
            TaskError: the length has no room for the positions.
        """
        return KeyValueWords(self._tokenizer, length, num_positions=self._num_positions, seed=self.seed)

    def describe(self) -> dict[str, Any]:
        """Returns the task's settings, for a report."""
        return {
            "name": self.name,
            "length": self.length,
            "num_pairs": self.num_pairs,
            "positions": list(self.positions),
            "seed": self.seed,
        }


def _draw_evenly(rng: np.random.Generator, population: int, count: int) -> np.ndarray:
    """Draws without replacement, starting over once everything is drawn: no value word stands twice in a context
    of up to 128 pairs, so that the second word of an answer is not ambiguous given the first.
    """
    rounds = -(-count // population)
    return np.concatenate([rng.permutation(population) for _ in range(rounds)])[:count]


def _encode(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    """Encodes a word as it stands inside a line, after a space."""
    ids = tokenizer.encode(" " + word, add_special_tokens=False)
    if not ids or tokenizer.unk_token_id in ids:
        raise TaskError(f"the tokenizer cannot encode the word {word!r}.")
    return ids
