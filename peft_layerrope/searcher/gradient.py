"""Gradient steps on the factors, through the frozen model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..scoring.batching import Batch, answer_logits, judge, make_batches, recomputing, with_halving
from ..scoring.scores import DEFAULT_WEIGHTS
from ..tasks import Split
from ..tuner.injection import scaling_for
from ..tuner.sites import find_stack
from ..tuner.tables import LayerScaling
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
        self._stack = find_stack(model.get_base_model())
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
                with self._scaled_by(leaf), recomputing(self._stack.layers):
                    logits = answer_logits(self._model, batch)
                    _, log_probs = judge(logits, batch.gold, batch.owner, len(batch.examples), mean)
                    share = torch.tensor([self._share[i] for i in batch.examples], device=log_probs.device)
                    total += torch.autograd.grad((log_probs * share).sum(), leaf)[0]
            return total

        gradient, self._batch_tokens = with_halving(attempt, self._batch_tokens)
        return gradient

    @contextmanager
    def _scaled_by(self, values: torch.Tensor) -> Iterator[None]:
        """Context in which the scaled layers' factors are a tensor, of shape `(num_scaled_layers,)`."""
        factors = [torch.ones(()) for _ in range(self._space.num_layers)]
        for layer, value in zip(self._space.scaled_layers, values, strict=True):
            factors[layer] = value
        tied = torch.stack([factors[source] for source in self._space.key_sources])
        name, base = self._model.active_adapter, self._model.get_base_model()
        before = scaling_for(self._model.peft_config[name], base, self._stack)
        settings = (before.rope_type, before.factor, before.layer_factors)
        window = (before.original_max_position_embeddings, before.target_length)
        during = _TensorScaling(*settings, *window, factors=tied)
        for wrapper in self._stack.wrappers():
            wrapper.set_scaling(name, during)
        try:
            yield
        finally:
            for wrapper in self._stack.wrappers():
                wrapper.set_scaling(name, before)


def _position_shares(split: Split, weights: Sequence[float]) -> list[float]:
    """Each example's share in the utilisation of the split, which is linear in the examples' log-probabilities."""
    count = len(split.positions)
    if count < 3:
        shares = [1 / count] * count
    else:
        first, middle, last = (weight / sum(weights) for weight in weights)
        shares = [first, *[middle / (count - 2)] * (count - 2), last]
    return [shares[example.position] / split.num_groups for example in split.examples]
