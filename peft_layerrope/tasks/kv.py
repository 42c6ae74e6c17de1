"""Key-value retrieval: the public task and its generated kinds, and a task of single words for small models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import TaskError
from ..messages import whole_number
from .base import (
    MAX_LENGTH,
    SPLIT_NAMES,
    Example,
    Split,
    SplitName,
    check_length,
    check_request,
    check_seed,
    split_stream,
    spread_positions,
)
from .prompts import (
    ASKED_EVERYWHERE,
    GOLD_MOVES,
    Prompt,
    PromptEncoder,
    PromptTask,
    check_positions,
    check_tokenizer,
    cut_into_splits,
    data_path,
    read_records,
)

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


DEFAULT_NUM_POSITIONS = 5
KEY_STYLES = ("uuid", "words", "syllables")

_BEFORE = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
_AFTER = '\n\nKey: "{key}"\nCorresponding value:'
_FIELDS = ("ordered_kv_records", "key", "value")
_SAMPLES = 4  # contexts by which it is measured how many pairs fit
_MARGIN = 6  # standard deviations of a context's length that are left free


@dataclass(frozen=True)
class KeyValueRecord:
    """The pairs of one context, in order, and which of them is asked for."""

    pairs: tuple[tuple[str, str], ...]
    gold: int

    def cut(self, num_keys: int) -> KeyValueRecord:
        """Returns the record with its gold pair and the first `num_keys - 1` others."""
        others = [pair for i, pair in enumerate(self.pairs) if i != self.gold][: num_keys - 1]
        return KeyValueRecord((self.pairs[self.gold], *others), 0)

    def moved(self, position: int) -> KeyValueRecord:
        """Returns the record with its gold pair at `position`, the others in their order."""
        pairs = list(self.pairs)
        pairs.insert(position, pairs.pop(self.gold))
        return KeyValueRecord(tuple(pairs), position)

    def prompt(self, group: int = 0) -> Prompt:
        """Returns the prompt that asks for the gold pair where it stands."""
        key, value = self.pairs[self.gold]
        lines = [f'"{k}": "{v}"' for k, v in self.pairs]
        before = _BEFORE + "{" + ",\n ".join([*lines[: self.gold], f'"{key}": "'])
        text = _BEFORE + "{" + ",\n ".join(lines) + "}" + _AFTER.format(key=key)
        return Prompt(text, (value,), self.gold, group, (len(before), len(before) + len(value)), key)


class KeyValueRetrieval(PromptTask[KeyValueRecord]):
    """The key-value retrieval of "Lost in the Middle", from a public file or generated.

    A record of a file is `{"ordered_kv_records": [[k, v], ...], "key": ..., "value": ...}`. Its gold pair is taken out
    and put in again at each gold position; a generated context stays as it is, and is asked for the pair that stands
    there. A file's records are shuffled by the seed and cut 0.4/0.2/0.4 into search, validation and test split;
    generated ones are drawn from an independent stream for each split.

    Args:
        tokenizer: any transformers tokenizer.
        data: JSON lines, plain or gzipped; None: generated.
        num_keys: pairs of a context. Default: as in the file (a smaller number keeps the gold pair and the first
            others); generated: as many as fit into `length`, measured with the tokenizer.
        length: the most tokens that a prompt with its answer may have; None: no limit.
        keys: generated keys and values: `"uuid"` (the default); `"words"`, short ones with values of two words; or
            `"syllables"`, both of two syllables, consonant, vowel, consonant each.
        num_positions: gold positions, spread evenly from the first pair to the last; default: 5.
        positions: the gold positions themselves, instead.
        seed: base seed.
        chat_template: put prompts into the tokenizer's chat template; None: where it has one.
        chat_template_args: variables of the template, such as `{"enable_thinking": False}`.
        system_prompt: a message of the system before the prompt.
        chat_date: `YYYY-MM-DD`, what the template writes as today's date; None: today.
        max_new_tokens: tokens that a written answer may have; default: 100.

    Raises:
        TaskError: the file holds something else, settings that exclude each other, or positions that a context does
            not have.

    Example:
    ```py
    >>> task = KeyValueRetrieval(tokenizer, data="kv-retrieval-75_keys.jsonl.gz")
    >>> task.positions
    (0, 18, 37, 55, 74)
    ```
    """

    name = "kv_retrieval"
    metric = "contains_value"
    item = "pair"
    size_setting = "num_keys"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        data: str | Path | None = None,
        num_keys: int | None = None,
        length: int | None = None,
        keys: Literal["uuid", "words", "syllables"] | None = None,
        num_positions: int | None = None,
        positions: Sequence[int] | None = None,
        seed: int = 0,
        chat_template: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        chat_date: str | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        if keys is not None and (data is not None or keys not in KEY_STYLES):
            known = f"one of {', '.join(KEY_STYLES)}"
            raise TaskError(
                f"keys={keys!r}, expected {known if data is None else 'nothing: data has keys of its own'}."
            )
        if positions is not None and num_positions is not None:
            raise TaskError("pass either num_positions or positions, got both.")
        check_seed(seed)
        encoder = PromptEncoder(tokenizer, chat_template, chat_template_args, system_prompt, chat_date)
        if length is not None:
            check_length(length)
        if num_keys is not None:
            whole_number("num_keys", num_keys, 2, MAX_LENGTH)
        if num_keys is not None and length is not None and num_keys > length:
            raise TaskError(f"num_keys={num_keys} pairs cannot fit into length={length} tokens.")
        self.data = data_path(data) if data is not None else None
        self.keys = keys or "uuid"
        splits = None
        if self.data is not None:
            splits, num_keys = _read_splits(self.data, num_keys, seed)
        elif num_keys is None:
            if length is None:
                raise TaskError("pass num_keys or length, which says how many pairs fit, or data.")
            num_keys = _fitting(encoder, self.keys, length, seed)
        super().__init__(
            encoder,
            num_items=num_keys,
            num_positions=DEFAULT_NUM_POSITIONS if num_positions is None else num_positions,
            positions=positions,
            seed=seed,
            length=length,
            max_new_tokens=max_new_tokens,
            splits=splits,
        )

    def _generated(self, name: SplitName, num_groups: int) -> list[KeyValueRecord]:
        rng = split_stream(self.seed, name)
        return [_random_record(rng, self.keys, self.num_items) for _ in range(num_groups)]

    def protocol(self, split_name: SplitName) -> str:
        """See [`PromptTask`]: a file keeps the public protocol."""
        return ASKED_EVERYWHERE if self.data is None else GOLD_MOVES

    def _written(self, source: KeyValueRecord, position: int, group: int) -> Prompt:
        record = source.moved(position) if self.data is not None else replace(source, gold=position)
        return record.prompt(group)

    def resized(self, num_items: int, length: int | None = None) -> KeyValueRetrieval:
        """See [`PromptTask`]."""
        settings = {"keys": self.keys} if self.data is None else {"data": self.data}
        return KeyValueRetrieval(
            self.tokenizer,
            num_keys=num_items,
            length=length,
            num_positions=len(self.positions) if len(self.positions) >= 3 else None,
            seed=self.seed,
            **self.encoder.settings(),
            max_new_tokens=self.judge.max_new_tokens,
            **settings,
        )

    def describe(self) -> dict[str, Any]:
        """Returns the task's settings, for a report; of the file its name alone."""
        source = {"keys": self.keys} if self.data is None else {"data": self.data.name}
        return super().describe() | source


def read_key_values(path: str | Path) -> list[KeyValueRecord]:
    """Reads a file in the public format.

    Raises:
        TaskError: naming file, line and what was expected.
    """
    records: list[KeyValueRecord] = []
    for where, content in read_records(path, _FIELDS):
        records.append(_checked(content, where))
        if len(records[-1].pairs) != len(records[0].pairs):
            raise TaskError(
                f"{where}: {len(records[-1].pairs)} pairs, expected {len(records[0].pairs)} as in the first record."
            )
    return records


def _checked(content: dict[str, Any], where: str) -> KeyValueRecord:
    pairs, key, value = (content[field] for field in _FIELDS)
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair)
        for pair in pairs
    ):
        raise TaskError(f"{where}: ordered_kv_records must be a list of [key, value], both text and not empty.")
    if len(pairs) < 2:
        raise TaskError(f"{where}: {len(pairs)} pairs, expected at least 2.")
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise TaskError(f"{where}: key {twice!r} stands twice, expected distinct keys.")
    if not isinstance(key, str) or key not in values:
        raise TaskError(f"{where}: key {key!r} is not among its ordered_kv_records.")
    if values[key] != value:
        raise TaskError(f"{where}: value {value!r} is not that of its key, {values[key]!r}.")
    return KeyValueRecord(tuple((k, v) for k, v in pairs), list(values).index(key))


def _read_splits(path: Path, num_keys: int | None, seed: int) -> tuple[dict[SplitName, list[KeyValueRecord]], int]:
    records = read_key_values(path)
    in_file = len(records[0].pairs)
    if num_keys is not None and num_keys > in_file:
        raise TaskError(f"num_keys={num_keys}, but the records of {path} have {in_file} pairs.")
    splits = cut_into_splits([record.pairs for record in records], seed, str(path))
    if num_keys is not None and num_keys < in_file:
        records = [record.cut(num_keys) for record in records]
    return {name: [records[i] for i in numbers] for name, numbers in splits.items()}, len(records[0].pairs)


def _random_record(rng: np.random.Generator, keys: str, num_keys: int) -> KeyValueRecord:
    """A context of random pairs with distinct keys and distinct values."""
    gold = int(rng.integers(num_keys))
    if keys == "uuid":
        texts = [str(UUID(bytes=rng.bytes(16), version=4)) for _ in range(2 * num_keys)]
        return KeyValueRecord(tuple(zip(texts[::2], texts[1::2], strict=True)), gold)
    if keys == "syllables":
        syllables = all_syllables()
        if 2 * num_keys > len(syllables) ** 2:
            raise TaskError(f"num_keys={num_keys}, but there are {len(syllables) ** 2} words: use keys='uuid'.")
        drawn = rng.choice(len(syllables) ** 2, 2 * num_keys, replace=False).tolist()
        texts = [syllables[i // len(syllables)] + syllables[i % len(syllables)] for i in drawn]
        return KeyValueRecord(tuple(zip(texts[::2], texts[1::2], strict=True)), gold)
    if num_keys > MAX_KEYS:
        raise TaskError(f"num_keys={num_keys}, but there are {MAX_KEYS} distinct words: use keys='uuid'.")
    names, words = key_words(NUM_KEYS if num_keys <= NUM_KEYS else MAX_KEYS), value_words()
    chosen = rng.permutation(len(names))[:num_keys].tolist()
    values = rng.choice(NUM_VALUES**2, num_keys, replace=False).tolist()
    pairs = [
        (names[k], f"{words[v // NUM_VALUES]} {words[v % NUM_VALUES]}") for k, v in zip(chosen, values, strict=True)
    ]
    return KeyValueRecord(tuple(pairs), gold)


def _fitting(encoder: PromptEncoder, keys: str, length: int, seed: int) -> int:
    """How many generated pairs fit into `length` tokens.

    Contexts differ in length, so that room is left for six standard deviations: the seed of the examples does not
    decide on whether they fit.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, len(SPLIT_NAMES)]))  # a stream that no split draws from

    def tokens(record: KeyValueRecord) -> int:
        encoded = encoder.encode(record.prompt().text, record.pairs[record.gold][1], None)
        return len(encoded.prompt_ids) + len(encoded.answer_ids)

    most = {"words": MAX_KEYS, "syllables": len(all_syllables()) ** 2 // 2}.get(keys, length)
    few = _random_record(rng, keys, 2)
    more = [replace(few, pairs=(*few.pairs, *_random_record(rng, keys, 2).pairs)) for _ in range(16 * _SAMPLES)]
    added = [(tokens(record) - tokens(few)) / 2 for record in more]
    each, spread = float(np.mean(added)), float(np.std(added)) * math.sqrt(2)
    overhead = tokens(few) - 2 * each

    def fits(num_keys: int) -> int:
        room = length - overhead - _MARGIN * spread * math.sqrt(max(num_keys, 1))
        return min(int(room / each), most)

    count = fits(fits(int(length / each)))
    if count > 2:  # what a pair takes is known well enough once whole contexts are measured
        each = float(np.mean([tokens(_random_record(rng, keys, count)) - overhead for _ in range(_SAMPLES)])) / count
        count = fits(count)
    if count < 2:
        raise TaskError(f"length={length} tokens holds fewer than 2 pairs: a prompt of 2 has {tokens(few)} tokens.")
    return count


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
