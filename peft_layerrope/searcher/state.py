"""The state of a run on disk, so that nothing is lost when it is killed: plain JSON, replaced in one step.

A search is a function of its settings, seeds and measurements. So resuming means to run it again from the start with
the measurements that are there: it arrives where it was killed without running the model, and goes on. The population
and the random state of each generation are kept as well, and compared on the way.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SearchError
from ..files.atomic import write_atomically, writing
from ..files.kept_state import kept_state
from ..files.strict_json import to_json
from ..scoring.scores import PositionScores
from .grid import Factors
from .measurement import HeatScores, Measurement

STATE_NAME, LOG_NAME, LOCK_NAME = "state.json", "log.jsonl", "state.lock"
_FORMAT = 1


class RunState:
    """Measurements, scores and generations of one search, kept in `folder`.

    Args:
        folder: where `state.json` and `log.jsonl` are; None keeps everything in memory only.
        identity: what the run depends on: settings, data, model, versions. JSON values.
        resume: go on from what is there.

    Raises:
        SearchError: there is a state but `resume` was not asked for, none although it was, one that cannot be read,
            or one of another search; the message names the difference.
        WriteError: it cannot be written, here or later; what was there before is.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], resume: bool = False) -> None:
        self._folder = folder
        self._identity = json.loads(to_json(identity))
        self._measured: dict[Factors, str] = {}  # as JSON text, so that saving does not format everything again
        self._scored: dict[tuple[str, Factors], str] = {}
        self._generations: list[str] = []
        self._replayed = 0
        self.gradient_path: list[Factors] | None = None
        self.measurements: dict[Factors, Measurement] = {}
        self.scores: dict[tuple[str, Factors], PositionScores] = {}
        if folder is None:
            if resume:
                raise SearchError("resume=True needs the folder of the search to go on with.")
            return
        path = folder / STATE_NAME
        if resume:
            self._load(path)
        elif path.exists():
            raise SearchError(f"{folder} holds an unfinished or finished search: resume it, or use another folder.")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._save()

    @property
    def num_measurements(self) -> int:
        """How many vectors an earlier run left."""
        return len(self.measurements)

    def add_measurements(self, new: Mapping[Factors, Measurement]) -> None:
        """Keeps measurements, each in place of a shorter one of its vector."""
        for vector, measured in new.items():
            self.measurements[vector] = measured
            heats = [[list(heat.values), list(heat.tail)] for heat in measured.heats]
            self._measured[vector] = to_json([list(vector), heats])
            self.log("measured", factors=list(vector), heats=len(heats), last_mean=float(np.mean(heats[-1][0])))
        self._save()

    def add_scores(self, split: str, scores: Mapping[Factors, PositionScores]) -> None:
        """Keeps full scores on a split other than the search split."""
        for vector, found in scores.items():
            self.scores[split, vector] = found
            self._scored[split, vector] = to_json([split, list(vector), *found.to_plain()])
            self.log("scored", split=split, factors=list(vector), value=float(found.values.mean()))
        self._save()

    def add_generation(self, stage: str, population: list[list[float]], random_state: list[Any]) -> None:
        """Keeps a generation; in a resumed run, compares it with what the interrupted one had.

        Raises:
            SearchError: they differ: the run is not reproducible here.
        """
        text = to_json([stage, population, random_state])
        if self._replayed < len(self._generations):
            if self._generations[self._replayed] != text:
                raise SearchError(
                    f"the resumed search differs from the interrupted one in generation {self._replayed} of {stage!r}: "
                    "its libraries or its machine changed. Start again with --overwrite."
                )
        else:
            self._generations.append(text)
            self._save()
        self._replayed += 1

    def add_gradient_path(self, vectors: Iterable[Factors]) -> None:
        """Keeps the vectors that the gradient steps went through."""
        self.gradient_path = list(vectors)
        self.log("gradient_path", factors=[list(vector) for vector in self.gradient_path])
        self._save()

    def log(self, event: str, **values: Any) -> None:
        """Appends a line to `log.jsonl`, for people and tools that follow the run."""
        if self._folder is not None:
            line = to_json({"time": round(time.time(), 3), "event": event, **values})
            path = self._folder / LOG_NAME
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _save(self) -> None:
        if self._folder is None:
            return
        parts = {
            "measurements": self._measured.values(),
            "scores": self._scored.values(),
            "generations": self._generations,
        }
        body = ",\n".join(f'"{name}": [{_lines(items)}]' for name, items in parts.items())
        path = self.gradient_path
        head = to_json({"format": _FORMAT, "identity": self._identity, "gradient_path": path})[1:-1]
        write_atomically(self._folder / STATE_NAME, f"{{{head},\n{body}}}\n")

    def _load(self, path: Path) -> None:
        with kept_state(path, _FORMAT, self._identity, "search", SearchError) as content:
            for factors, heats in content["measurements"]:
                vector = tuple(map(float, factors))
                parts = tuple(HeatScores(_numbers(values), _numbers(tail)) for values, tail in heats)
                self.measurements[vector] = Measurement(parts)
                self._measured[vector] = to_json([factors, heats])
            for split, factors, *plain in content["scores"]:
                key = split, tuple(map(float, factors))
                self.scores[key] = PositionScores.from_plain(plain)
                self._scored[key] = to_json([split, factors, *plain])
            path_taken = content["gradient_path"]
            if path_taken is not None:
                self.gradient_path = [tuple(map(float, vector)) for vector in path_taken]
            self._generations = [to_json(generation) for generation in content["generations"]]
        log = self._folder / LOG_NAME
        if log.exists():  # a line that was being written at the kill is dropped
            with writing(log):
                os.truncate(log, log.read_bytes().rfind(b"\n") + 1)  # which needs no room
        self.log("resumed", measurements=len(self.measurements))


def _numbers(values: Iterable[float | None]) -> tuple[float, ...]:
    """What was not finite is null in JSON."""
    return tuple(math.nan if value is None else float(value) for value in values)


def _lines(items: Iterable[str]) -> str:
    return ",\n".join(items)
