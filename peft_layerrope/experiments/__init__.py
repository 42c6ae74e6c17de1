"""The paper's experiments: functions from a `Measuring`, a task and an adapter's config to a `Section`.

The model is left as it was found, and an adapter is judged on contexts of the test split. What does not apply raises a
LayerRopeError: a TaskError for a task without the gold positions or contexts that are needed, an AdapterMismatchError
for an adapter with another number of layers, a SearchError for factors or a curve that cannot be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..comparison import compare
from ..comparison.candidates import Candidate
from ..errors import SearchError, TaskError
from ..report import Unit, times_window
from ..scoring.scorer import DEFAULT_BATCH_TOKENS
from ..scoring.scores import Interval, PositionScores, mean_interval, paired_interval
from ..searcher.plan import SearchProgress
from ..tasks.base import Measure, Split, SplitName, Task
from ..tasks.specification import MakeTask, TaskSpecification, task_of_length
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import find_stack, trained_window

DEFAULT_GROUPS = {
    "u-shape": 100,
    "sweep": 50,
    "sensitivity": 16,
    "halves": 100,
    "control-points": 50,
    "attention": 20,
    "extrapolation": 30,
    "transfer": 50,
}
"""Contexts of each experiment, by its name on the command line."""


@dataclass
class Measuring:
    """What experiments measure with; it remembers what fits into memory."""

    model: nn.Module  # a transformers causal language model without an adapter; left as it was found
    num_groups: int  # contexts; each is asked at every position. Over fewer than two, intervals are infinite
    batch_tokens: int = DEFAULT_BATCH_TOKENS  # per forward pass; halved for good whenever memory runs out
    folder: Path | None = None  # where finished parts are kept; None: nowhere
    resume: bool = False  # whether to go on with those in `folder`; else they are replaced
    audience: SearchProgress = field(default_factory=SearchProgress)  # whom to tell how far it is

    @property
    def window(self) -> int | None:
        return trained_window(self.model)

    def split(self, task: Task, name: SplitName = "test") -> Split:
        """Returns contexts of the task; raises TaskError if it cannot give so many."""
        return task.split(name, self.num_groups)

    def split_by_position(self, task: Task, experiment: str) -> Split:
        """Returns held-out contexts whose answers are right or wrong at three positions at least, or raises TaskError
        if the task has no such positions, or cannot give so many contexts.
        """
        split = self.split(task)
        if split.measure == "loss" or len(split.positions) < 3:
            found = "measures a loss" if split.measure == "loss" else f"has {len(split.positions)}"
            raise TaskError(f"{experiment} needs 3 gold positions (first, middle, last); task {task.name} {found}.")
        return split

    def scores(
        self, split: Split, candidates: Sequence[Candidate], stage: str, part: str = ""
    ) -> dict[str, PositionScores]:
        """Scores each candidate on the same examples, and returns the scores by label. The audience is told of a
        `stage`; `part` names what is kept of an experiment with several splits.
        """
        told = None

        def tell(label: str, done: int, total: int) -> None:
            nonlocal told
            if told is None:
                self.audience.stage(stage, total)
                told = 0
            for _ in range(told, done):
                self.audience.advance()
            told = done
            self.audience.note(label if done < total else "")

        kept = {}
        if self.folder is not None:
            kept = {"folder": self.folder / part, "resume": self.resume, "overwrite": not self.resume}
        found = compare(self.model, split, candidates, batch_tokens=self.batch_tokens, progress=tell, **kept)
        self.batch_tokens = found.batch_tokens
        return dict(found.scores)

    def described(self, task: Task, split: Split) -> str:
        """Says in one line what was measured."""
        return (
            f"{task.name}, {split.max_tokens} tokens{times_window(split.max_tokens, self.window)}, "
            f"{split.num_groups} contexts of the {split.name} split (seed {split.seed})"
        )


def factor_vector(model: nn.Module, config: LayerRopeConfig) -> list[float]:
    """Returns the adapter's factors, one per layer; raises AdapterMismatchError if the model has another number."""
    return config.resolved_layer_factors(len(find_stack(model).layers))


def with_factors(model: nn.Module, config: LayerRopeConfig, factors: Sequence[float]) -> LayerRopeConfig:
    """Returns `config` with other factors; layers that borrow keys take those of the layers they borrow from."""
    return replace(config, layer_factors=[factors[source] for source in find_stack(model).key_sources])


def in_force(config: LayerRopeConfig) -> str:
    """What stays when all of the adapter's factors are 1, in brackets; nothing for the plain rope."""
    return "" if config.rope_type == "default" else f" ({config.rope_type}, factor {config.factor:g} stays in force)"


def tried_factors(factors: Iterable[float]) -> tuple[float, ...]:
    """Returns the factors other than 1, ascending, each once; raises InvalidConfigError if a layer cannot have one."""
    found = sorted({*LayerRopeConfig(layer_factors=list(factors)).layer_factors} - {1.0})
    if not found:
        raise SearchError("a factor other than 1 must be tried: 1 is the unscaled model, to which others are compared.")
    return tuple(found)


def default_lengths(
    make: MakeTask, specification: TaskSpecification, window: int, times: tuple[float, ...] = (1, 2, 4)
) -> tuple[dict[int, Task], dict[int, str]]:
    """Returns the task at multiples of the trained window, and why it is not there at others."""
    tasks, refused = {}, {}
    for length in dict.fromkeys(int(factor * window) for factor in times):
        try:
            tasks[length] = task_of_length(make, specification, length)
        except TaskError as error:
            refused[length] = str(error)
    return tasks, refused


def window_and_task(make: MakeTask, specification: TaskSpecification, window: int | None) -> list[Task]:
    """Returns the task at the trained window, where it can be made that long, and at its own length."""
    task = make(specification)
    if window is None or specification.length == window:
        return [task]
    at_window, _ = default_lengths(make, specification, window, (1,))
    return [*at_window.values(), task]


def verdict(subject: str, other: str, difference: Interval, unit: Unit) -> str:
    """Says whether `subject` scores higher or lower than `other`; that it is not known, where the interval holds 0."""
    change = unit.change_in_words(difference)
    if not difference.excludes_zero():
        return f"{subject} against {other}: no difference beyond noise ({change})."
    return f"{subject} {'beats' if difference.value > 0 else 'falls behind'} {other}: {change}."


def utilization_difference(scores: PositionScores, other: PositionScores) -> Interval:
    """U of `scores` minus that of `other` on the same examples, paired; minus the mean loss where that is measured."""
    return paired_interval(scores.utilization_by_group(), other.utilization_by_group(), scores.measure)


def log_prob_difference(scores: PositionScores, other: PositionScores) -> Interval:
    """U of the gold log-probabilities minus that of `other`, paired, in nats."""
    return mean_interval(scores.utilization_by_group("log_prob") - other.utilization_by_group("log_prob"))


def by_place(scores: PositionScores) -> dict[str, np.ndarray]:
    """Returns what each group scores with the answer first, in the middle (the mean of all inner positions) and last:
    shape `(groups,)` each.
    """
    values = scores.values
    return {"first": values[:, 0], "middle": values[:, 1:-1].mean(axis=1), "last": values[:, -1]}


def score_header(measure: Measure) -> tuple[str, ...]:
    """Names of the columns that sum up one candidate's scores."""
    return ("loss", "perplexity") if measure == "loss" else ("first", "middle", "last", "accuracy", "U")


def json_data(**values: Any) -> dict[str, Any]:
    """Returns tasks, splits, scores, intervals and what else a section keeps as JSON values."""
    return _plain(values)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, (Interval, PositionScores)):
        return value.to_dict()
    if hasattr(value, "describe"):
        return value.describe()
    return _plain(vars(value)) if is_dataclass(value) else value
