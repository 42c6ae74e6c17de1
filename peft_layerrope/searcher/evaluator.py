"""What a search asks of a model: the scores of factor vectors on one heat. Speed and distribution go behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from ..scoring.batching import Batch, make_batches
from ..scoring.judging import ScoreSheet, answer_logits
from ..scoring.memory import is_out_of_memory, with_halving
from ..scoring.scores import Objective, PositionScores
from ..tasks import Split
from ..tuner.sites import find_stack
from .grid import Factors
from .measurement import HeatScores
from .prefix import PrefixRunner

_TRIAL_TOKENS = 64
"""Length of the trial by which sharing is proven exact."""


class Evaluator(Protocol):
    """Scores of factor vectors; the same vector always gets the same scores."""

    def measure(self, vectors: Sequence[Factors], heat: int) -> list[HeatScores]:
        """Returns the scores of each vector on heat number `heat`, in order."""

    def score(self, vectors: Sequence[Factors], heat: int) -> dict[Factors, PositionScores]:
        """Returns the full scores of each vector on a heat, or on a split numbered after the heats."""

    @property
    def layers_run(self) -> int:
        """Decoder layers that really ran, each times its tokens."""

    @property
    def layers_asked(self) -> int:
        """The same of what evaluating every vector alone would have run."""

    @property
    def at_once(self) -> int:
        """How many vectors are worth asking for at once: how many are worked on in parallel."""


class ModelEvaluator:
    """Scores vectors on a model, one after the other, sharing their leading layers.

    Args:
        model: a `PeftModel` with one LAYER_ROPE adapter, whose factors are changed in place.
        heats: the examples of each heat, the same for every vector.
        objective: what the values are utilisations of.
        weights: λ_first, λ_middle, λ_last.
        batch_tokens: tokens per forward pass; halved for good, as is `share_bytes`, when memory runs out.
        share_bytes: memory for the outputs of common leading layers; 0 shares nothing.

    Attributes:
        batch_tokens: tokens per forward pass that fit so far.
        sharing: whether leading layers are shared: the memory allows it, and it was proven exact on this model.
    """

    def __init__(
        self,
        model: nn.Module,
        heats: Sequence[Split],
        *,
        objective: Objective,
        weights: tuple[float, float, float],
        batch_tokens: int,
        share_bytes: int,
    ) -> None:
        self._model = model.eval()
        self._heats = list(heats)
        self._objective = objective
        self._weights = weights
        self._batches: dict[int, list[Batch]] = {}
        self._prefixes = PrefixRunner(find_stack(model.get_base_model()).layers, share_bytes)
        self.batch_tokens = batch_tokens
        self.sharing: bool | None = None if share_bytes else False

    @property
    def model(self) -> nn.Module:
        """The `PeftModel` that is scored."""
        return self._model

    def recipe(self) -> Callable[..., ModelEvaluator]:
        """Returns what makes such an evaluator elsewhere, given a copy of the model and `batch_tokens=`."""
        share_bytes = self._prefixes.outputs.max_bytes  # 0 where sharing was found not to be exact
        settings = {"objective": self._objective, "weights": self._weights, "share_bytes": share_bytes}
        return partial(ModelEvaluator, heats=self._heats, **settings)

    @property
    def layers_run(self) -> int:
        """Decoder layers that really ran, each times its tokens."""
        return self._prefixes.layers_run

    @property
    def layers_asked(self) -> int:
        """The same of what evaluating every vector alone would have run."""
        return self._prefixes.layers_asked

    @property
    def at_once(self) -> int:
        """See [`Evaluator`]."""
        return 1

    def measure(self, vectors: Sequence[Factors], heat: int) -> list[HeatScores]:
        """See [`Evaluator`]."""
        scores = self.score(vectors, heat)
        found = []
        for vector in vectors:
            values = scores[vector].utilisation_by_group(self._objective, self._weights)
            tail = scores[vector].correct[:, -1]
            found.append(HeatScores(tuple(values.tolist()), tuple(tail.astype(float).tolist())))
        return found

    def score(self, vectors: Sequence[Factors], heat: int) -> dict[Factors, PositionScores]:
        """Returns the full scores of each vector on a heat.

        Raises:
            TaskError: memory does not suffice for a single row.
        """

        def attempt(batch_tokens: int) -> dict[Factors, PositionScores]:
            if batch_tokens != self.batch_tokens:
                self._batches.clear()
                self._prefixes.outputs.shrink()
                self.batch_tokens = batch_tokens
            return self._score(vectors, heat)

        return with_halving(attempt, self.batch_tokens)[0]

    def forget(self) -> None:
        """Drops the stored outputs and sets the counts to 0."""
        self._prefixes.outputs.clear()
        self._prefixes.layers_run = self._prefixes.layers_asked = 0

    def num_tokens(self, heat: int) -> int:
        """Tokens that scoring one vector on a heat runs."""
        return sum(batch.num_tokens for batch in self._batches_of(heat))

    def _batches_of(self, heat: int) -> list[Batch]:
        if heat not in self._batches:
            self._batches[heat] = make_batches(self._model, self._heats[heat], self.batch_tokens)
        return self._batches[heat]

    @torch.no_grad()
    def _score(self, vectors: Sequence[Factors], heat: int) -> dict[Factors, PositionScores]:
        order = sorted(set(vectors))  # neighbours share most, so a small store goes far
        sheets = {vector: ScoreSheet(self._heats[heat]) for vector in order}
        for number, batch in enumerate(self._batches_of(heat)):
            for vector in order:
                logits = self._run(vector, batch, (heat, number))
                sheets[vector].add(batch.examples, logits, batch.gold, batch.owner)
        return {vector: sheet.scores() for vector, sheet in sheets.items()}

    def _run(self, vector: Factors, batch: Batch, name: tuple[int, int]) -> torch.Tensor:
        self._model.base_model.set_layer_factors(vector)
        if self.sharing is None:
            self.sharing = self._sharing_is_exact(vector, batch)
            if not self.sharing:
                self._prefixes.outputs.max_bytes = 0
        return self._prefixes.run(name, vector, lambda: answer_logits(self._model, batch), batch.num_tokens)

    def _sharing_is_exact(self, vector: Factors, batch: Batch) -> bool:
        """Whether the model gives the same bits from each depth on when the layers before it answer from the store.

        Another vector runs in between, so that whatever else a layer leaves for the next ones is not what it was.
        """
        inputs = _beginning(batch.inputs)
        layers = find_stack(self._model.get_base_model()).layers
        other = tuple(1.1 * factor for factor in vector)

        def logits(factors: Factors) -> torch.Tensor:
            self._model.base_model.set_layer_factors(factors)
            return self._model(**inputs, use_cache=False).logits

        alone = logits(vector)
        shared = len(vector) > 1
        for depth in range(1, len(vector)):
            trial = PrefixRunner(layers, self._prefixes.outputs.max_bytes)
            try:
                trial.run("trial", vector, lambda: logits(vector), only=depth)
                logits(other)
                again = trial.run("trial", vector, lambda: logits(vector))
            except Exception as error:  # whatever a family raises whose layers hand on more than their output
                if is_out_of_memory(error):
                    raise
                shared = False
            else:
                shared = trial.layers_run < trial.layers_asked and torch.equal(alone, again)
            if not shared:
                break
        self._model.base_model.set_layer_factors(vector)
        return shared


def _beginning(inputs: dict[str, Any]) -> dict[str, Any]:
    """The first tokens of a batch's first row."""
    short = {name: tensor[:1, :_TRIAL_TOKENS] for name, tensor in inputs.items() if name != "attention_mask"}
    mask = inputs["attention_mask"]
    if isinstance(mask, dict):
        return {**short, "attention_mask": {name: _corner(tensor) for name, tensor in mask.items()}}
    return {**short, "attention_mask": _corner(mask)}


def _corner(mask: torch.Tensor) -> torch.Tensor:
    """The part of a mask, `(B, S)` or `(B, 1, S, S)`, that is of the first tokens of the first row."""
    return mask[:1, :_TRIAL_TOKENS] if mask.ndim == 2 else mask[:1, :, :_TRIAL_TOKENS, :_TRIAL_TOKENS]
