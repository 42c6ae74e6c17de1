"""Tasks whose prompts are text: items in a row, one of which holds the answer, and a question after them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar, Generic, TypeVar

from ..checks import whole_number, whole_numbers
from ..errors import TaskError
from .base import Example, Split, SplitName, check_length, check_request, check_seed, spread_positions
from .encoding import EncodedPrompt, PromptEncoder
from .metrics import MAX_NEW_TOKENS, Judge

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
