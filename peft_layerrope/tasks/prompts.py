"""Tasks whose prompts are text: items in a row, one of which holds the answer, and a question after them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from ..checks import whole_number, whole_numbers
from ..errors import TaskError
from .base import Example, Split, SplitName, check_length, check_request, check_seed, spread_positions
from .encoding import PromptEncoder

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
    """

    text: str
    answers: tuple[str, ...]
    position: int
    group: int
    gold: tuple[int, int] | None = None


class PromptTask(ABC, Generic[Source]):
    """Base of the tasks with written prompts.

    Each context is asked with its gold item at every position, and the answer's first token is predicted after the
    prompt's last one: an example's `context_ids` are all of the prompt but its last token.

    Args:
        tokenizer: any transformers tokenizer.
        num_items: items of a context.
        num_positions: gold positions, spread evenly from the first item to the last.
        positions: the gold positions themselves, instead.
        seed: base seed.
        length: the most tokens that a prompt with its answer may have; None: no limit.
        chat_template: see [`PromptEncoder`].
        splits: the contexts of each split, where they come from a file.

    Raises:
        TaskError: positions that the context does not have, or no chat template.
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
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_items: int,
        num_positions: int,
        positions: Sequence[int] | None,
        seed: int,
        length: int | None,
        chat_template: bool,
        splits: Mapping[SplitName, Sequence[Source]] | None = None,
    ) -> None:
        check_seed(seed)
        length = check_length(length) if length is not None else None
        self._splits = splits
        self.tokenizer = tokenizer
        self.num_items = num_items
        self.seed = seed
        self.length = length
        self.chat_template = chat_template
        self._encoder = PromptEncoder(tokenizer, chat_template)
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
    def _written(self, source: Source, position: int) -> tuple[str, tuple[str, ...], tuple[int, int]]:
        """The prompt with the gold item at `position`, the accepted answers, and the characters of the gold."""

    @abstractmethod
    def _resized(self, num_items: int, length: int) -> PromptTask[Source]:
        """The same task with fewer items and another limit."""

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
            for position in wanted:
                text, answers, gold = self._written(source, position)
                found.append(Prompt(text, answers, position, group, gold))
        return found

    def split(self, name: SplitName, num_groups: int) -> Split:
        """Returns `num_groups` contexts of the named split, each asked with the gold item at every position.

        Raises:
            TaskError: the split is unknown or has fewer contexts, or a prompt with its answer is longer than the
                limit; nothing is ever cut off.
        """
        examples = tuple(map(self._example, self.prompts(name, num_groups)))
        split = Split(name, self.seed, self.positions, examples)
        if self.length is not None and split.max_tokens > self.length:
            raise TaskError(
                f"{self.name}, split {name!r}: its longest prompt has {split.max_tokens} tokens with its answer, more "
                f"than length={self.length}. Use a larger length or a smaller {self.size_setting} than "
                f"{self.num_items}."
            )
        return split

    def _example(self, prompt: Prompt) -> Example:
        ids, answer_ids, gold_span = self._encoder.encode(prompt.text, prompt.answers[0], prompt.gold)
        position = self.positions.index(prompt.position)
        return Example(ids[:-1], ids[-1:], answer_ids, position, prompt.group, prompt.answers, gold_span)

    def as_sent(self, prompt: Prompt) -> str:
        """Returns the text that is tokenised: the prompt, in the chat template if there is to be one."""
        return self._encoder.in_template(prompt.text) if self.chat_template else prompt.text

    def shortened(self, length: int) -> PromptTask[Source]:
        """Returns the same task with fewer items, so that its first prompts have at most `length` tokens.

        Raises:
            TaskError: the length has no room for the positions.
        """
        sample = self.prompts("search", 1)
        tokens = max(len(self._encoder.encode(p.text, p.answers[0], None).prompt_ids) for p in sample)
        num_items = min(self.num_items, self.num_items * length // tokens)
        groups = _SHORTENED_GROUPS if self._splits is None else min(_SHORTENED_GROUPS, len(self._splits["search"]))
        while num_items >= len(self.positions):
            task = self._resized(num_items, length)
            try:
                task.split("search", groups)
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
            "chat_template": self.chat_template,
        }


def check_positions(positions: Sequence[int], num_items: int, item: str) -> None:
    """Raises TaskError if a gold position is not that of one of `num_items` items."""
    for position in positions:
        if not 0 <= position < num_items:
            raise TaskError(
                f"gold position {position} is out of range: a context has {num_items} {item}s, 0 to {num_items - 1}."
            )
