"""What a search asks of a model: the scores of factor vectors on one heat. Speed and distribution go behind it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from scipy import stats
from torch import nn

from ..scoring.batching import Batch, ScoreSheet, answer_logits, is_out_of_memory, make_batches, with_halving
from ..scoring.scores import Objective, PositionScores
from ..tasks import Split
from ..tuner.sites import find_stack
from .space import Factors


def shared_depth(one: Factors, other: Factors) -> int:
    """How many leading factors two vectors have in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def cut_into_chunks(vectors: Sequence[Factors], num_chunks: int) -> list[list[Factors]]:
    """Cuts the distinct vectors, sorted, into pieces of similar work, between those that share the least.

    Args:
        vectors: may repeat.
        num_chunks: how many pieces at most.

    Returns:
        The pieces, in order; vectors that share a prefix are next to each other.
    """
    chunks = [sorted(set(vectors))]
    while len(chunks) < num_chunks:
        number = max(range(len(chunks)), key=lambda n: (len(chunks[n]) > 1, work(chunks[n])))
        chunk = chunks[number]
        if len(chunk) < 2:
            break
        # A piece runs its first vector in full, so a cut through a common prefix makes both halves longer.
        cut = min(range(1, len(chunk)), key=lambda at: max(work(chunk[:at]), work(chunk[at:])))
        chunks[number : number + 1] = [chunk[:cut], chunk[cut:]]
    return [chunk for chunk in chunks if chunk]


def work(chunk: Sequence[Factors]) -> int:
    """Layers that a worker runs which knows none of them yet."""
    if not chunk:
        return 0
    return len(chunk[0]) + sum(len(b) - shared_depth(a, b) for a, b in pairwise(chunk))


T = TypeVar("T")
Key = tuple[Any, Factors]


class LayerOutputs:
    """Outputs of decoder layers, the least recently used dropped first, in a fixed number of bytes.

    Args:
        max_bytes: memory of all outputs together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._outputs: OrderedDict[Key, tuple[Any, int]] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._outputs

    def use(self, key: Key) -> Any:
        """Returns an output and marks it as used."""
        self._outputs.move_to_end(key)
        return self._outputs[key][0]

    def keep(self, key: Key, output: Any, spared: set[Key]) -> bool:
        """Stores an output if there is room once older ones, except `spared`, are dropped; says whether it did."""
        size = _num_bytes(output)
        droppable = sum(entry[1] for old, entry in self._outputs.items() if old not in spared)
        if self.num_bytes - droppable + size > self.max_bytes:
            return False
        for old in [old for old in self._outputs if old not in spared]:
            if self.num_bytes + size <= self.max_bytes:
                break
            self.num_bytes -= self._outputs.pop(old)[1]
        self._outputs[key] = output, size
        self.num_bytes += size
        return True

    def shrink(self) -> None:
        """Drops everything, and keeps to half the memory from now on."""
        self.clear()
        self.max_bytes //= 2

    def clear(self) -> None:
        """Drops everything."""
        self._outputs.clear()
        self.num_bytes = 0


class PrefixRunner:
    """Runs a model's forward for one factor vector, from the deepest stored output of its leading layers.

    Args:
        layers: the decoder layers, in order.
        max_bytes: memory for stored outputs; 0 shares nothing.

    Attributes:
        layers_run: decoder layers really run, each times the tokens of its batch.
        layers_asked: the same of what would have run without sharing.
    """

    def __init__(self, layers: Sequence[nn.Module], max_bytes: int) -> None:
        self._layers = list(layers)
        self.outputs = LayerOutputs(max_bytes)
        self.layers_run = 0
        self.layers_asked = 0

    def run(
        self, batch: Any, vector: Factors, forward: Callable[[], T], num_tokens: int = 1, only: int | None = None
    ) -> T:
        """Returns `forward()`, which must run the model once, on `batch` and with the factors `vector`.

        Args:
            batch: hashable name of the model's input.
            vector: the factors in force, one per layer.
            forward: runs the model.
            num_tokens: size of the batch, for the counts.
            only: store only the output after so many layers; default: all.
        """
        depth = self._known_depth(batch, vector)
        with self._answering(batch, vector, depth), self._storing(batch, vector, depth, only):
            result = forward()
        self.layers_run += (len(self._layers) - depth) * num_tokens
        self.layers_asked += len(self._layers) * num_tokens
        return result

    def _known_depth(self, batch: Any, vector: Factors) -> int:
        """How many leading layers need not run."""
        for depth in range(len(self._layers) - 1, 0, -1):
            if (batch, vector[:depth]) in self.outputs:
                return depth
        return 0

    @contextmanager
    def _answering(self, batch: Any, vector: Factors, depth: int) -> Iterator[None]:
        """Lets the first `depth` layers answer with the stored output of the last of them."""
        if not depth:
            yield
            return
        stored = self.outputs.use((batch, vector[:depth]))
        for shorter in range(depth - 1, 0, -1):  # the shallow ones, which most vectors share, are marked last
            if (batch, vector[:shorter]) in self.outputs:
                self.outputs.use((batch, vector[:shorter]))
        calls = []

        def answer(*args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            return stored

        with ExitStack() as stack:
            for layer in self._layers[:depth]:
                stack.callback(_restore_forward, layer, layer.__dict__.get("forward"))
                layer.forward = answer
            yield
        if len(calls) != depth:
            raise RuntimeError(f"{len(calls)} of {depth} skipped layers were called: the model bypasses its layers.")

    @contextmanager
    def _storing(self, batch: Any, vector: Factors, depth: int, only: int | None) -> Iterator[None]:
        """Stores the outputs of the layers from `depth` on, except the last, shallow ones first."""
        spared = {(batch, vector[:shorter]) for shorter in range(1, len(self._layers))}
        handles = []

        def hook(number: int) -> Callable:
            def store(module: nn.Module, args: Any, output: Any) -> None:
                self.outputs.keep((batch, vector[:number]), output, spared)

            return store

        if self.outputs.max_bytes:
            for index in range(depth, len(self._layers) - 1):
                if only in (None, index + 1):
                    handles.append(self._layers[index].register_forward_hook(hook(index + 1)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _restore_forward(layer: nn.Module, forward: Callable | None) -> None:
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward


def _num_bytes(output: Any) -> int:
    tensors = [output] if isinstance(output, torch.Tensor) else [t for t in output if isinstance(t, torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


RACE_LEVEL = 0.05
"""One-sided level of the paired t-test at each of the looks at a race: a vector that is as good as the best so far is
dropped with at most this probability at each."""

MIN_RACE_GROUPS = 4
"""No vector is dropped on fewer groups than this."""


@dataclass(frozen=True)
class HeatScores:
    """A vector's scores on one part of the examples.

    Attributes:
        values: each group's utilisation, the share it has in the fitness.
        tail: each group's accuracy at the last position.
    """

    values: tuple[float, ...]
    tail: tuple[float, ...]


@dataclass(frozen=True)
class Heats:
    """How the search split is cut: racing may stop after each part. The last one may hold the short prompts.

    Attributes:
        sizes: groups of each part of the search split, in order.
        has_short: whether one more heat, after them, scores short prompts.
    """

    sizes: tuple[int, ...]
    has_short: bool = False

    def __len__(self) -> int:
        return len(self.sizes) + self.has_short

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First group and the one after the last, of each part of the search split."""
        ends = np.cumsum(self.sizes).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))


def plan_heats(num_groups: int, race: bool, has_short: bool) -> Heats:
    """Cuts `num_groups` for racing into a quarter, two eighths and two quarters, if a quarter suffices for a test."""
    ends = [num_groups * eighths // 8 for eighths in (0, 2, 3, 4, 6, 8)]
    if not race or ends[1] < MIN_RACE_GROUPS:
        return Heats((num_groups,), has_short)
    return Heats(tuple(end - start for start, end in pairwise(ends)), has_short)


@dataclass(frozen=True)
class Measurement:
    """All that is known of one vector: its scores on the first heats, in order."""

    heats: tuple[HeatScores, ...] = ()

    def plus(self, scores: HeatScores) -> Measurement:
        """Returns this with one more heat."""
        return Measurement((*self.heats, scores))

    def values(self, plan: Heats) -> np.ndarray:
        """Utilisation of each group of the search split seen so far."""
        return np.array([value for heat in self.heats[: len(plan.sizes)] for value in heat.values])

    def is_complete(self, plan: Heats) -> bool:
        """Whether every heat was run."""
        return len(self.heats) == len(plan)

    def fitness(self, plan: Heats) -> float:
        """Mean utilisation of the groups seen."""
        return float(self.values(plan).mean())

    def tail(self, plan: Heats) -> np.ndarray:
        """Accuracy at the last position of each group of the search split seen so far."""
        return np.array([hit for heat in self.heats[: len(plan.sizes)] for hit in heat.tail])

    def short_values(self) -> np.ndarray:
        """Utilisation of each group of the short prompts, where the plan has them: minus their loss, in nats."""
        return np.array(self.heats[-1].values)

    def tail_accuracy(self, plan: Heats) -> float:
        """Accuracy at the last position, over the search split."""
        return float(self.tail(plan).mean())

    def short_loss(self, plan: Heats) -> float | None:
        """Loss on short prompts in nats, or None where there are none."""
        return -float(self.short_values().mean()) if plan.has_short else None


def clearly_worse(values: Sequence[float], rival: Sequence[float]) -> bool:
    """Whether a vector has lost its race: a one-sided paired t-test over the groups seen by both, at `RACE_LEVEL`.
    One whose values are not all finite has lost.

    Args:
        values: its utilisation on the first groups.
        rival: that of the best vector so far, on at least these groups.
    """
    if not np.isfinite(values).all():
        return True
    if len(values) < MIN_RACE_GROUPS:
        return False
    gap = np.asarray(values) - np.asarray(rival)[: len(values)]
    if gap.std() == 0:
        return bool(gap.mean() < 0)
    return bool(stats.ttest_1samp(gap, 0, alternative="less").pvalue < RACE_LEVEL)


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
        return [self.heat_scores(scores[vector]) for vector in vectors]

    def heat_scores(self, scores: PositionScores) -> HeatScores:
        """Returns what a search needs of a vector's full scores."""
        values = scores.utilisation_by_group(self._objective, self._weights)
        return HeatScores(tuple(values.tolist()), tuple(scores.correct[:, -1].astype(float).tolist()))

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
            self._batches[heat] = make_batches(self._model, self._heats[heat].examples, self.batch_tokens)
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
