"""A look at the unscaled model before anything long begins: does it answer at all, by which tokens, and is there a
middle to mend?
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TaskError, shown
from ..files import to_json, write_atomically
from ..tasks.base import Example, Split, SplitName, Task
from ..tasks.prompts import ASKED_EVERYWHERE, PromptTask
from ..tasks.targets import Target, Targets, common_opening, target_of
from ..tuner.sites import trained_window
from .generation import Written, judge_written
from .scorer import Scorer
from .scores import PositionScores

PREFLIGHT_NAME = "preflight.json"
"""What the unscaled model wrote, kept for a run that may be resumed; it holds texts, and is never pushed."""
PREFLIGHT_GROUPS = 8
"""Contexts of the search split that the unscaled model is asked."""
FLOOR, CEILING = 0.05, 0.98
"""A model that is at or below the one at every position, or at or above the other, has nothing to be told apart by."""
AUTO_GROUPS = 4
"""Contexts of each number of items that is tried: whether it is about right is all that has to be known."""
AUTO_LOW, AUTO_HIGH = 0.4, 0.9
"""Between these the mean over positions is to lie where the difficulty is chosen."""

_PLAIN = ("gold_alone", "closed_book", "answerable", "window_share")
_SHOWN_SAMPLES = 3
_TRIED_AT_ONCE = 16  # questions
_MOST_TRIED = 4  # questions for each that is needed: a model that answers fewer is not worth the search


@dataclass(frozen=True)
class Preflight:
    """What was found; what is known of single questions is None where the task has none."""

    scores: PositionScores  # of the answers that the unscaled model wrote, on a few contexts of the search split
    targets: Targets | None  # how it writes answers; None where that could not be learnt
    samples: tuple[dict[str, Any], ...]  # a few of its answers: what was asked, what is accepted, what was written
    gold_alone: tuple[float, int] | None  # share of right answers with the gold item alone, and of how many
    closed_book: tuple[float, int] | None  # the same with nothing but the question
    answerable: tuple[int, ...] | None  # lines of the questions that it answers with the gold item alone
    window_share: float | None  # longest prompt, divided by the trained window; None if that is not known

    def check(self, task: PromptTask, ceiling: float = CEILING) -> None:
        """Raises TaskError unless the model answers often enough, but not always, which is below the `ceiling` at one
        position at least; the message shows samples.
        """
        by_position = self.scores.accuracy_by_position
        values = " / ".join(f"{100 * value:.0f}" for value in by_position)
        start = f"the unscaled model answers {values} % of the prompts by position"
        size = f"{task.item}s ({task.size_setting} is {task.size})"
        if (by_position <= FLOOR).all() or self.targets is None:
            shows = "; ".join(f"{shown(s['written'])} where {shown(s['answers'][0])} is right" for s in self.samples)
            reason = "nothing is left to tell vectors apart by"
            if self.targets is None:
                reason = "too few right answers to learn how they are written"
            advice = f"Use fewer {size}, another form of prompt (chat_template), or another model"
            raise TaskError(f"{start}: {reason}. It wrote {shows}. {advice}.")
        if (by_position >= ceiling).all():
            raise TaskError(f"{start}: there is no lost middle to mend. Use more {size}.")

    def remarks(self) -> list[str]:
        """Returns what a reader should know beside the figures, in a few lines."""
        by_position = " / ".join(f"{100 * value:.0f}" for value in self.scores.accuracy_by_position)
        share = f", prompts fill {self.window_share:.1%} of the trained window" if self.window_share else ""
        groups = len(self.scores.correct)
        start = f"preflight: the unscaled model answers {by_position} % by position of {groups} search contexts"
        lines = [f"{start}{share}."]
        if self.targets is None:
            lines.append("targets: too few right answers to learn how the model writes one.")
        elif self.targets.opening is not None:
            lines.append(
                f"targets: the model opens an answer with {self.targets.opening!r} "
                f"({self.targets.num_agreeing} of {self.targets.num_samples} right answers)."
            )
        else:
            lines.append(f"targets: {self.targets.num_agreeing} of {self.targets.num_samples} questions have one.")
        tried = {"with the gold item alone": self.gold_alone, "closed-book": self.closed_book}
        known = [f"{100 * value[0]:.1f} % {name} ({value[1]} questions)" for name, value in tried.items() if value]
        return [*lines, *([f"single questions: {', '.join(known)}."] if known else [])]

    def to_plain(self) -> dict[str, Any]:
        """Returns everything as JSON values, texts included; see [`from_plain`]."""
        return {
            "scores": self.scores.to_plain(),
            "targets": self.targets.to_plain() if self.targets is not None else None,
            "samples": list(self.samples),
            **{name: getattr(self, name) for name in _PLAIN},
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Preflight:
        """The inverse of [`to_plain`]."""
        values = {name: tuple(v) if isinstance(v := plain[name], list) else v for name in _PLAIN}
        targets = Targets.from_plain(plain["targets"]) if plain["targets"] is not None else None
        return cls(PositionScores.from_plain(plain["scores"]), targets, tuple(plain["samples"]), **values)

    def save(self, folder: Path) -> None:
        """Keeps it in the folder of a run, where [`preflight`] finds it."""
        write_atomically(folder / PREFLIGHT_NAME, to_json(self.to_plain()) + "\n")

    def describe(self) -> dict[str, Any]:
        """Returns plain values for a report; no texts."""
        tried = {"gold_alone": self.gold_alone, "closed_book": self.closed_book}
        scores = self.scores.to_dict()
        del scores["log_prob_by_position"]  # nothing was known yet of which the likelihood could have been taken
        return {
            **scores,
            "groups": len(self.scores.correct),
            "targets": self.targets.describe() if self.targets is not None else None,
            "window_share": round(self.window_share, 4) if self.window_share is not None else None,
            **{name: {"accuracy": value[0], "questions": value[1]} for name, value in tried.items() if value},
        }


def preflight(
    scorer: Scorer,
    task: PromptTask,
    *,
    num_groups: int = PREFLIGHT_GROUPS,
    wanted: Mapping[SplitName, int] | None = None,
    tell: Callable[[str], Any] | None = None,
    kept: Path | None = None,
) -> Preflight:
    """Has the unscaled model answer a few contexts of the search split, all if there are fewer, and learns its targets.

    Where each question has an opening of its own, it is also asked single questions with the gold item alone, for as
    many contexts by split as are `wanted`, by default those: of the search split until so many questions are answered,
    of the others all. What a run that goes on found then is returned, if it is in the folder `kept`.

    Raises:
        TaskError: the task has not so many contexts, prompts do not fit, or what was kept cannot be read.
    """
    if kept is not None and (path := kept / PREFLIGHT_NAME).exists():
        try:
            return Preflight.from_plain(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise TaskError(f"{path} cannot be read ({error!r}): start again with --overwrite.") from error
    say = tell or (lambda text: None)
    say("the unscaled model's answers")
    split = task.split("search", max(1, task.available("search", num_groups)))
    written = scorer.write(split)
    blank = np.zeros((split.num_groups, len(split.positions)))
    scores = judge_written(split, written, PositionScores(split.positions, blank.astype(bool), blank))
    found = [target_of(w.ids, e.answers, task.judge) for w, e in zip(written, split.examples, strict=True)]
    gold_alone, closed_book, answerable = None, None, None
    if task.without_distractors("search", 0, 1, gold=True) is None:
        targets = common_opening(split.examples, found, task.tokenizer)
    else:
        wanted = dict(wanted or {"search": num_groups})
        say("the gold item alone")
        targets, gold_alone, answerable = _own_targets(scorer, task, wanted)
        say("closed-book")
        asked = task.without_distractors(next(iter(wanted)), 0, gold_alone[1], gold=False)
        closed_book = _accuracy(scorer, asked), len(asked.examples)
    window = trained_window(scorer.model)
    samples = _samples(split, written, scores)
    share = split.max_tokens / window if window else None
    return Preflight(scores, targets, samples, gold_alone, closed_book, answerable, share)


def _own_targets(
    scorer: Scorer, task: PromptTask, wanted: Mapping[SplitName, int]
) -> tuple[Targets | None, tuple[float, int], tuple[int, ...]]:
    """The targets of single questions, each answered with its gold item alone; the accuracy is that of the first split
    that is wanted, and the numbers are of the search split's questions that were answered.
    """
    own: dict[str, Target] = {}
    accuracies: dict[SplitName, tuple[float, int]] = {}
    answerable: list[int] = []
    for name, count in wanted.items():
        needed = count
        if task.protocol(name) == ASKED_EVERYWHERE:  # a round of contexts asks a round of questions
            needed = -(-count // len(task.positions)) * len(task.positions)
        tried, right = 0, 0
        while (right if name == "search" else tried) < needed and tried < _MOST_TRIED * needed:
            split = task.without_distractors(name, tried, tried + min(_TRIED_AT_ONCE, needed), gold=True)
            if split is None:
                break
            tried += len(split.examples)
            answered = _answered(scorer, split)
            own |= {example.question: target for example, target in answered}
            right += len(answered)
            if name == "search":
                answerable += [example.group for example, _ in answered]
        accuracies[name] = (right / max(tried, 1), tried)
    accuracy, tried = next(iter(accuracies.values()))
    targets = Targets(None, own, sum(n for _, n in accuracies.values()), len(own)) if own else None
    return targets, (accuracy, tried), tuple(answerable)


def _answered(scorer: Scorer, split: Split) -> list[tuple[Example, Target]]:
    written = zip(split.examples, scorer.write(split), strict=True)
    found = [(example, target_of(answer.ids, example.answers, split.judge)) for example, answer in written]
    return [(example, target) for example, target in found if target is not None]


def _accuracy(scorer: Scorer, split: Split) -> float:
    return len(_answered(scorer, split)) / len(split.examples)


def _samples(split: Split, written: Sequence[Written], scores: PositionScores) -> tuple[dict[str, Any], ...]:
    """Wrong answers first, since they show what is the matter."""
    order = sorted(range(len(written)), key=lambda i: scores.correct.flatten()[i])[:_SHOWN_SAMPLES]
    examples = split.examples
    return tuple(
        {"question": examples[i].question, "answers": list(examples[i].answers), "written": written[i].text}
        for i in order
    )


def find_difficulty(
    scorer: Scorer,
    task: PromptTask,
    *,
    num_groups: int = AUTO_GROUPS,
    tell: Callable[[int, float], Any],
) -> PromptTask:
    """Returns the task with so many items, found by bisection, that the unscaled model's accuracy, averaged over the
    positions, lies between `AUTO_LOW` and `AUTO_HIGH`; its own `num_items` is the most that may be taken. `tell` is
    told each number that is tried, and its accuracy.

    Raises:
        TaskError: no number reaches `AUTO_LOW`, or even the most items leave it above `AUTO_HIGH`; the message
            shows the curve.
    """
    curve: list[tuple[int, float]] = []
    low, high = max(len(task.positions), 2), task.num_items
    size = min(high, max(4 * low, high // 5))
    while low <= high:
        sized = task.resized(size, task.length)
        value = _accuracy(scorer, sized.split("search", max(1, sized.available("search", num_groups))))
        curve.append((size, value))
        tell(size, value)
        if AUTO_LOW <= value <= AUTO_HIGH:
            return sized
        if value > AUTO_HIGH:
            low = size + 1
            # nothing harder is known to be too hard yet: double rather than halve the distance
            size = min(high, 2 * size) if all(v > AUTO_HIGH for _, v in curve) else (low + high) // 2
        else:
            high = size - 1
            size = (low + high) // 2
    texts = ", ".join(f"{100 * value:.0f} % of {count}" for count, value in sorted(curve))
    if all(value < AUTO_LOW for _, value in curve):
        way, advice = "answers too little", "Use another form of prompt (chat_template), other keys, or another model"
    elif all(value > AUTO_HIGH for _, value in curve):
        way, advice = "answers nearly all of the most", f"Use a larger length, which is {task.length}"
    else:
        way, advice = "has no such number in its curve", f"Choose {task.size_setting} yourself"
    raise TaskError(
        f"no number of {task.item}s gives the unscaled model between {AUTO_LOW:.0%} and {AUTO_HIGH:.0%} right answers: "
        f"it {way} ({texts} {task.item}s). {advice}."
    )


def prepared(task: PromptTask, found: Preflight) -> PromptTask:
    """Returns the task whose search split has only questions that the model can answer; others stay as they are."""
    return task if found.answerable is None else task.with_answerable(found.answerable)


def with_targets(split: Split, found: Preflight | None, task: Task) -> Split:
    """Returns a split with the targets that were learnt, if they were."""
    return found.targets.applied(split, task.tokenizer) if found is not None and found.targets is not None else split
