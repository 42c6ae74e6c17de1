"""Key-value retrieval: the public task and its generated kinds, and a task of single words for small models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Unpack
from uuid import UUID

import numpy as np
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from ..errors import TaskError, shown, whole_number
from .base import (
    MAX_LENGTH,
    SPLIT_NAMES,
    Example,
    Split,
    SplitName,
    check_enough,
    check_request,
    cut_into_splits,
    split_stream,
    spread_positions,
)
from .prompts import (
    Prompt,
    PromptSettings,
    PromptTask,
    Record,
    Text,
    check_positions,
    known_ids,
    read_records,
)

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"
_SYLLABLES = tuple(map("".join, product(_CONSONANTS, _VOWELS, _CONSONANTS)))  # 980

NUM_KEYS = 256
NUM_VALUES = 256


@cache
def key_words(count: int = NUM_KEYS) -> tuple[str, ...]:
    """Returns `count` keys, 4900 at most: two consonant-vowel syllables each ("baba", "bake", ...)."""
    return _evenly([*map("".join, product(_CONSONANTS, _VOWELS, _CONSONANTS, _VOWELS))], count)


@cache
def value_words() -> tuple[str, ...]:
    """Returns the 256 values: consonant-vowel-consonant ("bab", "bad", ...)."""
    return _evenly(_SYLLABLES, NUM_VALUES)


def _evenly(words: Sequence[str], count: int) -> tuple[str, ...]:
    return tuple(words[i * len(words) // count] for i in range(count))


KeyStyle = Literal["uuid", "words", "syllables"]
_MOST_KEYS = {"uuid": MAX_LENGTH, "words": (len(_CONSONANTS) * len(_VOWELS)) ** 2, "syllables": 980**2 // 2}

_BEFORE = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
_AFTER = '\n\nKey: "{key}"\nCorresponding value:'
_SAMPLES = 4  # contexts by which it is measured how many pairs fit
_MARGIN = 6  # standard deviations of a context's length that are left free


class _Line(Record):
    """A record of the public format."""

    items_field = "ordered_kv_records"
    ordered_kv_records: Annotated[tuple[tuple[Text, Text], ...], Field(min_length=2)]
    key: Text
    value: Text

    @model_validator(mode="after")
    def _check(self) -> Self:
        values = dict(self.ordered_kv_records)
        if len(values) < len(self.ordered_kv_records) or values.get(self.key) != self.value:
            raise TaskError(
                f"ordered_kv_records must have distinct keys, and hold key={shown(self.key)} with "
                f"value={shown(self.value)}."
            )
        return self


@dataclass(frozen=True)
class KeyValueRecord:
    """The pairs of one context, in order, and which of them is asked for."""

    pairs: tuple[tuple[str, str], ...]
    gold: int

    def moved(self, position: int, num_keys: int) -> KeyValueRecord:
        """Returns a record of the gold pair, at `position`, and the first `num_keys - 1` others in their order."""
        others = [pair for i, pair in enumerate(self.pairs) if i != self.gold][: num_keys - 1]
        return KeyValueRecord((*others[:position], self.pairs[self.gold], *others[position:]), position)

    def prompt(self, group: int = 0) -> Prompt:
        """Returns the prompt that asks for the gold pair where it stands."""
        key, value = self.pairs[self.gold]
        lines = [f'"{k}": "{v}"' for k, v in self.pairs]
        before = _BEFORE + "{" + ",\n ".join([*lines[: self.gold], f'"{key}": "'])
        text = _BEFORE + "{" + ",\n ".join(lines) + "}" + _AFTER.format(key=key)
        return Prompt(text, (value,), self.gold, group, (len(before), len(before) + len(value)), key)


class KeyValueRetrieval(PromptTask):
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
        keys: generated keys and values: `"uuid"` (the default); `"words"`, short ones with values of two words; or
            `"syllables"`, both of two syllables, consonant, vowel, consonant each.
        num_positions: gold positions, spread evenly from the first pair to the last; default: 5.
        settings: `seed`, `length`, `max_new_tokens` and those of the chat template, as for [`PromptSettings`].

    Raises:
        TaskError: the file holds something else, settings that exclude each other, or positions that a context does
            not have.
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
        keys: KeyStyle | None = None,
        num_positions: int | None = None,
        **settings: Unpack[PromptSettings],
    ) -> None:
        super().__init__(tokenizer, data, **settings)
        if keys is not None and (data is not None or keys not in _MOST_KEYS):
            expected = f"one of {', '.join(_MOST_KEYS)}" if data is None else "nothing: data has keys of its own"
            raise TaskError(f"keys={keys!r}, expected {expected}.")
        self.keys = keys or "uuid"
        if num_keys is not None:
            whole_number("num_keys", num_keys, 2, min(self.length or MAX_LENGTH, _MOST_KEYS[self.keys]))
        if self.data is not None:
            lines = list(read_records(self.data, _Line))
            records = [KeyValueRecord(r.ordered_kv_records, [*dict(r.ordered_kv_records)].index(r.key)) for r in lines]
            splits = cut_into_splits([record.pairs for record in records], self.seed, str(self.data))
            self._splits = {name: [records[i] for i in numbers] for name, numbers in splits.items()}
            self._most_items = len(lines[0].ordered_kv_records)
            num_keys = num_keys or self._most_items
        elif num_keys is None:
            if self.length is None:
                raise TaskError("pass num_keys or length, which says how many pairs fit, or data.")
            num_keys = self._fitting(self.length)
        self._arrange(num_keys, num_positions)

    def _sources(self, name: SplitName, num_groups: int, elsewhere: bool) -> list[KeyValueRecord]:
        if self.data is None:
            rng = split_stream(self.seed, name)
            return [_random_record(rng, self.keys, self.num_items) for _ in range(num_groups)]
        found = self._splits[name][:num_groups]
        check_enough(len(found), num_groups, f"{self.name}, split {name!r}: the file has {len(found)} contexts for it")
        return found

    def _written(self, source: KeyValueRecord, position: int, group: int) -> Prompt:
        record = replace(source, gold=position) if self.data is None else source.moved(position, self.num_items)
        return record.prompt(group)

    def describe(self) -> dict[str, Any]:
        return super().describe() | ({"keys": self.keys} if self.data is None else {})

    def _fitting(self, length: int) -> int:
        """How many generated pairs fit into `length` tokens.

        Contexts differ in length, so that room is left for six standard deviations: the seed of the examples does not
        decide on whether they fit.
        """
        rng = np.random.default_rng([self.seed, len(SPLIT_NAMES)])  # a stream that no split draws from

        def tokens(record: KeyValueRecord) -> int:
            encoded = self.encoder.encode(record.prompt().text, record.pairs[record.gold][1], None)
            return len(encoded.prompt_ids) + len(encoded.answer_ids)

        few = _random_record(rng, self.keys, 2)
        more = [
            replace(few, pairs=(*few.pairs, *_random_record(rng, self.keys, 2).pairs)) for _ in range(16 * _SAMPLES)
        ]
        added = [(tokens(record) - tokens(few)) / 2 for record in more]
        each, spread = float(np.mean(added)), float(np.std(added)) * math.sqrt(2)
        overhead = tokens(few) - 2 * each

        def fits(num_keys: int) -> int:
            room = length - overhead - _MARGIN * spread * math.sqrt(max(num_keys, 1))
            return min(int(room / each), length, _MOST_KEYS[self.keys])

        count = fits(fits(int(length / each)))
        if count > 2:  # what a pair takes is known well enough once whole contexts are measured
            whole = [_random_record(rng, self.keys, count) for _ in range(_SAMPLES)]
            each = float(np.mean([tokens(record) - overhead for record in whole])) / count
            count = fits(count)
        if count < 2:
            raise TaskError(f"length={length} tokens holds fewer than 2 pairs: a prompt of 2 has {tokens(few)} tokens.")
        return count


_SHARES = (1, 2, 4)  # of the length, their reciprocals
_PERCENT = 101  # places in a context of whatever length


class KeyValueMix(PromptTask):
    """Generated key-value retrieval of three lengths and kinds of keys, by turns: factors that are searched on it are
    not those of one length. There are 5 positions by default, in percent of a context's depth.

    The longest prompts have at most `length` tokens with their answers, the others half and a quarter of it. With
    `keys` all are of that kind, as for [`KeyValueRetrieval`].

    Raises:
        TaskError: there is no such kind, or a quarter of the length has no room for the positions.
    """

    name = "kv_mix"
    metric = KeyValueRetrieval.metric
    item = "token"
    size_setting = "length"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int,
        keys: KeyStyle | None = None,
        num_positions: int | None = None,
        **settings: Unpack[PromptSettings],
    ) -> None:
        super().__init__(tokenizer, None, length=length, **settings)
        self._arrange(_PERCENT, num_positions)
        self.keys = keys
        kinds = _MOST_KEYS if keys is None else (keys,)
        self.num_turns = len(_SHARES) * len(kinds)  # contexts after which lengths and kinds come again
        self._parts: list[KeyValueRetrieval] = []
        for number, (turn, kind) in enumerate(product(range(len(_SHARES)), kinds)):
            share = _SHARES[(turn + number) % len(_SHARES)]  # another length with each turn of a kind
            own = {**settings, "seed": self.num_turns * self.seed + number, "length": length // share}
            try:
                part = KeyValueRetrieval(tokenizer, keys=kind, num_positions=len(self.positions), **own)
            except TaskError as error:
                short = f"contexts of {length // share} tokens with {kind} keys"
                raise TaskError(f"{self.name} with length={length} has {short}: {error}") from error
            self._parts.append(part)

    @property
    def size(self) -> int:
        return self.length

    def _sources(self, name: SplitName, num_groups: int, elsewhere: bool) -> list[KeyValueRecord]:
        count = self.num_turns
        drawn = [part._sources(name, -(-num_groups // count), elsewhere) for part in self._parts]
        return [drawn[number % count][number // count] for number in range(num_groups)]

    def _written(self, source: KeyValueRecord, position: int, group: int) -> Prompt:
        place = position * (len(source.pairs) - 1) // (_PERCENT - 1)
        return replace(replace(source, gold=place).prompt(group), position=position)

    def describe(self) -> dict[str, Any]:
        return super().describe() | ({"keys": self.keys} if self.keys is not None else {})


def _random_record(rng: np.random.Generator, keys: KeyStyle, num_keys: int) -> KeyValueRecord:
    """A context of random pairs with distinct keys and distinct values."""
    gold = int(rng.integers(num_keys))
    if keys == "words":
        names, words = key_words(NUM_KEYS if num_keys <= NUM_KEYS else _MOST_KEYS[keys]), value_words()
        texts = [names[i] for i in rng.permutation(len(names))[:num_keys].tolist()]
        values = rng.choice(NUM_VALUES**2, num_keys, replace=False).tolist()
        others = [f"{words[i // NUM_VALUES]} {words[i % NUM_VALUES]}" for i in values]
        return KeyValueRecord(tuple(zip(texts, others, strict=True)), gold)
    if keys == "uuid":
        texts = [str(UUID(bytes=rng.bytes(16), version=4)) for _ in range(2 * num_keys)]
    else:
        count = len(_SYLLABLES)
        drawn = rng.choice(count**2, 2 * num_keys, replace=False).tolist()
        texts = [_SYLLABLES[i // count] + _SYLLABLES[i % count] for i in drawn]
    return KeyValueRecord(tuple(zip(texts[::2], texts[1::2], strict=True)), gold)


SEPARATOR = ","
QUESTION = "?"

_Pair = tuple[str, str, str]
"""A key and its two values."""


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
        TaskError: the length has no room for the pairs or the positions.
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
        self.length, self.seed, self.tokenizer = length, seed, tokenizer
        self._bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        words = (*key_words(), *value_words(), SEPARATOR, QUESTION)
        # as each stands inside a line, after a space
        self._ids = {w: known_ids(tokenizer, tokenizer.encode(f" {w}", add_special_tokens=False), w) for w in words}
        # No prompt can be longer than one whose every word has the most tokens: checked before any work.
        asked = max(len(self._ids[key]) for key in key_words()) + 2 * max(len(self._ids[v]) for v in value_words())
        room = length - len(self._bos) - len(self._ids[QUESTION]) - asked
        fitting = max(0, min(room // (asked + len(self._ids[SEPARATOR])), NUM_KEYS))
        needed = max(num_positions, num_pairs or 0)
        told = f"length={length} tokens holds {fitting} of {NUM_KEYS} pairs, too few for num_pairs or gold positions"
        check_enough(fitting, needed, told)
        self.num_pairs = fitting if num_pairs is None else num_pairs
        self.positions = spread_positions(self.num_pairs, num_positions)

    def split(self, name: SplitName, num_groups: int) -> Split:
        """Returns `num_groups` contexts of the named split, each asked at every gold position.

        Raises:
            TaskError: the split is unknown, or `num_groups` is below 1.
        """
        return Split(name, self.seed, self.positions, tuple(self._examples(name, num_groups, self.positions)))

    def prompts(self, split_name: SplitName, num_groups: int, positions: Sequence[int] | None = None) -> list[Prompt]:
        """Returns the prompts of a split as text that the tokenizer turns into exactly the examples' token ids;
        `positions` are the pairs that are asked for, other than the task's.

        Raises:
            TaskError: the split is unknown, a position is out of range, or no text gives these token ids.
        """
        wanted = self.positions if positions is None else check_positions(positions, self.num_pairs, "pair")
        return [self._prompt(e, wanted[e.position]) for e in self._examples(split_name, num_groups, wanted)]

    def _examples(self, name: SplitName, num_groups: int, positions: Sequence[int]) -> Iterator[Example]:
        check_request(name, num_groups)
        rng, keys, values = split_stream(self.seed, name), key_words(), value_words()
        for group in range(num_groups):
            drawn = rng.permutation(NUM_KEYS)[: self.num_pairs].tolist()
            taken = _draw_evenly(rng, NUM_VALUES, 2 * self.num_pairs).reshape(-1, 2).tolist()
            pairs = [(keys[k], values[a], values[b]) for k, (a, b) in zip(drawn, taken, strict=True)]
            for index, gold in enumerate(positions):
                yield self._example(pairs, gold, index, group)

    def _encoded(self, words: Sequence[str]) -> list[int]:
        return [token for word in words for token in self._ids[word]]

    def _example(self, pairs: Sequence[_Pair], gold: int, index: int, group: int) -> Example:
        key, *value = pairs[gold]
        words = [word for pair in pairs for word in (*pair, SEPARATOR)]
        answer, start = self._encoded(value), len(self._bos) + len(self._encoded(words[: 4 * gold + 1]))
        return Example(
            context_ids=(*self._bos, *self._encoded(words)),
            query_ids=tuple(self._encoded([QUESTION, key])),
            answer_ids=tuple(answer),
            position=index,
            group=group,
            answers=(" ".join(value),),
            gold_span=(start, start + len(answer)),
            question=key,
        )

    def _prompt(self, example: Example, gold: int) -> Prompt:
        (answer,), decode = example.answers, partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
        for skipped in (True, False):  # some tokenizers put BOS before a text by themselves, some texts have it
            text = decode(list(example.prompt_ids), skip_special_tokens=skipped)
            before = decode(list(example.context_ids[: example.gold_span[0]]), skip_special_tokens=skipped)
            if tuple(self.tokenizer(text)["input_ids"]) == example.prompt_ids:
                begin = text.index(answer, len(before))
                return Prompt(text, (answer,), gold, example.group, (begin, begin + len(answer)))
        raise TaskError(f"{self.name}: no text gives these token ids with this tokenizer; use kv_retrieval.")

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
