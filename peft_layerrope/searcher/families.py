"""Families of factor vectors whose logarithms are linear in a few numbers. Pure maths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

FARTHEST = 1.0
"""Log-factor that is tried where a uniform factor does no harm."""
AIMED = 0.9
"""Share of a bound that is aimed at: what breaks it has to be made smaller and measured again."""
_MOST_GROWN = 1.25  # of log-factors that do less harm than they may: farther out nothing was seen
_SIDES_TRIED = 10  # times that it is looked up on which side of 1 each layer comes to lie


@dataclass(frozen=True)
class Family:
    """Factor vectors whose logarithms are a linear function of a few numbers.

    Attributes:
        name: key in reports.
        basis: shape `(num_layers, num_parameters)`; a row of zeros keeps a layer at 1.
    """

    name: str
    basis: np.ndarray

    @property
    def num_parameters(self) -> int:
        return self.basis.shape[1]

    def log_factors(self, parameters: np.ndarray) -> np.ndarray:
        """Returns the log-factor of each layer."""
        return self.basis @ parameters

    def scaled(self, units: np.ndarray) -> Family:
        """Returns the same family with parameters in other units, shape `(num_parameters,)`."""
        return replace(self, basis=self.basis * units)

    def nearest(self, log_factors: np.ndarray) -> np.ndarray:
        """Returns the parameters whose vector comes nearest to another one."""
        return np.linalg.lstsq(self.basis, log_factors, rcond=None)[0]


def harm_of(log_factors: np.ndarray, curvature: np.ndarray) -> float:
    """Returns the divergence that log-factors are to cause by what each layer causes alone, which grows with the square
    of its log-factor and is another below a factor of 1 than above.

    Args:
        log_factors: shape `(num_layers,)`.
        curvature: below and above, shape `(2, num_layers)`.
    """
    return float(_on_its_side(log_factors, curvature) @ log_factors**2) / 2


def steepest(family: Family, slope: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """Returns the direction, of length 1, in which a value rises most for the harm that it does.

    Args:
        family: of the vectors.
        slope: of the value by the family's parameters, shape `(num_parameters,)`.
        curvature: see [`harm_of`].
    """
    direction = slope
    for _ in range(_SIDES_TRIED):
        sides = _on_its_side(family.log_factors(direction), curvature)
        direction = np.linalg.solve(family.basis.T @ (sides[:, None] * family.basis), slope)
    return direction / np.linalg.norm(direction)


def _on_its_side(log_factors: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    below, above = curvature
    return np.where(log_factors < 0, below, above)


def uniform_family(key_sources: Sequence[int], layers: Sequence[int]) -> Family:
    """One factor for all layers."""
    return Family("uniform", _tied(np.ones((len(key_sources), 1)), key_sources, layers))


def first_and_rest_family(key_sources: Sequence[int], layers: Sequence[int]) -> Family:
    """The first layer has a factor of its own, all others share one."""
    first = np.arange(len(key_sources)) == min(layers)
    return Family("first_and_rest", _tied(np.stack([first, ~first], axis=1).astype(float), key_sources, layers))


def decay_family(key_sources: Sequence[int], layers: Sequence[int]) -> Family:
    """Factors that rise or fall exponentially with depth, as in LASP: two numbers."""
    depth = np.linspace(0.0, 1.0, len(key_sources))
    return Family("decay", _tied(np.stack([np.ones_like(depth), depth], axis=1), key_sources, layers))


def per_layer_family(key_sources: Sequence[int], layers: Sequence[int]) -> Family:
    """A factor for each layer that rotates keys of its own."""
    own = [layer for layer in layers if key_sources[layer] == layer]
    basis = np.zeros((len(key_sources), len(own)))
    for column, layer in enumerate(own):
        basis[[i for i, source in enumerate(key_sources) if source == layer], column] = 1.0
    return Family("per_layer", basis)


def _tied(basis: np.ndarray, key_sources: Sequence[int], layers: Sequence[int]) -> np.ndarray:
    """Rows of layers that stay at 1 are zeros, and a layer that borrows keys has its source's row."""
    free = np.isin(np.arange(len(key_sources)), layers)
    return (basis * free[:, None])[list(key_sources)]


def farthest(probe: float, divergence: float, rise: float, rise_beyond: float, bound: float) -> float:
    """Returns how far a log-factor may go on one side before its harm meets a bound.

    Args:
        probe: log-factor at which the harm is known.
        divergence: there, which grows with the square of the log-factor.
        rise: of the loss there; a parabola through it, through 0 at 0, and through `rise_beyond` at `-probe`.
        rise_beyond: see `rise`.
        bound: of both, in nats.
    """
    far = min(FARTHEST, probe * math.sqrt(bound / max(divergence, 1e-9)))
    slope, curvature = (rise - rise_beyond) / (2 * probe), (rise + rise_beyond) / (2 * probe**2)
    roots = np.roots([curvature, slope, -bound])
    return min([far, *(root.real for root in roots if abs(root.imag) < 1e-12 and root.real > 0)])


def allowed_share(divergence: float, rise: float, bound: float) -> float:
    """Returns by what to multiply log-factors so that their harm comes near a bound: the divergence grows at least with
    their square, a loss that rises at least with them, and both hardly more than with their cube.

    Args:
        divergence: that they cause, in nats.
        rise: of the loss that they cause, in nats; it may be negative.
        bound: of both, in nats.
    """
    worst = max(divergence, rise, 1e-9)
    if worst <= bound:
        return min(max(1.0, math.cbrt(AIMED * bound / worst)), _MOST_GROWN)
    aimed = AIMED * bound
    return min(1.0, math.sqrt(aimed / max(divergence, aimed)), aimed / max(rise, aimed))


def between(inside: tuple[float, float], outside: tuple[float, float], bound: float) -> float:
    """Returns at which size log-factors come near a bound, by a power law through two sizes.

    Args:
        inside: a size and its harm in nats, which keeps to the bound.
        outside: a larger size, whose harm does not.
        bound: of the harm, in nats.
    """
    (small, little), (large, much) = inside, outside
    aimed, little = AIMED * bound, max(little, 1e-9)
    if little >= aimed:
        return small
    return small * (large / small) ** (math.log(aimed / little) / math.log(much / little))
