"""Gradients by the log-factors, through the frozen model, and climbs along them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..scoring.batching import (
    Batch,
    answer_logits,
    free_cached_memory,
    is_out_of_memory,
    judge,
    make_batches,
    recomputing,
    with_halving,
)
from ..scoring.scores import DEFAULT_WEIGHTS
from ..tasks import Split
from ..tuner.injection import scaling_for
from ..tuner.rotary import LayerRopeLayer
from ..tuner.sites import find_stack
from ..tuner.tables import LayerScaling
from .harm import divergence, window_logits
from .space import Factors, FactorSpace


@dataclass(frozen=True, eq=False)
class _TensorScaling(LayerScaling):
    """A scaling whose factors are a tensor with a gradient, one row for each layer."""

    factors: torch.Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "distinct", self.layer_factors)
        object.__setattr__(self, "index", tuple(range(len(self.layer_factors))))

    def factors_on(self, device: torch.device) -> torch.Tensor:
        return self.factors.to(device)

    @property
    def is_constant(self) -> bool:
        return False


@dataclass(frozen=True)
class Slope:
    """A value and its gradient.

    Attributes:
        value: a probability, or in nats.
        gradient: by the log-factor of each layer, shape `(num_layers,)`, float64.
    """

    value: float
    gradient: np.ndarray

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.value) and np.isfinite(self.gradient).all())


KEPT_BYTES = 3 << 29
"""Activations that a backward pass may find kept; the layers of all others run again. Of Qwen2.5 0.5B at 1,000 tokens
with 43 questions 21 of 24 layers keep theirs, and a gradient takes three quarters of the time.
"""


class FactorGradient:
    """Values and gradients by the log-factors. Weights get no gradient, and layers run again in the backward pass where
    memory is dear.

    Args:
        model: a `PeftModel` with one LAYER_ROPE adapter, whose scaling is changed in place and given back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._name = model.active_adapter
        self._base = model.get_base_model()
        self._stack = find_stack(self._base)
        self._wrappers: list[LayerRopeLayer] = self._stack.wrappers()
        self._unscaled: dict[tuple[Sequence[int], tuple[int, ...]], torch.Tensor] = {}
        self._kept_bytes = KEPT_BYTES

    def of_answers(self, split: Split, log_factors: np.ndarray) -> Slope:
        """Of the probability of the targets, averaged over the examples of a split; of running text, of minus the loss.

        The logarithm would be ruled by answers that are far from right: over 24 contexts of 100 pairs on Qwen2.5 0.5B
        the largest t-value of a layer's gradient is 5.6 for the probability, and 2.9 for its logarithm.

        Args:
            split: its contexts run one after the other, each with all its questions packed in one row where the model
                allows that.
            log_factors: shape `(num_layers,)`.
        """
        value, gradient = 0.0, np.zeros(len(log_factors))
        mean = split.measure == "loss"
        for batch in make_batches(self._model, split.examples, 1):  # one row at a time: a backward pass holds a lot

            def fitness(batch: Batch = batch) -> torch.Tensor:
                _, log_probs = judge(
                    answer_logits(self._model, batch), batch.gold, batch.owner, len(batch.examples), mean
                )
                return (log_probs if mean else log_probs.exp()).sum() / len(split.examples)

            part = self._slope(fitness, log_factors)
            value, gradient = value + part.value, gradient + part.gradient
        return Slope(value, gradient)

    def of_divergence(self, window: Sequence[int], positions: Sequence[int], log_factors: np.ndarray) -> Slope:
        """Of the divergence from the unscaled model on a window of ordinary text; see `ordinary_text`. The unscaled
        model's logits are kept for the next time.
        """
        key = window, tuple(positions)
        if key not in self._unscaled:
            with torch.no_grad(), self.scaled_by(torch.ones(len(log_factors))):
                self._unscaled[key] = window_logits(self._model, window, positions)
        unscaled = self._unscaled[key]
        return self._slope(lambda: divergence(unscaled, window_logits(self._model, window, positions)), log_factors)

    def _slope(self, value: Callable[[], torch.Tensor], log_factors: np.ndarray) -> Slope:
        leaf = torch.tensor(log_factors, dtype=torch.float32, requires_grad=True)

        def attempt() -> Slope:
            with self.scaled_by(leaf.exp()), recomputing(self._stack.layers, self._kept_bytes):
                result = value()
                (gradient,) = torch.autograd.grad(result, leaf)
            return Slope(float(result.detach()), gradient.double().numpy())

        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not (is_out_of_memory(error) and self._kept_bytes):
                raise
        self._kept_bytes = 0  # for good
        free_cached_memory()
        return attempt()

    @contextmanager
    def scaled_by(self, factors: torch.Tensor) -> Iterator[None]:
        """Context in which the layers are scaled by a tensor, of shape `(num_layers,)`."""
        before = scaling_for(self._model.peft_config[self._name], self._base, self._stack)
        settings = (before.rope_type, before.factor, before.layer_factors)
        window = (before.original_max_position_embeddings, before.target_length)
        self._set(_TensorScaling(*settings, *window, factors=factors))
        try:
            yield
        finally:
            self._set(before)

    def _set(self, scaling: LayerScaling) -> None:
        for wrapper in self._wrappers:
            wrapper.set_scaling(self._name, scaling)


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

    def scaled(self, units: np.ndarray) -> Family:
        """Returns the same family with parameters in other units, shape `(num_parameters,)`."""
        return replace(self, basis=self.basis * units)

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
    fitness: Slope
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
        yield Step(log_factors, fitness, harm.value, paid)
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


STEP_COST = 3
"""Evaluations that one gradient step is counted as: a forward pass, and a backward pass of twice its work."""

FIRST_STEP = 0.1
"""Largest change of a factor in the first step, as a share of the grid's range; it falls linearly to a third."""


class GradientSteps:
    """Climbs context utilisation of the gold log-probability from a factor vector.

    Args:
        model: a `PeftModel` with one LAYER_ROPE adapter, whose scaling is changed in place.
        split: the search split.
        space: allowed factors; the steps stay inside its range, and what is returned is rounded to its grid.
        weights: λ_first, λ_middle, λ_last.
        batch_tokens: tokens per forward and backward pass.

    Attributes:
        is_finite: whether every gradient was.
    """

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        space: FactorSpace,
        *,
        weights: Sequence[float] = DEFAULT_WEIGHTS,
        batch_tokens: int,
    ) -> None:
        self._model = model
        self._split = split
        self._space = space
        self._batch_tokens = batch_tokens
        self._share = _position_shares(split, weights)
        self._plumbing = FactorGradient(model)
        self._layers = find_stack(model.get_base_model()).layers
        self._batches: list[Batch] = []
        self.is_finite = True

    def climb(self, start: Factors, steps: int, on_step: Callable[[], Any] | None = None) -> list[Factors]:
        """Takes `steps` steps of Adam's direction with a falling length, up to a gradient that is not finite.

        Args:
            start: where to begin.
            steps: how many.
            on_step: called after each.

        Returns:
            The distinct rounded vectors along the way, the last one last.
        """
        grid, space = self._space.grid, self._space
        values = torch.tensor(space.restrict(start), dtype=torch.float32, requires_grad=True)
        optimiser = torch.optim.Adam([values], lr=1.0, betas=(0.5, 0.9))
        visited: dict[Factors, None] = {}
        for step in range(steps):
            share = 1 - step / max(steps - 1, 1) * 2 / 3
            optimiser.param_groups[0]["lr"] = FIRST_STEP * (grid.max_factor - grid.min_factor) * share
            gradient = self._gradient(values)
            if not gradient.isfinite().all():  # Adam would never forget it
                self.is_finite = False
                break
            values.grad = -gradient
            optimiser.step()
            with torch.no_grad():
                values.clamp_(grid.min_factor, grid.values[-1])
            vector = space.spread(grid.snap(values.detach().numpy()))
            visited.pop(vector, None)
            visited[vector] = None
            if on_step is not None:
                on_step()
        return list(visited)

    def _gradient(self, values: torch.Tensor) -> torch.Tensor:
        """Gradient of the utilisation by the scaled layers' factors."""

        def attempt(batch_tokens: int) -> torch.Tensor:
            if not self._batches or batch_tokens != self._batch_tokens:  # made once, and again when memory ran out
                self._batches = make_batches(self._model, self._split.examples, batch_tokens)
            total, mean = torch.zeros_like(values), self._split.measure == "loss"
            for batch in self._batches:
                leaf = values.detach().clone().requires_grad_(True)
                with self._scaled_by(leaf), recomputing(self._layers):
                    logits = answer_logits(self._model, batch)
                    _, log_probs = judge(logits, batch.gold, batch.owner, len(batch.examples), mean)
                    share = torch.tensor([self._share[i] for i in batch.examples], device=log_probs.device)
                    total += torch.autograd.grad((log_probs * share).sum(), leaf)[0]
            return total

        gradient, self._batch_tokens = with_halving(attempt, self._batch_tokens)
        return gradient

    def _scaled_by(self, values: torch.Tensor) -> AbstractContextManager[None]:
        factors = [torch.ones(()) for _ in range(self._space.num_layers)]
        for layer, value in zip(self._space.scaled_layers, values, strict=True):
            factors[layer] = value
        return self._plumbing.scaled_by(torch.stack([factors[source] for source in self._space.key_sources]))


def _position_shares(split: Split, weights: Sequence[float]) -> list[float]:
    """Each example's share in the utilisation of the split, which is linear in the examples' log-probabilities."""
    count = len(split.positions)
    if count < 3:
        shares = [1 / count] * count
    else:
        first, middle, last = (weight / sum(weights) for weight in weights)
        shares = [first, *[middle / (count - 2)] * (count - 2), last]
    return [shares[example.position] / split.num_groups for example in split.examples]
