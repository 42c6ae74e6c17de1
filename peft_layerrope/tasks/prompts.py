"""Tasks whose prompts are text: items in a row, one of which holds the answer, and a question after them."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..errors import TaskError
from ..messages import named, one_line, shown, whole_number, whole_numbers
from .base import SPLIT_NAMES, Example, Split, SplitName, check_length, check_request, check_seed, spread_positions
from .metrics import MAX_NEW_TOKENS, Judge

_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""")
_TRIED = "Is this text in the prompt?"


class EncodedPrompt(NamedTuple):
    """A prompt and its answer as token ids; `gold_span` is the first token of the gold and the one after its last."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    gold_span: tuple[int, int] | None


class PromptEncoder:
    """Tokenises prompts as the model expects them.

    Args:
        tokenizer: any transformers tokenizer; the gold's tokens are known for fast ones only.
        chat_template: put the prompt into the tokenizer's chat template, as one message of the user; None: where it has
            one. Otherwise the tokenizer adds its special tokens; an end token is left out, since the answer goes on
            from there.
        chat_template_args: variables of the template, such as `{"enable_thinking": False}`.
        system_prompt: a message of the system before the user's.
        chat_date: `YYYY-MM-DD`, what the template writes as today's date; None: today, as it is when this is made.

    Raises:
        TaskError: no tokenizer; a chat template was asked for, or arguments of one, and there is none; the template
            fails, knows no such variable, or leaves out the system prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        chat_date: str | None = None,
    ) -> None:
        check_tokenizer(tokenizer)
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat_template and not has_template:
            raise TaskError("chat_template=True, but the tokenizer has no chat template: leave it off for this model.")
        self.tokenizer = tokenizer
        self.uses_chat = has_template if chat_template is None else chat_template
        self._args = dict(chat_template_args or {})
        self._system = system_prompt
        self._template, self._date = "", None
        if self.uses_chat:
            self._template, self._date = self._dated_template(chat_date)
            self._check_template()
        else:
            asked = {"chat_template_args": self._args, "system_prompt": system_prompt, "chat_date": chat_date}
            name = next((name for name, value in asked.items() if value), None)
            if name is not None:
                reason = "chat_template is off" if has_template else "the tokenizer has no chat template"
                raise TaskError(f"{name}={named(asked[name])} is for a chat template, and {reason}.")
        mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        self._num_end = 0 if self.uses_chat else next((i for i, special in enumerate(reversed(mask)) if not special), 0)

    def settings(self) -> dict[str, Any]:
        """Returns the arguments that make the same encoder for this tokenizer, on any day."""
        return {
            "chat_template": self.uses_chat,
            "chat_template_args": self._args or None,
            "system_prompt": self._system,
            "chat_date": self._date,
        }

    def describe(self) -> dict[str, Any]:
        """Returns [`settings`] for a report, without those that are not in use."""
        return {name: value for name, value in self.settings().items() if value is not None}

    def _dated_template(self, chat_date: str | None) -> tuple[str, str | None]:
        """The template with a date in place of calls of `strftime_now`; and the date, None where there are none.

        transformers gives templates the clock itself, and lets nobody pass another.
        """
        try:
            template = self.tokenizer.get_chat_template()
        except Exception as error:  # several templates, and none of them the default
            raise _failing(error) from error
        if "strftime_now(" not in template:
            if chat_date is not None:
                raise TaskError(
                    f"chat_date={shown(chat_date)}: the tokenizer's chat template does not ask for the date."
                )
            return template, None
        try:
            day = date.fromisoformat(chat_date) if chat_date is not None else date.today()
        except ValueError as error:
            raise TaskError(f"chat_date={shown(chat_date)} must be a date, YYYY-MM-DD.") from error
        fixed = _DATE_CALL.sub(lambda call: json.dumps(day.strftime(call[1] or call[2] or "")), template)
        if "strftime_now(" in fixed:
            raise TaskError(
                "the tokenizer's chat template writes a date in a format that it computes, so its prompts would be "
                "others on another day: turn it off (chat_template=False)."
            )
        return fixed, day.isoformat()

    def _check_template(self) -> None:
        """Renders once: what cannot work is to be told before any long work."""
        unknown = next((n for n in self._args if not re.search(rf"\b{re.escape(n)}\b", self._template)), None)
        if unknown is not None:
            raise TaskError(
                f"chat_template_args: the tokenizer's chat template has no variable {shown(unknown)}, so it would do "
                "nothing."
            )
        text = self.in_template(_TRIED)
        if _TRIED.casefold() not in text.casefold():
            raise TaskError("the tokenizer's chat template leaves the user's message out: turn it off for this model.")
        if self._system is not None and self._system.strip() not in text:
            raise TaskError(f"the tokenizer's chat template leaves out system_prompt={named(self._system)}.")

    def encode(self, text: str, answer: str, gold: tuple[int, int] | None) -> EncodedPrompt:
        """Encodes a prompt with its answer.

        Args:
            text: the prompt.
            answer: what follows it.
            gold: the characters of `text` that the answer can be read from.

        Raises:
            TaskError: the tokenizer has no tokens for the answer, or its chat template fails.
        """
        full = self.in_template(text) if self.uses_chat else text
        start = full.find(text)  # a template may change the text, which then is not found
        encoded = self._tokenised(full)
        ids = self._ids(encoded)
        continuation = answer if self.uses_chat else " " + answer
        joined = self._ids(self._tokenised(full + continuation))
        if joined[: len(ids)] == ids and len(joined) > len(ids):
            answer_ids = joined[len(ids) :]
        else:  # the tokenizer merges across the seam, and the prompt has to stay what it is
            answer_ids = self.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        if not answer_ids or self.tokenizer.unk_token_id in answer_ids:
            raise TaskError(f"the tokenizer cannot encode the answer {answer!r}.")
        span = None
        if gold is not None and self.tokenizer.is_fast and start >= 0:
            span = _tokens_of(encoded, start + gold[0], start + gold[1])
        return EncodedPrompt(tuple(ids), tuple(answer_ids), span)

    def _tokenised(self, text: str) -> BatchEncoding:
        return self.tokenizer(text, add_special_tokens=not self.uses_chat, verbose=False)

    def _ids(self, encoded: BatchEncoding) -> list[int]:
        ids = encoded["input_ids"]
        return ids[: len(ids) - self._num_end]

    def in_template(self, text: str) -> str:
        """Returns the prompt as the tokenizer's chat template writes it.

        Raises:
            TaskError: the template fails.
        """
        messages = [{"role": "system", "content": self._system}] if self._system is not None else []
        messages.append({"role": "user", "content": text})
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self._template, add_generation_prompt=True, tokenize=False, **self._args
            )
        except Exception as error:  # a template is a program of the tokenizer's author and raises what it likes
            raise _failing(error) from error


def _failing(error: Exception) -> TaskError:
    return TaskError(
        f"the tokenizer's chat template fails: {one_line(error).rstrip('.')}. Turn it off "
        "(chat_template=False, --no-chat-template)."
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises TaskError unless `tokenizer` is one; a processor only has one."""
    if not (callable(getattr(tokenizer, "encode", None)) and hasattr(tokenizer, "bos_token_id")):
        hint = ": pass its .tokenizer" if hasattr(tokenizer, "tokenizer") else ""
        raise TaskError(f"tokenizer={named(tokenizer)} must be a transformers tokenizer{hint}.")


def _tokens_of(encoded: BatchEncoding, start: int, stop: int) -> tuple[int, int] | None:
    """The tokens that hold the characters from `start` to before `stop`; some tokenizers have none for white space."""
    tokens = [token for token in map(encoded.char_to_token, range(start, stop)) if token is not None]
    return (tokens[0], tokens[-1] + 1) if tokens else None


_SHORTENED_GROUPS = 8  # contexts by which it is found how many items fit

Source = TypeVar("Source")
"""What one context is made from, before the gold item has its place."""


@dataclass(frozen=True)
class Prompt:
    """One prompt as text.

    Attributes:
        text: the prompt, without special tokens and chat template.
        answers: accepted answers; the first one is what teacher-forced scoring expects.
        position: index of the gold item, in the task's own unit (a pair, a document).
        group: number of the context within its split.
        gold: the characters of `text` that the answer can be read from, first and one after the last; None if unknown.
        question: what is asked: a key, a question.
    """

    text: str
    answers: tuple[str, ...]
    position: int
    group: int
    gold: tuple[int, int] | None = None
    question: str = ""


GOLD_MOVES = "the gold item moves, all else stays"
"""The public protocol: one question to a context, which is written again for every gold position."""
ASKED_EVERYWHERE = "one context, asked at every position"
"""Every position has a question of its own, and the context is the same for all of them."""


class PromptTask(ABC, Generic[Source]):
    """Base of the tasks with written prompts.

    Where one context is asked at every position (see [`protocol`]), its examples share their `context_ids`: what their
    prompts have in common at the beginning. Where the gold item moves, `context_ids` are all of the prompt but its
    last token.

    Args:
        encoder: of the prompts.
        num_items: items of a context.
        num_positions: gold positions, spread evenly from the first item to the last.
        positions: the gold positions themselves, instead.
        seed: base seed.
        length: the most tokens that a prompt with its answer may have; None: no limit.
        max_new_tokens: tokens that a written answer may have; None: 100.
        splits: the contexts of each split, where they come from a file.

    Raises:
        TaskError: positions that the context does not have.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    """Name of what judges a written answer; see `metrics`."""
    item: ClassVar[str]
    """What the context consists of, for messages."""
    size_setting: ClassVar[str]
    """Name of the setting that says how many items there are, for messages."""

    def __init__(
        self,
        encoder: PromptEncoder,
        *,
        num_items: int,
        num_positions: int,
        positions: Sequence[int] | None,
        seed: int,
        length: int | None,
        max_new_tokens: int | None = None,
        splits: Mapping[SplitName, Sequence[Source]] | None = None,
    ) -> None:
        check_seed(seed)
        length = check_length(length) if length is not None else None
        self._splits = splits
        self.encoder = encoder
        self.tokenizer = tokenizer = encoder.tokenizer
        self.num_items = num_items
        self.seed = seed
        self.length = length
        self.judge = Judge(self.metric, tokenizer, MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens)
        if positions is None:
            positions = spread_positions(num_items, whole_number("num_positions", num_positions))
        self.positions = whole_numbers("positions", positions)
        check_positions(self.positions, num_items, self.item)
        if not self.positions or list(self.positions) != sorted(set(self.positions)):
            raise TaskError(f"positions={self.positions} must be distinct, at least one, and ascending.")

    def _generated(self, name: SplitName, num_groups: int) -> Sequence[Source]:
        """The first `num_groups` contexts of a split, for a task without a file."""
        raise NotImplementedError

    def _sources(self, name: SplitName, num_groups: int) -> Sequence[Source]:
        if self._splits is None:
            return self._generated(name, num_groups)
        members = self._splits[name]
        if num_groups > len(members):
            raise TaskError(
                f"{self.name}, split {name!r}: the file has {len(members)} contexts for it, {num_groups} were asked "
                "for."
            )
        return members[:num_groups]

    @abstractmethod
    def protocol(self, split_name: SplitName) -> str:
        """How the contexts of a split are asked: [`GOLD_MOVES`] or [`ASKED_EVERYWHERE`]."""

    @abstractmethod
    def _written(self, source: Source, position: int, group: int) -> Prompt:
        """The prompt of a context with the gold item at `position`."""

    @abstractmethod
    def resized(self, num_items: int, length: int | None = None) -> PromptTask[Source]:
        """Returns the same task with another number of items and another limit of a prompt's tokens (None: none).

        Raises:
            TaskError: its data do not have so many, or fewer than there are gold positions.
        """

    def available(self, split_name: SplitName, most: int) -> int:
        """Returns how many contexts of a split there are, but no more than `most`."""
        return most if self._splits is None else min(most, len(self._splits[split_name]))

    def prompts(self, split_name: SplitName, num_groups: int, positions: Sequence[int] | None = None) -> list[Prompt]:
        """Returns the prompts of a split as text, in the order of [`split`]'s examples.

        Args:
            split_name: which split.
            num_groups: independent contexts.
            positions: gold positions other than the task's.

        Raises:
            TaskError: the split is unknown or has fewer contexts, or a position is out of range.
        """
        check_request(split_name, num_groups)
        wanted = self.positions if positions is None else tuple(positions)
        check_positions(wanted, self.num_items, self.item)
        found = []
        for group, source in enumerate(self._sources(split_name, num_groups)):
            found += [self._written(source, position, group) for position in wanted]
        return found

    def split(self, name: SplitName, num_groups: int, positions: Sequence[int] | None = None) -> Split:
        """Returns `num_groups` contexts of the named split, each asked at every position.

        Args:
            name: which split.
            num_groups: independent contexts.
            positions: gold positions other than the task's, ascending.

        Raises:
            TaskError: the split is unknown or has fewer contexts, a position is out of range, or a prompt with its
                answer is longer than the limit; nothing is ever cut off.
        """
        wanted = self.positions if positions is None else tuple(positions)
        split = self._encoded(name, wanted, self.prompts(name, num_groups, positions), self.protocol(name))
        if self.length is not None and split.max_tokens > self.length:
            raise TaskError(
                f"{self.name}, split {name!r}: its longest prompt has {split.max_tokens} tokens with its answer, more "
                f"than length={self.length}. Use a larger length or a smaller {self.size_setting} than "
                f"{self.num_items}."
            )
        return split

    def _encoded(self, name: SplitName, positions: tuple[int, ...], prompts: Sequence[Prompt], protocol: str) -> Split:
        groups: dict[int, list[tuple[Prompt, EncodedPrompt]]] = {}
        for prompt in prompts:
            encoded = self.encoder.encode(prompt.text, prompt.answers[0], prompt.gold)
            groups.setdefault(prompt.group, []).append((prompt, encoded))
        examples = []
        for members in groups.values():
            all_ids = [encoded.prompt_ids for _, encoded in members]
            shared = _shared(all_ids) if protocol == ASKED_EVERYWHERE else max(map(len, all_ids))
            for prompt, (ids, answer_ids, gold_span) in members:
                cut = min(shared, len(ids) - 1)  # the question has a token at least
                place, known = positions.index(prompt.position), (prompt.answers, gold_span, (), prompt.question)
                examples.append(Example(ids[:cut], ids[cut:], answer_ids, place, prompt.group, *known))
        return Split(name, self.seed, positions, tuple(examples), judge=self.judge, protocol=protocol)

    def without_distractors(self, split_name: SplitName, start: int, stop: int, gold: bool) -> Split | None:
        """Returns questions of a split by themselves, to see what the model can answer at all; None where that is no
        question, since the answer stands nowhere but in the context.

        Args:
            split_name: which split.
            start: number of the first question.
            stop: the one after the last; fewer are returned where the split has fewer.
            gold: whether each comes with its gold item, or with nothing (closed-book).
        """
        return None

    def as_sent(self, prompt: Prompt) -> str:
        """Returns the text that is tokenised: the prompt, in the chat template if there is to be one."""
        return self.encoder.in_template(prompt.text) if self.encoder.uses_chat else prompt.text

    def shortened(self, length: int) -> PromptTask[Source]:
        """Returns the same task with fewer items, so that its first prompts have at most `length` tokens.

        Raises:
            TaskError: the length has no room for the positions.
        """
        sample = self.prompts("search", 1)
        tokens = max(len(self.encoder.encode(p.text, p.answers[0], None).prompt_ids) for p in sample)
        num_items = min(self.num_items, self.num_items * length // tokens)
        while num_items >= len(self.positions):
            task = self.resized(num_items, length)
            try:
                task.split("search", max(1, task.available("search", _SHORTENED_GROUPS)))
            except TaskError:
                num_items -= max(1, num_items // 20)
            else:
                return task
        raise TaskError(f"length={length} tokens holds fewer {self.item}s than {len(self.positions)} gold positions.")

    def describe(self) -> dict[str, Any]:
        """Returns the task's settings, for a report."""
        return {
            "name": self.name,
            "length": self.length,
            self.size_setting: self.num_items,
            "positions": list(self.positions),
            "seed": self.seed,
            **self.encoder.describe(),
            "max_new_tokens": self.judge.max_new_tokens,
        }


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens at the beginning all prompts have in common."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False)))


def check_positions(positions: Sequence[int], num_items: int, item: str) -> None:
    """Raises TaskError if a gold position is not that of one of `num_items` items."""
    for position in positions:
        if not 0 <= position < num_items:
            raise TaskError(
                f"gold position {position} is out of range: a context has {num_items} {item}s, 0 to {num_items - 1}."
            )


_GZIP = b"\x1f\x8b"
FRACTIONS = (0.4, 0.2, 0.4)
"""Shares of the records for search, validation and test."""


def data_path(data: str | Path) -> Path:
    """Returns the path of a data file.

    Raises:
        TaskError: it is no path.
    """
    if not isinstance(data, (str, os.PathLike)):
        raise TaskError(f"data={named(data)} must be the path of a file.")
    return Path(data)


def read_records(path: str | Path, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the records of a file, one JSON object a line; empty lines are skipped.

    Args:
        path: plain or gzipped, which is told from its content.
        fields: names that every record must have.

    Yields:
        Where the record stands, for messages, and the record.

    Raises:
        TaskError: the file cannot be read, or a line is no such record; it names the file, the line and what was
            expected.
    """
    path = Path(path)
    found = False
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == _GZIP
        if path.suffix == ".gz" and not zipped:
            raise TaskError(f"{path} is not a gzip file, expected gzipped JSON lines.")
        with gzip.open(path, "rb") if zipped else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    found = True
                    yield f"{path}, line {number}", _record(line, f"{path}, line {number}", fields)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TaskError(f"{path} is damaged gzip ({error}), expected gzipped JSON lines.") from error
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}.") from error
    if not found:
        raise TaskError(f"{path} is empty, expected one JSON object a line with {', '.join(fields)}.")


def _record(line: bytes, where: str, fields: Sequence[str]) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
        json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is valid JSON and no text
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: not JSON ({error}), expected an object with {', '.join(fields)}.") from error
    if not isinstance(record, dict):
        raise TaskError(f"{where}: a JSON {type(record).__name__}, expected an object with {', '.join(fields)}.")
    missing = [name for name in fields if name not in record]
    if missing:
        raise TaskError(f"{where}: {', '.join(missing)} missing, expected an object with {', '.join(fields)}.")
    return record


def cut_into_splits(shared: Sequence[Hashable], seed: int, source: str) -> dict[SplitName, list[int]]:
    """Shuffles records by the seed and cuts them into splits of 0.4, 0.2 and 0.4.

    Args:
        shared: for each record what no two splits may share; records that agree in it go to one split together.
        seed: of the shuffling.
        source: where the records come from, for messages.

    Returns:
        The records' numbers, by split.

    Raises:
        TaskError: a split would be empty.
    """
    units: dict[Hashable, list[int]] = {}
    for number, unit in enumerate(shared):
        units.setdefault(unit, []).append(number)
    members = list(units.values())
    limits = np.floor(np.cumsum(FRACTIONS) * len(shared) + 1e-9).astype(int).tolist()
    splits: dict[SplitName, list[int]] = {name: [] for name in SPLIT_NAMES}
    taken = 0
    for index in np.random.default_rng(seed).permutation(len(members)).tolist():
        taken += len(members[index])
        name = next((n for n, limit in zip(SPLIT_NAMES, limits, strict=True) if taken <= limit), SPLIT_NAMES[-1])
        splits[name] += members[index]
    for name, numbers in splits.items():
        if not numbers:
            raise TaskError(
                f"{source} has {len(shared)} records, {len(members)} of them independent: too few, split {name!r} "
                "would be empty."
            )
    return splits
