"""What a task is: seeded, disjoint splits of examples with the answer at known positions."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np

from ..errors import TaskError, named, whole_number
from .metrics import Judge

Measure = Literal["accuracy", "loss"]
"""What a task's scores are: right or wrong answers, or the loss on running text."""
MEASURES: tuple[Measure, ...] = get_args(Measure)

SplitName = Literal["search", "validation", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = get_args(SplitName)

MAX_LENGTH = 2**22
"""Tokens of a prompt: four million, more than any model takes. What is longer is a typing error, and would be built."""
MAX_GROUPS = 2**20
"""Contexts of a split, for the same reason."""
FRACTIONS = (0.4, 0.2, 0.4)
"""Shares of what a file holds for search, validation and test."""
_TAIL = 3  # tokens by which the end of an opening is found


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns how many tokens two texts share at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@dataclass(frozen=True)
class Example:
    """One prompt and its answer, as token ids.

    The prompt is `context_ids + query_ids`. Examples that ask different things of one context repeat the same
    `context_ids`; an evaluator may then run the context once.

    Attributes:
        context_ids: token ids of the prompt up to the question, with any special tokens.
        query_ids: token ids of the question; at least one, since the first answer token is read after it.
        answer_ids: token ids of the gold answer; at least one.
        position: index into the task's `positions` of where the answer stands in the context.
        group: number of the independent draw that this example belongs to, the unit of all statistics: one context
            asked at every position.
        answers: accepted answers as text; empty where only the answer's own tokens are right.
        gold_span: first token of `context_ids` that the answer can be read from, and the one after the last; None if
            not known.
        opening_ids: what the model is known to write before the answer: given and not judged, no part of the prompt.
        question: what is asked, as text: a key, a question; empty where the task has no text.
        other_targets: pairs of `opening_ids` and `answer_ids` by which the model now and then writes the answer too.
    """

    context_ids: tuple[int, ...]
    query_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    position: int
    group: int
    answers: tuple[str, ...] = ()
    gold_span: tuple[int, int] | None = None
    opening_ids: tuple[int, ...] = ()
    question: str = ""
    other_targets: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Token ids that the model is given."""
        return self.context_ids + self.query_ids

    @property
    def asked_ids(self) -> tuple[int, ...]:
        """Token ids after the context and before the answer: the question, and what opens the answer."""
        return self.query_ids + self.opening_ids

    def opened_as(self, written_ids: tuple[int, ...]) -> Example | None:
        """Returns the example with that of its known openings which `written_ids` begin with. Where they differ from it
        in the middle and end as it does, as those of a model which gets the key wrong in its sentence, their own
        beginning is the opening. None: they begin in no known way.
        """

        def likeness(target: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, bool]:
            shared = common_prefix(target[0], written_ids)
            return shared, shared == len(target[0])

        opening_ids, answer_ids = max(((self.opening_ids, self.answer_ids), *self.other_targets), key=likeness)
        shared, tail = common_prefix(opening_ids, written_ids), opening_ids[-_TAIL:]
        if shared < len(opening_ids):
            stops = range(shared + _TAIL, len(written_ids) + 1) if len(opening_ids) >= shared + _TAIL else ()
            stop = next((stop for stop in stops if written_ids[stop - _TAIL : stop] == tail), None)
            if stop is None:
                return None
            opening_ids = written_ids[:stop]
        return replace(self, opening_ids=opening_ids, answer_ids=answer_ids)

    @property
    def num_tokens(self) -> int:
        """Length of the prompt with everything that is written after it, in tokens."""
        return len(self.context_ids) + len(self.asked_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class Split:
    """The examples of one split, complete by group: every group has one example for every position.

    Attributes:
        name: `"search"`, `"validation"` or `"test"`.
        seed: of the examples.
        positions: the gold positions, in the task's unit.
        examples: see [`Example`].
        measure: what their scores are.
        judge: how written answers are judged; None: only an example's own `answer_ids` are right.
        protocol: how the contexts of a group come about, for reports; empty where there is nothing to say.
        targets: what is known of the answers' `opening_ids`, for reports; None: nothing was learnt.
    """

    name: str
    seed: int
    positions: tuple[int, ...]
    examples: tuple[Example, ...]
    measure: Measure = "accuracy"
    judge: Judge | None = None
    protocol: str = ""
    targets: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.examples:
            raise TaskError(f"split {self.name!r} has no examples.")
        found: dict[int, list[int]] = {}
        for example in self.examples:
            if not (example.query_ids and example.answer_ids):
                raise TaskError(
                    f"split {self.name!r}: an example of group {example.group} has an empty query or answer."
                )
            found.setdefault(example.group, []).append(example.position)
        for group, indices in found.items():
            if sorted(indices) != list(range(len(self.positions))):
                raise TaskError(
                    f"split {self.name!r}: group {group} has position indices {sorted(indices)}, expected one example "
                    f"for each of the {len(self.positions)} positions."
                )

    @property
    def num_groups(self) -> int:
        """Number of independent draws."""
        return len(self.examples) // len(self.positions)

    def part(self, numbers: Iterable[int]) -> Split:
        """Returns the split's groups of these numbers, counted from 0: each once, in the split's order."""
        groups = list(dict.fromkeys(example.group for example in self.examples))
        wanted = {groups[number] for number in numbers}
        return replace(self, examples=tuple(e for e in self.examples if e.group in wanted))

    @property
    def max_tokens(self) -> int:
        """Length of the longest prompt with its answer, in tokens."""
        return max(example.num_tokens for example in self.examples)

    def fingerprint(self) -> str:
        """Returns a hash of the examples' token ids, so that a report can name the data it stands on."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr((example.context_ids, example.asked_ids, example.answer_ids)).encode())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Returns name, seed, sizes, what is measured and a fingerprint, for a report."""
        described = {
            "name": self.name,
            "seed": self.seed,
            "groups": self.num_groups,
            "examples": len(self.examples),
            "max_tokens": self.max_tokens,
            "measure": self.measure,
            "fingerprint": self.fingerprint(),
            "protocol": self.protocol,
            "targets": self.targets and dict(self.targets),
        }
        return {name: value for name, value in described.items() if value not in ("", None)}

    def judged(self) -> dict[str, Any]:
        """Returns how right answers are told, for a report."""
        if self.measure == "loss":
            return {"by": "loss"}
        return self.judge.describe() if self.judge is not None else {"by": "teacher-forced"}


@runtime_checkable
class Task(Protocol):
    """A source of splits. Build a new task by giving these three members."""

    name: str
    positions: tuple[int, ...]
    """Where the answer stands, first to last, in the task's own unit (index of a pair, of a document ...)."""

    def split(self, name: SplitName, num_groups: int) -> Split:
        """Returns `num_groups` groups of the named split; the same call gives the same examples."""

    def describe(self) -> dict[str, Any]:
        """Returns the task's settings, for a report."""


def check_request(name: str, num_groups: int) -> None:
    """Raises TaskError unless `name` is a split and `num_groups` at least 1."""
    if name not in SPLIT_NAMES:
        raise TaskError(f"split {name!r} is unknown, expected one of {', '.join(SPLIT_NAMES)}.")
    whole_number("num_groups", num_groups, 1, MAX_GROUPS)


def check_enough(found: int, wanted: int, told: str) -> None:
    """Raises TaskError if fewer were found than are wanted; `told` says where, and what there is."""
    if found < wanted:
        raise TaskError(f"{told}, {wanted} were asked for.")


def check_task(task: Task) -> None:
    """Raises TaskError unless `task` is a task, and not a split of one or its class."""
    if isinstance(task, type) or not isinstance(task, Task):
        raise TaskError(
            f"task={named(task)} must be a task such as KeyValueRetrieval(tokenizer, length=4096): it needs name, "
            "positions, split() and describe()."
        )


def split_stream(seed: int, name: SplitName) -> np.random.Generator:
    """Returns the random stream of a split: independent of the others', told apart by the split's number."""
    return np.random.default_rng([seed, SPLIT_NAMES.index(name)])


def check_disjoint(splits: Sequence[Split]) -> None:
    """Checks that no two splits share a context, the premise of every held-out figure.

    Where a loss is measured the scored tokens are text like the context's, so all of a window counts.

    Raises:
        TaskError: naming the two splits and how many contexts they share.
    """
    contexts = [(split.name, {_context(example, split.measure) for example in split.examples}) for split in splits]
    for (name, some), (other, more) in combinations(contexts, 2):
        if some & more:
            raise TaskError(f"splits {name!r} and {other!r} share {len(some & more)} contexts.")


def _context(example: Example, measure: Measure) -> tuple[int, ...]:
    return example.context_ids + (example.query_ids + example.answer_ids if measure == "loss" else ())


def spread_positions(num_items: int, num_positions: int) -> tuple[int, ...]:
    """Returns `num_positions` indices spread evenly over `num_items`, first and last included; raises TaskError if they
    are fewer than 3 (first, middle, last), or more than the items.
    """
    if not 3 <= num_positions <= num_items:
        raise TaskError(
            f"{num_positions} gold positions among {num_items} items: expected 3 (first, middle, last) to {num_items}."
        )
    # rounded down, which gives the published positions: 0, 18, 37, 55, 74 of 75 and 0, 34, 69, 104, 139 of 140
    return tuple(i * (num_items - 1) // (num_positions - 1) for i in range(num_positions))


def cut_into_splits(
    shared: Sequence[Hashable], seed: int, source: str, fractions: Sequence[float] = FRACTIONS
) -> dict[SplitName, list[int]]:
    """Shuffles records by the seed and cuts them into splits: returns the records' numbers by split; raises TaskError
    if one would be empty.

    `shared` has for each record what no two splits may share: those that agree in it go to one split together. What the
    fractions leave is in no split. `source`, for messages, is where the records come from.
    """
    units: dict[Hashable, list[int]] = {}
    for number, unit in enumerate(shared):
        units.setdefault(unit, []).append(number)
    members = list(units.values())
    limits = np.floor(np.cumsum(fractions) * len(shared) + 1e-9)
    splits: dict[SplitName, list[int]] = {name: [] for name in SPLIT_NAMES}
    taken = 0
    for index in np.random.default_rng(seed).permutation(len(members)).tolist():
        taken += len(members[index])
        place = np.searchsorted(limits, taken)
        if place < len(SPLIT_NAMES):
            splits[SPLIT_NAMES[place]] += members[index]
    for name, numbers in splits.items():
        if not numbers:
            raise TaskError(
                f"{source} has {len(shared)} records, {len(members)} of them independent: too few, split {name!r} "
                "would be empty."
            )
    return splits


class TokenTask:
    """Splits a given list of examples, by whole groups.

    Args:
        examples: every group must hold one example per position.
        positions: what the examples' position indices stand for; default: the indices themselves.
        seed: decides which group goes to which split.
        fractions: shares of the groups for search, validation and test.
        name: shown in reports.

    Raises:
        TaskError: a split would be empty.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        positions: Sequence[int] | None = None,
        *,
        seed: int = 0,
        fractions: Sequence[float] = FRACTIONS,
        name: str = "token_task",
    ) -> None:
        self.name = name
        self.seed = seed
        groups: dict[int, list[Example]] = {}
        for example in examples:
            groups.setdefault(example.group, []).append(example)
        numbers = sorted(groups)
        self._groups = {
            split: [groups[numbers[index]] for index in members]
            for split, members in cut_into_splits(numbers, seed, name, fractions).items()
        }
        last = max(example.position for example in examples)
        self.positions = tuple(positions) if positions is not None else tuple(range(1 + last))

    def available(self, name: SplitName, most: int) -> int:
        """Returns how many groups a split has, but no more than `most`."""
        return min(most, len(self._groups[name]))

    def split(self, name: SplitName, num_groups: int) -> Split:
        """Returns the first `num_groups` groups of the named split.

        Raises:
            TaskError: the split is unknown or has fewer groups, or one of them is incomplete.
        """
        check_request(name, num_groups)
        members = self._groups[name]
        check_enough(len(members), num_groups, f"split {name!r} has {len(members)} groups")
        examples = [example for group in members[:num_groups] for example in group]
        return Split(name, self.seed, self.positions, tuple(examples))

    def describe(self) -> dict[str, Any]:
        """Returns the task's settings, for a report."""
        sizes = {name: len(groups) for name, groups in self._groups.items()}
        return {"name": self.name, "seed": self.seed, "positions": list(self.positions), "groups": sizes}
