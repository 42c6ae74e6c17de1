"""A task made of token ids: any causal language model can be searched on any data, without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import TaskError
from ..messages import is_number, named, whole_number, whole_numbers
from .base import SPLIT_NAMES, Example, Split, SplitName, check_examples, check_seed


class TokenTask:
    """Splits a given list of examples, by whole groups.

    Args:
        examples: every group must hold one example per position.
        positions: what the examples' position indices stand for; default: the indices themselves.
        seed: decides which group goes to which split.
        fractions: shares of the groups for search, validation and test.
        name: shown in reports.

    Raises:
        TaskError: no examples, incomplete groups, or a split that would be empty.

    Example:
    ```py
    >>> from peft_layerrope import Example, TokenTask

    >>> examples = [
    ...     Example(context_ids=(5, 6, 7), query_ids=(8, key), answer_ids=(key + 1,), position=i, group=g)
    ...     for g in range(8)
    ...     for i, key in enumerate((5, 6, 7))
    ... ]
    >>> task = TokenTask(examples)
    ```
    """

    def __init__(
        self,
        examples: Sequence[Example],
        positions: Sequence[int] | None = None,
        *,
        seed: int = 0,
        fractions: tuple[float, float, float] = (0.4, 0.2, 0.4),
        name: str = "token_task",
    ) -> None:
        if examples is None or (isinstance(examples, Sequence) and not examples):
            raise TaskError("a TokenTask needs examples, got none.")
        check_examples(examples)
        if not _are_shares(fractions):
            raise TaskError(f"fractions={named(fractions)} must be three positive shares that sum to at most 1.")
        check_seed(seed)
        self.name = name
        self.seed = seed
        self.positions = whole_numbers("positions", positions) if positions is not None else _position_indices(examples)
        groups: dict[int, list[Example]] = {}
        for example in examples:
            groups.setdefault(example.group, []).append(example)
        order = np.random.default_rng(seed).permutation(sorted(groups)).tolist()
        ends = np.floor(np.cumsum(fractions) * len(order) + 1e-9).astype(int)
        starts = [0, *ends[:-1]]
        self._groups = {
            split: [groups[g] for g in order[start:end]]
            for split, start, end in zip(SPLIT_NAMES, starts, ends, strict=True)
        }
        for split, members in self._groups.items():
            if not members:
                raise TaskError(f"{len(order)} groups are too few: split {split!r} would be empty.")

    def available(self, name: SplitName, most: int) -> int:
        """Returns how many groups a split has, but no more than `most`."""
        return min(most, len(self._groups[name]))

    def split(self, name: SplitName, num_groups: int) -> Split:
        """Returns the first `num_groups` groups of the named split.

        Raises:
            TaskError: the split is unknown or has fewer groups.
        """
        if name not in SPLIT_NAMES:
            raise TaskError(f"split {name!r} is unknown, expected one of {', '.join(SPLIT_NAMES)}.")
        members = self._groups[name]
        whole_number("num_groups", num_groups, 1)
        if num_groups > len(members):
            raise TaskError(f"split {name!r} has {len(members)} groups, {num_groups} were asked for.")
        examples = [example for group in members[:num_groups] for example in group]
        return Split(name, self.seed, self.positions, tuple(examples))

    def describe(self) -> dict[str, Any]:
        """Returns the task's settings, for a report."""
        sizes = {name: len(groups) for name, groups in self._groups.items()}
        return {"name": self.name, "seed": self.seed, "positions": list(self.positions), "groups": sizes}


def _are_shares(fractions: Sequence[float]) -> bool:
    if not isinstance(fractions, (tuple, list)) or len(fractions) != len(SPLIT_NAMES):
        return False
    return all(is_number(share) and share > 0 for share in fractions) and sum(fractions) <= 1 + 1e-9


def _position_indices(examples: Sequence[Example]) -> tuple[int, ...]:
    return tuple(range(1 + max(example.position for example in examples)))
