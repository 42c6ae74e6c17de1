"""What a search may choose from: factors of a grid on some layers, curves over depth, and families of vectors whose
logarithms are linear in a few numbers; how far each may go. Pure maths.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated

import numpy as np

from ..declaration import declared, option
from ..errors import SearchError
from ..tuner.config import FACTOR_RANGE, MAX_LAYERS

Factors = tuple[float, ...]
"""One factor per layer, every one on the grid (or exactly 1.0 for a layer left alone)."""

PAPER_LIMITS, WIDE_LIMITS = (1.0, 2.0), (0.25, 4.0)
"""Smallest and largest factor where none is given: of the paper's search, and of the other."""
_MAX_VALUES = 1000
_LIMITS = dict(zip(("ge", "le"), FACTOR_RANGE, strict=True))


_scaling = partial(option, panel="Scaling")


@declared(SearchError)
class FactorGrid:
    """Factors `min_factor, min_factor + step, .. max_factor`. The paper's grid is 1.0, 1.1 .. 2.0; its bounds stand for
    those that are not given.

    Raises:
        SearchError: a value that cannot work, bounds in the wrong order, or none or too many factors between them.
    """

    min_factor: Annotated[
        float | None, _scaling("Smallest factor of a layer. Default: 0.25; in the paper's search 1.", **_LIMITS)
    ] = None
    max_factor: Annotated[
        float | None, _scaling("Largest factor of a layer. Default: 4; in the paper's search 2.", **_LIMITS)
    ] = None
    step: Annotated[float, _scaling("paper: step of the grid that factors are rounded to.", gt=0)] = 0.1

    def __post_init__(self) -> None:
        if self.min_factor is None or self.max_factor is None:
            return
        if self.max_factor <= self.min_factor:
            raise SearchError(f"max_factor={self.max_factor} must be greater than min_factor={self.min_factor}.")
        steps = (self.max_factor - self.min_factor) / self.step
        if steps > _MAX_VALUES:
            raise SearchError(f"step={self.step} gives more than {_MAX_VALUES} values between the bounds.")
        if steps < 1 - 1e-9:
            raise SearchError(f"step={self.step} is larger than the range {self.min_factor}..{self.max_factor}.")

    def of(self, algorithm: str) -> FactorGrid:
        """Returns the grid with the algorithm's own bounds where it has none.

        Raises:
            SearchError: the bound that it has lies beyond the other.
        """
        low, high = PAPER_LIMITS if algorithm == "paper" else WIDE_LIMITS
        low = low if self.min_factor is None else self.min_factor
        return FactorGrid(low, high if self.max_factor is None else self.max_factor, self.step)

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest factor."""
        whole = self.of("paper")
        return whole.min_factor, whole.max_factor

    @property
    def values(self) -> tuple[float, ...]:
        """All factors, ascending, free of floating-point dust (1.3, not 1.3000000000000003)."""
        low, high = self.limits
        return tuple(round(low + i * self.step, 10) for i in range(int((high - low) / self.step + 1e-9) + 1))

    def snap(self, values: Sequence[float] | np.ndarray) -> list[float]:
        """Clips to the range and rounds to the grid."""
        grid = self.values
        indices = np.clip(np.rint((np.asarray(values) - grid[0]) / self.step), 0, len(grid) - 1).astype(int)
        return [grid[i] for i in indices]


def default_scaled_layers(num_layers: int) -> tuple[int, ...]:
    """Returns the layers that may be scaled: all but the first 2 of every 32, rounded (the paper's choice)."""
    return tuple(range(round(num_layers * 2 / 32), num_layers))


def parse_layers(text: str) -> tuple[int, ...]:
    """Returns the layers that a text such as `"0-3,7"` names, ascending; ranges include both ends.

    Raises:
        SearchError: not such a text, a range that ends before it begins, a layer named twice, or an index beyond any
            model's.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", part)
        if match is None:
            raise SearchError(
                f"layers_to_transform={text!r}: {part.strip()!r} is no layer or range, expected e.g. '0-3,7'."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise SearchError(f"layers_to_transform={text!r}: the range {part.strip()!r} ends before it begins.")
        if last >= MAX_LAYERS:
            raise SearchError(
                f"layers_to_transform={text!r}: layer {last} is out of range, expected at most {MAX_LAYERS - 1}."
            )
        layers += range(first, last + 1)
    if len(set(layers)) < len(layers):
        twice = [layer for layer in layers if layers.count(layer) > 1]
        raise SearchError(f"layers_to_transform={text!r}: {format_layers(twice)} must be named only once.")
    return tuple(sorted(layers))


def format_layers(layers: Iterable[int]) -> str:
    """Writes layers as ranges, `"0-3,7"`: the inverse of [`parse_layers`]."""
    ordered = sorted(set(layers))
    starts = [layer for before, layer in pairwise([None, *ordered]) if before is None or layer != before + 1]
    ends = [layer for layer, after in pairwise([*ordered, None]) if after is None or after != layer + 1]
    return ",".join(f"{start}" if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


@dataclass(frozen=True)
class FactorSpace:
    """All factor vectors of a search."""

    grid: FactorGrid
    scaled_layers: tuple[int, ...]  # whose factor is free, ascending; the others keep 1.0, or their source's factor
    # for each layer the one whose keys it attends to: itself, except in a model with a shared KV cache, where a layer
    # needs the factor of the layer that rotated the keys
    key_sources: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.key_sources)

    def spread(self, values: Sequence[float]) -> Factors:
        """Returns the full vector: `values` on the scaled layers, 1.0 on the others, sources' factors where tied."""
        factors = [1.0] * self.num_layers
        for layer, value in zip(self.scaled_layers, values, strict=True):
            factors[layer] = value
        return self.tie(factors)

    def tie(self, factors: Sequence[float]) -> Factors:
        """Returns `factors` with those of layers that borrow keys replaced by their sources'."""
        return tuple(factors[source] for source in self.key_sources)

    def family(self, rows: np.ndarray) -> np.ndarray:
        """Returns a family: the matrix, shape `(num_layers, num_parameters)`, that makes log-factors of a few numbers.
        These are `rows`, but zeros where a layer stays at 1, and its source's row where it borrows keys; numbers that
        then change nothing which those before them do not are left out.
        """
        free = np.isin(np.arange(self.num_layers), self.scaled_layers)
        made = (rows * free[:, None])[list(self.key_sources)]
        kept: list[int] = []
        for number in range(made.shape[1]):
            if np.linalg.matrix_rank(made[:, [*kept, number]]) > len(kept):
                kept.append(number)
        return made[:, kept]


_BISECTION_STEPS = 60  # halves [0, 1] to below a float64's resolution


def _cubic(p0: float, p1: float, p2: float, p3: float, t: np.ndarray) -> np.ndarray:
    u = 1.0 - t
    return u**3 * p0 + 3 * u**2 * t * p1 + 3 * u * t**2 * p2 + t**3 * p3


def sample_curve(control_points: Sequence[Sequence[float]], num_samples: int) -> np.ndarray:
    """Reads a cubic Bézier curve over the depth of a model at equally spaced depths (arXiv 2503.04355, section 3).

    Solves `x(t) = depth` by bisection (inner abscissae within [0, 1] make x(t) monotone) and returns `y(t)`, float64 of
    shape `(num_samples,)`. Depths go from 0 to 1 inclusive; a single sample is taken at depth 0.5.
    """
    x, y = np.transpose(np.asarray(control_points, dtype=np.float64))
    depths = np.linspace(0.0, 1.0, num_samples) if num_samples > 1 else np.array([0.5])
    low, high = np.zeros_like(depths), np.ones_like(depths)
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        below = _cubic(*x, middle) < depths
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    t = (low + high) / 2
    t = np.where(depths == 0, 0.0, np.where(depths == 1, 1.0, t))  # the ends are exact by definition
    return _cubic(*y, t)


@dataclass(frozen=True)
class BezierGenome:
    """The six free coordinates of a cubic Bézier curve over depth: y0, y1, y2, y3 (factors), x1, x2 (depths).

    `x1, x2` in [0, 1] keep the curve a function of depth.
    """

    space: FactorSpace

    @property
    def bounds(self) -> tuple[list[float], list[float]]:
        """Lower and upper bound of each gene."""
        low, high = self.space.grid.limits
        return [low] * 4 + [0.0] * 2, [high] * 4 + [1.0] * 2

    def random(self, rng: random.Random) -> list[float]:
        """Draws genes: factors around the middle of the range (1.5 by default)."""
        low, high = self.space.grid.limits
        heights = [min(max(rng.gauss((low + high) / 2, (high - low) / 4), low), high) for _ in range(4)]
        return [*heights, rng.random(), rng.random()]

    def decode(self, genes: Sequence[float]) -> Factors:
        """Returns one factor per layer, on the grid."""
        heights = sample_curve(self.control_points(genes), len(self.space.scaled_layers))
        return self.space.spread(self.space.grid.snap(heights))

    def control_points(self, genes: Sequence[float]) -> list[list[float]]:
        """Returns the four `(x, y)` points of the curve that the genes draw."""
        y0, y1, y2, y3, x1, x2 = genes
        return [[0.0, y0], [x1, y1], [x2, y2], [1.0, y3]]


FARTHEST = 1.0
"""Log-factor that is tried where a uniform factor does no harm."""
AIMED = 0.9
"""Share of a bound that is aimed at: what breaks it has to be made smaller and measured again."""
_MOST_GROWN = 1.25  # of log-factors that do less harm than they may: farther out nothing was seen
_SIDES_TRIED = 10  # times that it is looked up on which side of 1 each layer comes to lie


def harm_of(log_factors: np.ndarray, curvature: np.ndarray) -> float:
    """Returns the divergence that log-factors are to cause by what each layer causes alone, which grows with the square
    of its log-factor and is another below a factor of 1 than above: the two rows of `curvature`, `(2, num_layers)`.
    """
    return float(_on_its_side(log_factors, curvature) @ log_factors**2) / 2


def steepest(family: np.ndarray, slope: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """Returns the direction, of length 1, in which a value rises most for the harm that it does (see [`harm_of`]), by
    its slope along the family's parameters, shape `(num_parameters,)`.
    """
    direction = slope
    for _ in range(_SIDES_TRIED):
        sides = _on_its_side(family @ direction, curvature)
        direction = np.linalg.solve(family.T @ (sides[:, None] * family), slope)
    return direction / np.linalg.norm(direction)


def _on_its_side(log_factors: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    below, above = curvature
    return np.where(log_factors < 0, below, above)


def first_and_rest_family(space: FactorSpace) -> np.ndarray:
    """The first layer has a factor of its own, all others share one."""
    first = np.arange(space.num_layers) == space.scaled_layers[0]
    return space.family(np.stack([first, ~first], axis=1).astype(float))


def decay_family(space: FactorSpace) -> np.ndarray:
    """Factors that rise or fall exponentially with depth, as in LASP: two numbers."""
    depth = np.linspace(0.0, 1.0, space.num_layers)
    return space.family(np.stack([np.ones_like(depth), depth], axis=1))


def per_layer_family(space: FactorSpace) -> np.ndarray:
    """A factor for each free layer, all of which rotate keys of their own."""
    return space.family(np.eye(space.num_layers)[:, list(space.scaled_layers)])


def farthest(probe: float, divergence: float, rise: float, rise_beyond: float, bound: float) -> float:
    """Returns how far a log-factor may go on one side before its harm meets a bound in nats.

    At the log-factor `probe` the divergence is known, which grows with its square, and the rise of the loss, which
    follows a parabola through it, through 0 at 0, and through `rise_beyond` at `-probe`.
    """
    far = min(FARTHEST, probe * math.sqrt(bound / max(divergence, 1e-9)))
    slope, curvature = (rise - rise_beyond) / (2 * probe), (rise + rise_beyond) / (2 * probe**2)
    roots = np.roots([curvature, slope, -bound])
    return min([far, *(root.real for root in roots if abs(root.imag) < 1e-12 and root.real > 0)])


def allowed_share(divergence: float, rise: float, bound: float) -> float:
    """Returns by what to multiply log-factors so that their harm comes near a bound, all in nats: the divergence grows
    at least with their square, a loss that rises at least with them, and both hardly more than with their cube.
    """
    worst = max(divergence, rise, 1e-9)
    if worst <= bound:
        return min(max(1.0, math.cbrt(AIMED * bound / worst)), _MOST_GROWN)
    aimed = AIMED * bound
    return min(1.0, math.sqrt(aimed / max(divergence, aimed)), aimed / max(rise, aimed))


def between(inside: tuple[float, float], outside: tuple[float, float], bound: float) -> float:
    """Returns at which size log-factors come near a bound in nats, by a power law through two sizes and their harm: one
    that keeps to the bound, and a larger one that does not.
    """
    (small, little), (large, much) = inside, outside
    aimed, little = AIMED * bound, max(little, 1e-9)
    if little >= aimed:
        return small
    return small * (large / small) ** (math.log(aimed / little) / math.log(much / little))
