"""How experiments measure: held-out examples, and contenders put onto one model in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import nn

from ..comparison import compare
from ..comparison.contenders import Contender
from ..errors import AdapterMismatchError, TaskError
from ..report import Unit, times_window
from ..scoring.scorer import DEFAULT_BATCH_TOKENS
from ..scoring.scores import Interval, PositionScores, mean_interval, paired_interval
from ..searcher.plan import SearchProgress
from ..tasks import Measure, Split, Task
from ..tasks.specification import TaskSpecification
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import find_stack, trained_window


def verdict(subject: str, other: str, difference: Interval, unit: Unit) -> str:
    """Says whether `subject` scores higher or lower than `other`; that it is not known, where the interval holds 0."""
    change = unit.change_in_words(difference)
    if not difference.excludes_zero():
        return f"{subject} against {other}: no difference beyond noise ({change})."
    return f"{subject} {'beats' if difference.value > 0 else 'falls behind'} {other}: {change}."


def utilisation_difference(scores: PositionScores, other: PositionScores) -> Interval:
    """U of `scores` minus that of `other` on the same examples, paired; minus the mean loss where that is measured."""
    return paired_interval(scores.utilisation_by_group(), other.utilisation_by_group(), scores.measure)


def log_prob_difference(scores: PositionScores, other: PositionScores) -> Interval:
    """U of the gold log-probabilities minus that of `other`, paired, in nats."""
    return mean_interval(scores.utilisation_by_group("log_prob") - other.utilisation_by_group("log_prob"))


@dataclass(frozen=True)
class Thirds:
    """Scores of each group with the answer at the first position, at the inner ones on average, and at the last."""

    first: np.ndarray
    middle: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, scores: PositionScores) -> Thirds:
        """Takes scores at three positions at least."""
        values = scores.values
        return cls(values[:, 0], values[:, 1:-1].mean(axis=1), values[:, -1])


def score_header(measure: Measure) -> tuple[str, ...]:
    """Names of the columns that sum up one contender's scores."""
    return ("loss", "perplexity") if measure == "loss" else ("first", "middle", "last", "accuracy", "U")


def interval_dict(interval: Interval) -> dict[str, float | None]:
    """An interval as JSON values; None for an end that is not finite."""
    return {name: round(value, 6) if math.isfinite(value) else None for name, value in asdict(interval).items()}


MakeTask = Callable[[TaskSpecification], Task]

_LEAST_FILL = 0.7  # prompts that are much shorter than asked for are not what the length says


def task_of_length(make: MakeTask, specification: TaskSpecification, length: int) -> Task:
    """Returns the task with prompts of up to `length` tokens: with as many items as fit.

    Raises:
        TaskError: the task cannot be made that long, or that short.
    """
    task = make(replace(specification, length=length, num_keys=None, num_documents=None))
    try:
        probe = task.split("search", 1)
    except TaskError:  # the contexts of its file are too long
        if not hasattr(task, "shortened"):
            raise
        task = task.shortened(length)
        probe = task.split("search", 1)
    if probe.max_tokens < _LEAST_FILL * length:
        raise TaskError(f"task {task.name} cannot fill {length} tokens: its prompts have {probe.max_tokens}.")
    return task


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
    try:
        return [task_of_length(make, specification, window), task]
    except TaskError:
        return [task]


MIN_GROUPS = 2  # an interval over fewer is infinite


@dataclass(frozen=True)
class Measuring:
    """How to measure, whatever the experiment.

    Args:
        batch_tokens: tokens per forward pass; halved when memory runs out.
        folder: where finished parts are kept; None: nowhere.
        resume: whether to go on with those in `folder`; else they are replaced.
        audience: whom to tell how far it is.
    """

    batch_tokens: int = DEFAULT_BATCH_TOKENS
    folder: Path | None = None
    resume: bool = False
    audience: SearchProgress = field(default_factory=SearchProgress)

    def within(self, name: str) -> Measuring:
        """Returns the same with a folder of its own for a part of an experiment."""
        return self if self.folder is None else replace(self, folder=self.folder / name)


def held_out(task: Task, num_groups: int) -> Split:
    """Returns contexts of the task's test split.

    Raises:
        TaskError: fewer groups than an interval needs, or the task cannot give them.
    """
    if num_groups < MIN_GROUPS:
        raise TaskError(f"groups={num_groups} must be at least {MIN_GROUPS}, for an interval.")
    return task.split("test", num_groups)


def need_positions(task: Task, split: Split, experiment: str) -> None:
    """Raises TaskError unless answers are right or wrong at three positions at least."""
    if split.measure == "loss":
        raise TaskError(f"{experiment} needs answers at known positions; task {task.name} measures a loss.")
    if len(split.positions) < 3:
        raise TaskError(f"{experiment} needs 3 gold positions (first, middle, last), got {len(split.positions)}.")


def measure(
    model: nn.Module, split: Split, contenders: Sequence[Contender], name: str, measuring: Measuring
) -> dict[str, PositionScores]:
    """Scores each contender on the same examples, and returns the scores by label.

    Raises:
        TaskError: see `compare`.
        BlockingIOError: another run is at work in the same folder.
        LayerRopeError: a contender that cannot be put onto the model, before anything is scored.
    """
    keeps = measuring.folder is not None
    found = compare(
        model,
        split,
        contenders,
        batch_tokens=measuring.batch_tokens,
        folder=measuring.folder,
        resume=keeps and measuring.resume,
        overwrite=keeps and not measuring.resume,
        progress=_Told(name, measuring.audience),
    )
    return dict(found.scores)


class _Told:
    """Passes the progress of one comparison on as one stage."""

    def __init__(self, name: str, audience: SearchProgress) -> None:
        self._name, self._audience, self._done = name, audience, None

    def __call__(self, label: str, done: int, total: int) -> None:
        if self._done is None:
            self._audience.stage(self._name, total)
            self._done = 0
        for _ in range(done - self._done):
            self._audience.advance()
        self._done = done
        self._audience.note(label if done < total else "")


def measured_on(model: nn.Module, task: Task, split: Split) -> str:
    """Says in one line what was measured."""
    return (
        f"{task.name}, {split.max_tokens} tokens{times_window(split.max_tokens, trained_window(model))}, "
        f"{split.num_groups} contexts of the {split.name} split (seed {split.seed})"
    )


def factor_vector(model: nn.Module, config: LayerRopeConfig) -> list[float]:
    """Returns the adapter's factors, one per layer.

    Raises:
        AdapterMismatchError: the model has another number of layers.
    """
    num_layers = len(find_stack(model).layers)
    factors = config.resolved_layer_factors(num_layers)
    if len(factors) != num_layers:
        raise AdapterMismatchError(f"the adapter has {len(factors)} factors, the model {num_layers} layers.")
    return factors


def with_factors(model: nn.Module, config: LayerRopeConfig, factors: Sequence[float]) -> LayerRopeConfig:
    """Returns `config` with other factors; layers that borrow keys take those of the layers they borrow from."""
    sources = find_stack(model).key_sources
    return replace(config, layer_factors=[factors[source] for source in sources])


def in_force(config: LayerRopeConfig) -> str:
    """What stays when all of the adapter's factors are 1, in brackets; nothing for the plain rope."""
    return "" if config.rope_type == "default" else f" ({config.rope_type}, factor {config.factor:g} stays in force)"
