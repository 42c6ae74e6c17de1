"""What a search is going to cost, before it starts; and what cannot work, before any model work."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..errors import SearchError
from ..report import Table, duration
from ..tuner.sites import embedding_table
from .algorithms import first_and_rest_vectors, first_layers_alone_vectors, line_vectors
from .gradient import STEP_COST
from .settings import SearchSettings
from .space import FactorSpace

MIN_CONTROL_BUDGET = 150
"""Shared-factor controls get as many evaluations as the per-layer search took, and never fewer than this: enough
to try every (a, b) on the default grid, so that a control that loses does not lose for want of trying."""


@dataclass(frozen=True)
class Plan:
    """Upper limits of a search: racing, the memo and shared layers make it cheaper.

    Attributes:
        evaluations: distinct factor vectors on the search split, by stage.
        tokens_per_evaluation: tokens that one of them runs.
        held_out_tokens: tokens of the validation and test splits, for all candidates.
        memory_bytes: memory in use after the timed evaluation, with the store for shared layers full.
        seconds_per_evaluation: of the unscaled model, on every example of the search split.
    """

    evaluations: dict[str, int]
    tokens_per_evaluation: int
    held_out_tokens: int
    memory_bytes: int
    seconds_per_evaluation: float

    @property
    def num_evaluations(self) -> int:
        """Evaluations of all stages."""
        return sum(self.evaluations.values())

    @property
    def tokens(self) -> int:
        """Tokens of the whole search."""
        return self.num_evaluations * self.tokens_per_evaluation + self.held_out_tokens

    @property
    def seconds(self) -> float:
        """How long the whole search would take with nothing shared, given up or known."""
        return self.seconds_per_evaluation * self.tokens / self.tokens_per_evaluation

    def sentence(self) -> str:
        """Says it to people."""
        each = f"{self.num_evaluations} evaluations of {self.tokens_per_evaluation:,} tokens"
        total = f"{self.tokens / 1e6:.1f} M tokens with the held-out splits, {self.memory_bytes / 2**30:.1f} GiB"
        return (
            f"at most {each}, {total}, {duration(self.seconds)} (one evaluation: {self.seconds_per_evaluation:.2f} s). "
            "Racing, shared layers and vectors known already make it shorter."
        )

    def table(self) -> Table:
        """Returns the evaluations stage by stage."""
        rows = [*self.evaluations.items(), ("all", self.num_evaluations)]
        cells = tuple((name, str(count)) for name, count in rows)
        return Table(("stage", "evaluations"), cells, "The search, at most", self.sentence())

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        totals = {"num_evaluations": self.num_evaluations, "tokens": self.tokens, "seconds": round(self.seconds, 1)}
        return {**asdict(self), **totals}


def planned_evaluations(settings: SearchSettings, space: FactorSpace) -> dict[str, int]:
    """Returns the most distinct vectors that each stage may evaluate; a gradient step counts as three."""
    counts = {"uniform factors": len(space.grid.values) + 1, "search": settings.search_evaluations}
    if settings.refine:
        steps = settings.gradient_steps if settings.takes_gradient_steps else 0
        counts["gradient steps"] = steps * (STEP_COST + 1)
        counts["coordinate steps"] = settings.refine_evaluations
    if settings.controls:
        budget = sum(counts.values()) - counts["uniform factors"]
        shared = max(budget, MIN_CONTROL_BUDGET)
        counts["control: first k at 1, rest b"] = min(shared, len(set(first_layers_alone_vectors(space))))
        counts["control: first a, rest b"] = min(shared, len(set(first_and_rest_vectors(space))))
        counts["control: straight line"] = min(shared, len(set(line_vectors(space))))
        counts["control: random per layer"] = min(budget, len(space.grid.values) ** len(space.scaled_layers))
    return counts


def check_length(settings: SearchSettings, length: int, window: int | None) -> None:
    """Refuses prompts that no factor of the range could bring back into the trained window.

    Args:
        settings: the grid and the global factor.
        length: the longest prompt in tokens.
        window: the model's trained window; None if its config does not say.

    Raises:
        SearchError: naming the three numbers.
    """
    if window is None:
        return
    largest = settings.factor_limits[1]
    reach = window * largest * settings.factor
    if length > reach:
        raise SearchError(
            f"prompts of {length} tokens: with a window of {window}, factor={settings.factor:g} and "
            f"max_factor={largest:g} the largest scaling reaches {reach:.0f} tokens. Use shorter "
            "prompts, a larger range, or rope_type 'linear' or 'dynamic' with a factor."
        )


def memory_in_use(model: nn.Module) -> int:
    """Peak memory so far in bytes: of the model's accelerator, or of this process."""
    device = embedding_table(model).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
