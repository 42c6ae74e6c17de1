"""What a search keeps in its journal: measurements, scores, populations, and the path of the gradient steps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from ..errors import SearchError
from ..files.strict_json import to_float, to_json
from ..runs import Journal
from ..scoring.scores import PositionScores
from .grid import Factors
from .measurement import HeatScores, Measurement


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
