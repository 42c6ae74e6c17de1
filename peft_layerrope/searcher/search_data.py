"""The splits of a search: made, checked and kept apart."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..errors import SearchError, TaskError
from ..scoring.batching import check_vocabulary
from ..scoring.preflight import Preflight, prepared, with_targets
from ..tasks import Split, Task, check_disjoint
from ..tuner.sites import trained_window
from .plan import check_length
from .settings import SearchSettings


@dataclass(frozen=True)
class SearchData:
    """The splits of a search, disjoint."""

    search: Split
    validation: Split
    test: Split
    short: Split | None  # for the guard; None where the task has no shorter prompts or the guard is off

    @property
    def all(self) -> list[Split]:
        return [split for split in (self.search, self.validation, self.test, self.short) if split is not None]


def make_data(model: nn.Module, task: Task, settings: SearchSettings, found: Preflight | None = None) -> SearchData:
    """Makes and checks the splits.

    Args:
        model: what they must fit.
        task: where they come from.
        settings: how many contexts each has.
        found: how the model writes its answers, which then are the targets; of the search split's questions only those
            stay that it can answer.

    Raises:
        SearchError: exact match is to be searched for where the task measures a loss, or no factor could reach.
        TaskError: the splits cannot be made, overlap, or do not fit the model.
    """
    if found is not None:
        task = prepared(task, found)

    def made(split: Split | None) -> Split | None:
        return split if split is None or found is None else with_targets(split, found, task)

    search_split = made(task.split("search", settings.search_groups))
    if search_split.measure == "loss" and settings.objective == "accuracy":
        raise SearchError(
            f"objective='accuracy' with the task {task.name!r}, which measures a loss: nothing is right or wrong "
            "there. Use objective='log_prob'."
        )
    window = trained_window(model)
    check_length(settings, search_split.max_tokens, window)
    data = SearchData(
        search_split,
        made(task.split("validation", settings.validation_groups)),
        made(task.split("test", settings.test_groups)),
        made(_short_split(task, settings, min(search_split.max_tokens, window or search_split.max_tokens) // 2)),
    )
    check_disjoint(data.all)
    for split in data.all:
        check_vocabulary(model, split)
    return data


def _short_split(task: Task, settings: SearchSettings, length: int) -> Split | None:
    if settings.guards.max_short_rise is None or not hasattr(task, "shortened"):
        return None
    try:
        return task.shortened(length).split("search", settings.short_groups)
    except TaskError:  # the task does not fit into half the window
        return None
