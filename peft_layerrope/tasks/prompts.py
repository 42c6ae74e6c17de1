"""Tasks whose prompts are text: items in a row, one of which holds the answer, and a question after them."""

from __future__ import annotations

import codecs
import copy
import gzip
import json
import operator
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, TypedDict, TypeVar, Unpack

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..declaration import converted
from ..errors import TaskError, named, one_line, shown, whole_number
from .base import MAX_LENGTH, Example, Split, SplitName, check_request, common_prefix, spread_positions
from .metrics import MAX_NEW_TOKENS, Judge

_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""")
_TRIED = "Is this text in the prompt?"


class EncodedPrompt(NamedTuple):
    """A prompt and its answer as token ids; `gold_span` is the first token of the gold and the one after its last."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    gold_span: tuple[int, int] | None


class ChatSettings(TypedDict, total=False):
    """How prompts are put into the tokenizer's chat template, as one message of the user."""

    chat_template: bool | None  # whether they are; None: where the tokenizer has one
    chat_template_args: Mapping[str, Any] | None  # variables of the template, such as {"enable_thinking": False}
    system_prompt: str | None  # a message of the system before the user's
    chat_date: str | None  # YYYY-MM-DD, which the template writes as today's date; None: today, when the task is made


class PromptSettings(ChatSettings, total=False):
    """Of all tasks with written prompts."""

    seed: int
    length: int | None  # the most tokens that a prompt with its answer may have; None: no limit
    max_new_tokens: int | None  # tokens that a written answer may have; None: 100


class PromptEncoder:
    """Tokenises prompts as the model expects them: in a chat template, see [`ChatSettings`], or with the tokenizer's
    special tokens; an end token is left out, since the answer goes on from there. The gold's tokens are known for fast
    tokenizers only.

    Raises:
        TaskError: a chat template was asked for, or arguments of one, and there is none; the template fails, knows no
            such variable, or leaves out the system prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        chat_date: str | None = None,
    ) -> None:
        has_template = bool(tokenizer.chat_template)
        self.tokenizer = tokenizer
        self.uses_chat = has_template if chat_template is None else chat_template
        self._args = dict(chat_template_args or {})
        self._system = system_prompt
        self._template, self._date = "", None
        if self.uses_chat and has_template:
            self._template, self._date = _dated_template(tokenizer, chat_date)
            problem = next(self._problems(chat_date), None)  # what cannot work is to be told before any long work
            if problem is not None:
                raise TaskError(
                    f"the tokenizer's chat template {problem}. Leave that out, or turn the template off "
                    "(chat_template=False)."
                )
        else:
            asked = {**self.settings(), "chat_date": chat_date}
            name = next((name for name, value in asked.items() if value), None)
            if name is not None:
                reason = "chat_template is off" if has_template else "the tokenizer has no chat template"
                raise TaskError(f"{name}={named(asked[name])} is for a chat template, and {reason}: leave it out.")
        mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        self._num_end = 0 if self.uses_chat else next((i for i, special in enumerate(reversed(mask)) if not special), 0)

    def settings(self) -> ChatSettings:
        """Returns the arguments that make the same encoder for this tokenizer, on any day."""
        return {
            "chat_template": self.uses_chat,
            "chat_template_args": self._args or None,
            "system_prompt": self._system,
            "chat_date": self._date,
        }

    def _problems(self, chat_date: str | None) -> Iterator[str]:
        for name in self._args:
            if not re.search(rf"\b{re.escape(name)}\b", self._template):
                yield f"has no variable {shown(name)}, so chat_template_args would do nothing"
        if chat_date is not None and self._date is None:
            yield f"does not ask for the date, so chat_date={shown(chat_date)} would do nothing"
        if "strftime_now(" in self._template:
            yield "writes a date in a format that it computes, so its prompts would be others on another day"
        text = self.in_template(_TRIED)
        if _TRIED.casefold() not in text.casefold():
            yield "leaves the user's message out"
        if self._system is not None and self._system.strip() not in text:
            yield f"leaves out system_prompt={named(self._system)}"

    def encode(self, text: str, answer: str, gold: tuple[int, int] | None) -> EncodedPrompt:
        """Encodes a prompt and the answer that follows it; `gold` are the characters that it can be read from.
        Raises TaskError if the tokenizer has no tokens for the answer, or its chat template fails.
        """
        full = self.in_template(text) if self.uses_chat else text
        start = full.find(text)  # a template may change the text, which then is not found
        encoded = self._tokenized(full)
        ids = self._ids(encoded)
        continuation = answer if self.uses_chat else " " + answer
        joined = self._ids(self._tokenized(full + continuation))
        if joined[: len(ids)] == ids and len(joined) > len(ids):
            answer_ids = joined[len(ids) :]
        else:  # the tokenizer merges across the seam, and the prompt has to stay what it is
            answer_ids = self.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        known_ids(self.tokenizer, answer_ids, answer)
        span = None
        if gold is not None and self.tokenizer.is_fast and start >= 0:
            span = _tokens_of(encoded, start + gold[0], start + gold[1])
        return EncodedPrompt(tuple(ids), tuple(answer_ids), span)

    def _tokenized(self, text: str) -> BatchEncoding:
        return self.tokenizer(text, add_special_tokens=not self.uses_chat, verbose=False)

    def _ids(self, encoded: BatchEncoding) -> list[int]:
        ids = encoded["input_ids"]
        return ids[: len(ids) - self._num_end]

    def in_template(self, text: str) -> str:
        """Returns the prompt as the tokenizer's chat template writes it; raises TaskError if that fails."""
        messages = [{"role": "system", "content": self._system}] if self._system is not None else []
        messages.append({"role": "user", "content": text})
        with _template_errors():
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self._template, add_generation_prompt=True, tokenize=False, **self._args
            )


def _dated_template(tokenizer: PreTrainedTokenizerBase, chat_date: str | None) -> tuple[str, str | None]:
    """The template with a date in place of calls of `strftime_now`, since transformers lets nobody pass another clock;
    and the date, None where there are none.
    """
    with _template_errors():
        template = tokenizer.get_chat_template()
    try:
        day = date.fromisoformat(chat_date) if chat_date is not None else date.today()
    except ValueError as error:
        raise TaskError(f"chat_date={shown(chat_date)} must be a date, YYYY-MM-DD.") from error
    dated, calls = _DATE_CALL.subn(lambda call: json.dumps(day.strftime(call[1] or call[2] or "")), template)
    return dated, day.isoformat() if calls else None


@contextmanager
def _template_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a template is a program of the tokenizer's author and raises what it likes
        raise TaskError(
            f"the tokenizer's chat template fails: {one_line(error).rstrip('.')}. Turn it off (chat_template=False)."
        ) from error


def known_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> Sequence[int]:
    """Returns the token ids of a text; raises TaskError if the tokenizer has none for it."""
    if not ids or tokenizer.unk_token_id in ids:
        raise TaskError(f"the tokenizer cannot encode {text!r}.")
    return ids


def _tokens_of(encoded: BatchEncoding, start: int, stop: int) -> tuple[int, int] | None:
    """The tokens that hold the characters from `start` to before `stop`; some tokenizers have none for white space."""
    tokens = [token for token in map(encoded.char_to_token, range(start, stop)) if token is not None]
    return (tokens[0], tokens[-1] + 1) if tokens else None


DEFAULT_NUM_POSITIONS = 5
_SHORTENED_GROUPS = 8  # contexts by which it is found how many items fit


@dataclass(frozen=True)
class Prompt:
    """One prompt as text; `gold` are the characters that the answer can be read from, first and one after the last."""

    text: str  # without special tokens and chat template
    answers: tuple[str, ...]  # those accepted; the first one is what teacher-forced scoring expects
    position: int  # index of the gold item, in the task's own unit (a pair, a document)
    group: int  # number of the context within its split
    gold: tuple[int, int] | None = None  # None if unknown
    question: str = ""  # what is asked: a key, a question


GOLD_MOVES = "the gold item moves, all else stays"
"""The public protocol: one question to a context, which is written again for every gold position."""
ASKED_EVERYWHERE = "one context, asked at every position"
"""Every position has a question of its own, and the context is the same for all of them."""


class PromptTask(ABC):
    """Base of the tasks with written prompts.

    Where one context is asked at every position (see [`protocol`]), its examples share their `context_ids`: what their
    prompts have in common at the beginning. Where the gold item moves, `context_ids` are all of the prompt but its
    last token. Without `data`, a file, contexts are generated. The other settings are those of [`PromptSettings`];
    raises TaskError if a number or the chat template cannot work.
    """

    name: ClassVar[str]
    metric: ClassVar[str]  # what judges a written answer; see `metrics`
    item: ClassVar[str]  # what the context consists of, for messages
    size_setting: ClassVar[str]  # the setting that says of how many

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: str | Path | None,
        *,
        seed: int = 0,
        length: int | None = None,
        max_new_tokens: int | None = None,
        **chat: Unpack[ChatSettings],
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = PromptEncoder(tokenizer, **chat)
        self.judge = Judge(self.metric, tokenizer, MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens)
        self.data = Path(data) if data is not None else None
        self.seed = seed
        self.length = whole_number("length", length, 1, MAX_LENGTH) if length is not None else None
        self.num_items = 0
        self.positions: tuple[int, ...] = ()
        self._splits: Mapping[SplitName, Sequence[Any]] = {}  # what a file has for each; of a task that reads one
        self._most_items: int | None = None  # as the file has them; None: any number

    def _arrange(self, num_items: int, num_positions: int | None) -> None:
        """Gives each context so many items, and the task its gold positions among them."""
        if self._most_items is not None and num_items > self._most_items:
            raise TaskError(
                f"{self.size_setting}={num_items}, but the records of {self.data} have {self._most_items} {self.item}s."
            )
        self.num_items = num_items
        given = num_positions is not None
        self.positions = spread_positions(num_items, num_positions) if given else self._usual_positions()

    @property
    def size(self) -> int:
        """What `size_setting` is, by which a context is made easier or harder."""
        return self.num_items

    def _usual_positions(self) -> tuple[int, ...]:
        return spread_positions(self.num_items, DEFAULT_NUM_POSITIONS)

    @abstractmethod
    def _sources(self, name: SplitName, num_groups: int, elsewhere: bool) -> Sequence[Any]:
        """What the first contexts of a split are made from; `elsewhere`: asked at other positions than the task's."""

    @abstractmethod
    def _written(self, source: Any, position: int, group: int) -> Prompt:
        """The prompt of a context with the gold item at `position`."""

    def protocol(self, split_name: SplitName) -> str:
        """Returns how the contexts of a split are asked: [`ASKED_EVERYWHERE`] where they are generated, else
        [`GOLD_MOVES`], as the public protocol has it.
        """
        return ASKED_EVERYWHERE if self.data is None else GOLD_MOVES

    def available(self, split_name: SplitName, most: int) -> int:
        """Returns how many contexts of a split there are, but no more than `most`."""
        return most if self.data is None else min(most, len(self._splits[split_name]))

    def prompts(self, split_name: SplitName, num_groups: int, positions: Sequence[int] | None = None) -> list[Prompt]:
        """Returns a split's prompts as text, in the order of [`split`]'s examples, with its arguments and errors."""
        check_request(split_name, num_groups)
        wanted = self.positions if positions is None else check_positions(positions, self.num_items, self.item)
        sources = self._sources(split_name, num_groups, elsewhere=positions is not None)
        return [self._written(source, p, group) for group, source in enumerate(sources) for p in wanted]

    def split(self, name: SplitName, num_groups: int, positions: Sequence[int] | None = None) -> Split:
        """Returns `num_groups` contexts of the named split, each asked at every position: the task's, or other ones,
        ascending.

        Raises:
            TaskError: the split is unknown or has fewer contexts, a position is out of range, or a prompt with its
                answer is longer than the limit; nothing is ever cut off.
        """
        wanted = self.positions if positions is None else tuple(positions)
        split = self._encoded(name, wanted, self.prompts(name, num_groups, positions), self.protocol(name))
        if self.length is not None and split.max_tokens > self.length:
            raise TaskError(
                f"{self.name}, split {name!r}: its longest prompt has {split.max_tokens} tokens with its answer, more "
                f"than length={self.length}. Use a larger length or a smaller {self.size_setting} than {self.size}."
            )
        return split

    def _encoded(self, name: SplitName, positions: tuple[int, ...], prompts: Sequence[Prompt], protocol: str) -> Split:
        examples = []
        of_group = operator.attrgetter("group")
        for _, members in groupby(sorted(prompts, key=of_group), key=of_group):
            encoded = [(p, self.encoder.encode(p.text, p.answers[0], p.gold)) for p in members]
            shared = min(common_prefix(encoded[0][1].prompt_ids, other.prompt_ids) for _, other in encoded)
            for prompt, (ids, answer_ids, gold_span) in encoded:
                cut = len(ids) - 1  # the question has a token at least
                if protocol == ASKED_EVERYWHERE:
                    cut = min(cut, shared)
                place, known = positions.index(prompt.position), (prompt.answers, gold_span, (), prompt.question)
                examples.append(Example(ids[:cut], ids[cut:], answer_ids, place, prompt.group, *known))
        return Split(name, self.seed, positions, tuple(examples), judge=self.judge, protocol=protocol)

    def without_distractors(self, split_name: SplitName, start: int, stop: int, gold: bool) -> Split | None:
        """Returns questions of a split by themselves, from number `start` to before `stop` or as many as there are, to
        see what the model can answer at all: each with its gold item, or with nothing (closed-book). None where that
        is no question, since the answer stands nowhere but in the context.
        """
        return None

    def as_sent(self, prompt: Prompt) -> str:
        """Returns the text that is tokenised: the prompt, in the chat template if there is to be one."""
        return self.encoder.in_template(prompt.text) if self.encoder.uses_chat else prompt.text

    def resized(self, num_items: int, length: int | None = None) -> PromptTask:
        """Returns the same task with another number of items and another limit of a prompt's tokens (None: none);
        raises TaskError if its data do not have so many, or there are more gold positions.
        """
        task = copy.copy(self)
        task.length = length
        task._arrange(num_items, len(self.positions) if len(self.positions) >= 3 else None)
        return task

    def shortened(self, length: int) -> PromptTask:
        """Returns the same task with fewer items, so that its first prompts have at most `length` tokens; raises
        TaskError if that has no room for the positions.
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
        """Returns the task's settings, for a report; of a file its name alone."""
        chat = {name: value for name, value in self.encoder.settings().items() if value is not None}
        return {
            "name": self.name,
            "length": self.length,
            self.size_setting: self.size,
            "positions": list(self.positions),
            "seed": self.seed,
            **chat,
            "max_new_tokens": self.judge.max_new_tokens,
            **({"data": self.data.name} if self.data is not None else {}),
        }


def check_positions(positions: Sequence[int], num_items: int, item: str) -> tuple[int, ...]:
    """Returns gold positions as a tuple; TaskError, unless they are those of some of `num_items` items, ascending."""
    found = tuple(map(operator.index, positions))
    if not found or list(found) != sorted(set(found)) or found[0] < 0 or found[-1] >= num_items:
        raise TaskError(
            f"gold positions {shown(found)} must be distinct, ascending and from 0 to {num_items - 1}: a context has "
            f"{num_items} {item}s."
        )
    return found


_GZIP = b"\x1f\x8b"
_MAX_LINE = 2**26  # bytes: a few packed ones may unfold to gigabytes

Text = Annotated[str, Field(min_length=1)]


class Record(BaseModel):
    """A line of a data file. What else it holds than the fields is not looked at."""

    model_config = ConfigDict(strict=True, frozen=True)
    items_field: ClassVar[str] = ""  # the field with a context's items, as many in all records; empty: it is no context


R = TypeVar("R", bound=Record)


def read_records(path: str | Path, kind: type[R]) -> Iterator[R]:
    """Yields the records of a file, plain or gzipped: one JSON object a line; empty lines are skipped. Raises TaskError
    if the file cannot be read, or a line is no such record: it names the file, the line and what was expected.
    """
    path, first = Path(path), None
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == _GZIP or path.suffix == ".gz"
        with gzip.open(path, "rb") if zipped else path.open("rb") as lines:
            for number, line in enumerate(iter(partial(lines.readline, _MAX_LINE), b""), start=1):
                if len(line) == _MAX_LINE:
                    raise TaskError(f"{path}, line {number}: more than {_MAX_LINE:,} bytes.")
                if line.strip():
                    record = _record(line, kind, f"{path}, line {number}", first)
                    first = first or record
                    yield record
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if first is None:
        raise TaskError(f"{path} is empty, expected one JSON object a line with {', '.join(kind.model_fields)}.")


def _record(line: bytes, kind: type[R], where: str, first: R | None) -> R:
    try:
        record = kind.model_validate_json(line.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        raise converted(error, kind, TaskError, where) from error
    count, expected = (len(getattr(one, kind.items_field, ())) for one in (record, first or record))
    if count != expected:
        raise TaskError(f"{where}: a context of {count} items, expected {expected} as in the first record.")
    return record
