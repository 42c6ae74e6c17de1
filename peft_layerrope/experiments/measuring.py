"""How experiments measure: held-out examples, and contenders put onto one model in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from ..comparison.compare import compare
from ..comparison.contenders import Contender
from ..errors import AdapterMismatchError, TaskError
from ..scoring.scorer import DEFAULT_BATCH_TOKENS
from ..scoring.scores import PositionScores
from ..searcher.progress import SearchProgress, SilentProgress
from ..tasks import Split, Task
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import find_stack, trained_window

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
    audience: SearchProgress = field(default_factory=SilentProgress)

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
        FolderInUseError: another run is at work in the same folder.
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


def times_window(tokens: int, window: int | None) -> str:
    """`" = 2.0× the trained window"`, or nothing where that is not known."""
    return f" = {tokens / window:.1f}× the trained window" if window else ""


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
