"""Adam on a few numbers that the log-factors depend on, with what it does to ordinary text held under a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .factor_gradient import Slope

LEARNING_RATE, LAST_SHARE = 0.05, 0.3
"""Length of a step in a log-factor, and the share of it that the last step has."""
BETAS = (0.5, 0.95)
GRADIENT_MEMORY = 0.9
"""Share of the running mean of the fitness's gradients that a step keeps: a single one says little."""
FIRST_PRICE = 5.0
"""Probability of the targets that one nat of divergence costs, at the bound, in the first step."""
PRICE_RATE = 0.1
"""How fast the price follows the divergence: it grows by this exponent in a step where that is twice the bound."""
PRICE_RANGE = (0.5, 500.0)
_MOST_EXCESS = 2.0  # a single window of text may say anything
_MEMORY = 0.6  # share of the divergence's running mean that a step keeps
AVERAGED_SHARE = 0.25
"""Share of the steps, the last ones, whose vectors are averaged."""


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

    def nearest(self, log_factors: np.ndarray) -> np.ndarray:
        """Returns the parameters whose vector comes nearest to another one."""
        return np.linalg.lstsq(self.basis, log_factors, rcond=None)[0]


@dataclass(frozen=True)
class Step:
    """What one step saw.

    Attributes:
        log_factors: where it was, shape `(num_layers,)`.
        fitness: of fresh contexts, there.
        divergence: on ordinary text, there.
        price: fitness that a nat of divergence cost.
    """

    log_factors: np.ndarray
    fitness: float
    divergence: float
    price: float


def climb(
    family: Family,
    start: np.ndarray,
    steps: int,
    slopes: Callable[[int, np.ndarray], tuple[Slope, Slope]],
    *,
    max_divergence: float | None,
    limits: tuple[float, float],
) -> Iterator[Step]:
    """Maximizes fitness minus the price of the divergence. The price is proportional to the divergence, so that the
    vector does not swing about the bound; and it rises while the divergence is above its bound and falls while it is
    below.

    Args:
        family: what may be chosen from.
        start: log-factors to begin at, shape `(num_layers,)`; the family's nearest vector is taken.
        steps: how many to take.
        slopes: given the number of a step and log-factors, the slopes of fitness, on contexts that no other step has
            seen, and of the divergence.
        max_divergence: its bound in nats; None: none.
        limits: of a log-factor.

    Yields:
        What each step saw, before it is taken. It ends early where a gradient is not finite.
    """
    values = torch.tensor(family.nearest(start), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=LEARNING_RATE, betas=BETAS)
    price, share_of_bound, slope = FIRST_PRICE, 0.0, np.zeros(len(start))
    for number in range(steps):
        log_factors = np.clip(family.log_factors(values.detach().numpy()), *limits)
        fitness, harm = slopes(number, log_factors)
        if not (fitness.is_finite and harm.is_finite):  # Adam would never forget it
            return
        if max_divergence is not None:
            seen = harm.value / max_divergence
            share_of_bound = seen if number == 0 else _MEMORY * share_of_bound + (1 - _MEMORY) * seen
        paid = price * share_of_bound
        yield Step(log_factors, fitness.value, harm.value, paid)
        share = 1 - (1 - LAST_SHARE) * number / max(steps - 1, 1)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * share
        kept = GRADIENT_MEMORY * (1 - GRADIENT_MEMORY**number) / (1 - GRADIENT_MEMORY ** (number + 1))
        slope = kept * slope + (1 - kept) * fitness.gradient
        values.grad = torch.from_numpy(family.basis.T @ (paid * harm.gradient - slope))
        optimizer.step()
        if max_divergence is not None:
            excess = min(share_of_bound - 1, _MOST_EXCESS)
            price = min(max(price * math.exp(PRICE_RATE * excess), PRICE_RANGE[0]), PRICE_RANGE[1])


def averaged(steps: Sequence[Step], share: float = AVERAGED_SHARE) -> np.ndarray:
    """Returns the mean log-factors of the last steps, which is steadier than the last vector."""
    last = steps[-max(1, round(len(steps) * share)) :]
    return np.mean([step.log_factors for step in last], axis=0)


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
