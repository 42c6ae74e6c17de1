"""What both kinds of search do alike: their data, their journal, the look at the unscaled model, the config."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from .. import __version__
from ..base_model import describe_loading, library_versions, model_fingerprint
from ..errors import SearchError, TaskError
from ..files import to_float, to_json, write_atomically, writing
from ..messages import DEMO_NAME, public_name
from ..runs import Journal
from ..scoring.batching import check_vocabulary
from ..scoring.preflight import PREFLIGHT_NAME, Preflight, preflight, prepared, with_targets
from ..scoring.scorer import Scorer
from ..scoring.scores import PositionScores
from ..tasks import PromptTask, Split, SplitName, Task, check_disjoint
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import embedding_table, trained_window
from .evaluator import HeatScores, Measurement
from .plan import PREFLIGHT, SearchProgress, check_length
from .settings import SearchSettings
from .space import Factors


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
        check_vocabulary(model, split.examples)
    return data


def _short_split(task: Task, settings: SearchSettings, length: int) -> Split | None:
    if settings.guards.max_short_rise is None or not hasattr(task, "shortened"):
        return None
    try:
        return task.shortened(length).split("search", settings.short_groups)
    except TaskError:  # the task does not fit into half the window
        return None


class SearchJournal(Journal):
    """See [`Journal`]. What was measured together is one entry, so that a search never goes on from a part of it."""

    _num_populations = 0

    @cached_property
    def measurements(self) -> dict[Factors, Measurement]:
        """All that was measured, in the order in which it began."""
        found: dict[Factors, Measurement] = {}
        with self.reading():
            for batch in self.values("measured"):
                for factors, heat, values, tail in batch:
                    known = found.get(tuple(factors), Measurement())
                    if len(known.heats) != heat:
                        raise ValueError(f"heat {heat} of {factors} follows {len(known.heats)} others")
                    found[tuple(factors)] = known.plus(HeatScores(_numbers(values), _numbers(tail)))
        return found

    @cached_property
    def scores(self) -> dict[tuple[str, Factors], PositionScores]:
        """Full scores by split and vector."""
        with self.reading():
            return {
                (split, tuple(factors)): PositionScores.from_plain(plain)
                for batch in self.values("scored")
                for split, factors, plain in batch
            }

    @property
    def gradient_path(self) -> list[Factors] | None:
        """The vectors that the gradient steps went through; None before they were taken."""
        path = self.get("gradient path", None)
        with self.reading():
            return None if path is None else [tuple(map(float, vector)) for vector in path]

    def add_measurements(self, new: Mapping[Factors, Measurement]) -> None:
        """Keeps the last heat of each measurement."""
        self.measurements.update(new)
        batch = [
            [vector, len(measured.heats) - 1, measured.heats[-1].values, measured.heats[-1].tail]
            for vector, measured in new.items()
        ]
        self.append("measured", len(self.values("measured")), batch)

    def add_scores(self, split: str, scores: Mapping[Factors, PositionScores]) -> None:
        """Keeps full scores on a split other than the search split."""
        self.scores.update({(split, vector): found for vector, found in scores.items()})
        batch = [[split, vector, found.to_plain()] for vector, found in scores.items()]
        self.append("scored", len(self.values("scored")), batch)

    def add_generation(self, stage: str, population: list[list[float]], random_state: list[Any]) -> None:
        """Keeps a generation; in a resumed run, compares it with what the interrupted one had.

        Raises:
            SearchError: they differ: the run is not reproducible here.
        """
        number, now = self._num_populations, json.loads(to_json([stage, population, random_state]))
        before = self.get("population", number)
        if before is None:
            self.append("population", number, now)
        elif before != now:
            raise SearchError(
                f"the resumed search differs from the interrupted one in generation {number} of {stage!r}: its "
                "libraries or its machine changed. Begin anew, overwriting it."
            )
        self._num_populations += 1

    def add_gradient_path(self, vectors: Iterable[Factors]) -> None:
        """Keeps the vectors that the gradient steps went through."""
        self.append("gradient path", None, list(vectors))

    def log(self, event: str, **values: Any) -> None:
        """Adds an entry for people and tools that follow the run."""
        self.append(event, None, values)


def _numbers(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(map(to_float, values))


def look(
    scorer: Scorer,
    task: PromptTask,
    settings: SearchSettings,
    wanted: Mapping[SplitName, int],
    folder: Path | None,
    audience: SearchProgress,
) -> Preflight:
    """Returns what the unscaled model writes; of a search that goes on in `folder`, what it wrote then."""
    path = folder / PREFLIGHT_NAME if folder is not None else None
    if path is not None and path.exists():
        return Preflight.load(path)
    audience.stage(PREFLIGHT, len(wanted))

    def tell(text: str) -> None:
        audience.advance()
        audience.note(text.removeprefix("preflight: "))

    return preflight(scorer, task, num_groups=settings.preflight_groups, wanted=wanted, tell=tell)


def keep_look(folder: Path | None, found: Preflight | None) -> None:
    """Writes what the unscaled model wrote into the folder of a search, in place of what another one found there."""
    if folder is None:
        return
    path = folder / PREFLIGHT_NAME
    if found is not None:
        write_atomically(path, to_json(found.to_plain()) + "\n")
    else:
        with writing(path):
            path.unlink(missing_ok=True)


def identity_of(model: nn.Module, task: Task, settings: Mapping[str, Any], splits: Sequence[Split]) -> dict[str, Any]:
    """Returns what a search depends on, as JSON values."""
    return {
        "settings": dict(settings),
        "task": task.describe(),
        "splits": [split.describe() for split in splits],
        "model": model_fingerprint(model),
        "base": describe_loading(model),
        "versions": library_versions(),
        "device": embedding_table(model).device.type,
    }


def model_name(model: nn.Module) -> str:
    """Returns the model's Hub id, or a name without the path for one loaded from a folder."""
    return public_name(model.config._name_or_path or type(model).__name__)


def adapter_config(
    model: PeftModel, settings: SearchSettings, factors: Factors, name: str, **provenance: Any
) -> LayerRopeConfig:
    """Returns the config of an adapter with these factors, for the base model called `name`."""
    config = settings.adapter_config(list(factors), searcher_version=__version__, **provenance)
    if config.rope_type == "dynamic" and config.original_max_position_embeddings is None:
        config.original_max_position_embeddings = trained_window(model)
    config.base_model_name_or_path = DEMO_NAME if name == DEMO_NAME else model.config._name_or_path
    return config


def since(started: float) -> float:
    """Seconds since a reading of `time.perf_counter()`, which no step of the clock makes negative."""
    return max(0.0, time.perf_counter() - started)
