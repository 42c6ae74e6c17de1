"""Key-value retrieval at word level: which two words belong to this key?

The context lists pairs, `key value value ,` each; the query is `? key` and the answer the key's two values.
Asking one context for the key at every gold position gives examples that differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..checks import whole_number
from ..errors import TaskError
from .base import Example, Split, SplitName, check_length, check_request, check_seed, split_stream, spread_positions
from .encoding import check_tokenizer
from .prompts import Prompt, check_positions
from .words import NUM_KEYS, NUM_VALUES, key_words, value_words

SEPARATOR = ","
QUESTION = "?"

_Pair = tuple[int, int, int]
"""Numbers of a key and of its two values."""


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
        self.length = length = check_length(length)
        whole_number("num_positions", num_positions)
        if num_pairs is not None:
            whole_number("num_pairs", num_pairs, 1)
        check_seed(seed)
        check_tokenizer(tokenizer)
        self.seed = seed
        self.tokenizer = tokenizer
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
        examples = [
            self._example(pairs, gold, index, group)
            for group, pairs in enumerate(self._contexts(name, num_groups))
            for index, gold in enumerate(self.positions)
        ]
        return Split(name, self.seed, self.positions, tuple(examples))

    def prompts(self, split_name: SplitName, num_groups: int, positions: Sequence[int] | None = None) -> list[Prompt]:
        """Returns the prompts of a split as text that the tokenizer turns into exactly the examples' token ids.

        Args:
            split_name: which split.
            num_groups: independent contexts.
            positions: indices of the pairs that are asked for, other than the task's.

        Raises:
            TaskError: the split is unknown, a position is out of range, or no text gives these token ids.
        """
        wanted = self.positions if positions is None else tuple(positions)
        check_positions(wanted, self.num_pairs, "pair")
        return [
            self._prompt(pairs, gold, group)
            for group, pairs in enumerate(self._contexts(split_name, num_groups))
            for gold in wanted
        ]

    def _contexts(self, name: SplitName, num_groups: int) -> list[list[_Pair]]:
        """The numbers of the words of each context."""
        check_request(name, num_groups)
        rng = split_stream(self.seed, name)
        contexts = []
        for _ in range(num_groups):
            keys = rng.permutation(NUM_KEYS)[: self.num_pairs].tolist()
            values = _draw_evenly(rng, NUM_VALUES, 2 * self.num_pairs).reshape(-1, 2).tolist()
            contexts.append([(key, first, second) for key, (first, second) in zip(keys, values, strict=True)])
        return contexts

    def _example(self, pairs: Sequence[_Pair], gold: int, index: int, group: int) -> Example:
        context, answer = list(self._bos), self._value_ids(pairs[gold])
        span = (0, 0)
        for number, pair in enumerate(pairs):
            context += self._keys[pair[0]]
            if number == gold:
                span = (len(context), len(context) + len(answer))
            context += self._value_ids(pair) + self._separator
        query = self._question + self._keys[pairs[gold][0]]
        answers, key = (_value_text(pairs[gold]),), key_words()[pairs[gold][0]]
        return Example(tuple(context), tuple(query), tuple(answer), index, group, answers, span, question=key)

    def _value_ids(self, pair: _Pair) -> list[int]:
        return self._values[pair[1]] + self._values[pair[2]]

    def _prompt(self, pairs: Sequence[_Pair], gold: int, group: int) -> Prompt:
        names = key_words()
        key, answer = names[pairs[gold][0]], _value_text(pairs[gold])
        before = "".join(f"{names[pair[0]]} {_value_text(pair)} {SEPARATOR} " for pair in pairs[:gold]) + f"{key} "
        after = "".join(f" {SEPARATOR} {names[pair[0]]} {_value_text(pair)}" for pair in pairs[gold + 1 :])
        text = f"{before}{answer}{after} {SEPARATOR} {QUESTION} {key}"
        example = self._example(pairs, gold, 0, group)
        bos = self.tokenizer.bos_token or ""
        for start in ("", " ", bos, bos + " "):  # some tokenizers begin a word with its space, some texts with BOS
            if tuple(self.tokenizer(start + text)["input_ids"]) == example.context_ids + example.query_ids:
                begin = len(start + before)
                return Prompt(start + text, example.answers, gold, group, (begin, begin + len(answer)))
        raise TaskError(f"{self.name}: no text gives these token ids with this tokenizer; use kv_retrieval.")

    def shortened(self, length: int) -> KeyValueWords:
        """Returns the same task with prompts of at most `length` tokens.

        Raises:
            TaskError: the length has no room for the positions.
        """
        return KeyValueWords(self.tokenizer, length, num_positions=self._num_positions, seed=self.seed)

    def describe(self) -> dict[str, Any]:
        """Returns the task's settings, for a report."""
        return {
            "name": self.name,
            "length": self.length,
            "num_pairs": self.num_pairs,
            "positions": list(self.positions),
            "seed": self.seed,
        }


def _value_text(pair: _Pair) -> str:
    words = value_words()
    return f"{words[pair[1]]} {words[pair[2]]}"


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
