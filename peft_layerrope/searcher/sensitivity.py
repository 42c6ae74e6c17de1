"""How a model answers to scaling one layer at a time: which layers are worth searching, and over what range."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from ..base_model import adapted, keeping_modes
from ..errors import SearchError
from ..messages import is_number
from ..scoring.batching import check_vocabulary
from ..scoring.preflight import preflight, with_targets
from ..scoring.scorer import DEFAULT_BATCH_TOKENS, Scorer
from ..scoring.scores import DEFAULT_WEIGHTS, Interval, mean_interval, paired_interval, rank_key
from ..tasks import SPLIT_NAMES, Measure, PromptTask, Split, SplitName, Task
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import find_stack, trained_window
from .common import model_name
from .evaluator import ModelEvaluator
from .plan import SearchProgress, audience_of
from .settings import SearchSettings
from .space import Factors, FactorSpace, format_layers

DEFAULT_FACTORS = (1.3, 1.6, 2.0)
MIN_GROUPS = 2  # an interval over fewer is infinite
_PROGRESS_PARTS = 4  # the split is measured in at least so many parts, for the progress bar


@dataclass(frozen=True)
class LayerEffect:
    """What scaling one layer does, all others at 1.0.

    Attributes:
        layer: the layer; those that attend to its keys are scaled with it.
        factor: its factor.
        accuracy: context utilisation U of the accuracies, from 0 to 1.
        log_prob: U of the gold log-probabilities, in nats.
        accuracy_change: `accuracy` minus the unscaled model's, with a paired 95 % interval over groups.
        log_prob_change: `log_prob` minus the unscaled model's, likewise.
    """

    layer: int
    factor: float
    accuracy: float
    log_prob: float
    accuracy_change: Interval
    log_prob_change: Interval


@dataclass(frozen=True)
class Sensitivity:
    """Result of [`sensitivity`].

    Each of its intervals holds with 95 % by itself: of many effects that are none, one in twenty looks like one. And
    a layer without an effect of its own may have one together with others.

    Attributes:
        layers: the layers that were scaled, ascending.
        factors: the factors that were tried, ascending.
        accuracy: U of the unscaled model's accuracies, from 0 to 1.
        log_prob: U of the unscaled model's gold log-probabilities, in nats.
        effects: one for each layer and factor, layer by layer.
        key_sources: for each layer of the model the one whose keys it attends to, mostly itself.
        settings: rope type, global factor and the like.
        model_name: name of the base model, free of local paths.
        model_window: the model's trained window in tokens; None if its config does not say.
        task: the task's description.
        split: the split's description.
    """

    layers: tuple[int, ...]
    factors: tuple[float, ...]
    accuracy: float
    log_prob: float
    effects: tuple[LayerEffect, ...]
    key_sources: tuple[int, ...]
    settings: dict[str, Any]
    model_name: str
    model_window: int | None
    task: dict[str, Any]
    split: dict[str, Any]

    def of_layer(self, layer: int) -> tuple[LayerEffect, ...]:
        """Returns the effects of one layer, by ascending factor.

        Raises:
            KeyError: the layer was not scaled.
        """
        found = tuple(effect for effect in self.effects if effect.layer == layer)
        if not found:
            raise KeyError(f"layer {layer} was not scaled; layers {format_layers(self.layers)} were.")
        return found

    def followers(self, layer: int) -> tuple[int, ...]:
        """Returns the layers that were scaled with `layer` because they attend to its keys."""
        return tuple(i for i, source in enumerate(self.key_sources) if source == layer and i != layer)

    def best_factor(self, layer: int) -> float:
        """Returns the factor with the highest U of the gold log-probability; 1.0 where every other one lowers it."""
        best = max(self.of_layer(layer), key=lambda effect: rank_key(effect.log_prob_change.value))
        return best.factor if best.log_prob_change.value > 0 else 1.0

    def layers_worth_searching(self) -> tuple[int, ...]:
        """Layers where some factor changes U of the gold log-probability significantly, up or down."""
        return tuple(sorted({e.layer for e in self.effects if e.log_prob_change.excludes_zero()}))

    def layers_that_gain(self) -> tuple[int, ...]:
        """Layers where some factor raises U of the gold log-probability significantly."""
        return tuple(sorted({e.layer for e in self.effects if e.log_prob_change.low > 0}))

    def rises_at_edge(self) -> tuple[int, ...]:
        """Layers whose best factor is the largest tried, above 1 and significantly better than unscaled."""
        return self._best_at(self.factors[-1]) if self.factors[-1] > 1 else ()

    def rises_at_low_edge(self) -> tuple[int, ...]:
        """Layers whose best factor is the smallest tried, below 1 and significantly better than unscaled."""
        return self._best_at(self.factors[0]) if self.factors[0] < 1 else ()

    def _best_at(self, factor: float) -> tuple[int, ...]:
        return tuple(
            effect.layer
            for effect in self.effects
            if effect.factor == factor == self.best_factor(effect.layer) and effect.log_prob_change.low > 0
        )

    def advice(self) -> list[str]:
        """Returns what this suggests for a search: plain sentences that name layers and options."""
        worth, gain = self.layers_worth_searching(), self.layers_that_gain()
        groups = self.split["groups"]
        if not worth:
            return [
                f"no layer changes the gold log-probability measurably with a factor of {_listed(self.factors)} in "
                f"{groups} contexts: try other factors, more contexts or longer prompts."
            ]
        text = format_layers(worth)
        if worth == self.layers:
            advice = [f"search {_named(worth)} (--layers {text}): each one that was tried changes the result."]
        else:
            advice = [f"search {_named(worth)} (--layers {text}): the others change nothing measurable by themselves."]
        if gain and gain != worth:
            advice.append(f"of these only {_named(gain)} {_verb(gain, 'gain')} by a factor of their own.")
        advice += self._edge_advice()
        return advice

    def _edge_advice(self) -> list[str]:
        """Sentences on layers for which the range that was tried ends too early."""
        low, high = self.factors[0], self.factors[-1]
        rising, falling = self.rises_at_edge(), self.rises_at_low_edge()
        # with factors above 1 alone, the unscaled model is the low end of the range
        losing = [i for i in self.layers_worth_searching() if low > 1 and self.best_factor(i) == 1.0]
        advice = []
        if rising:
            wider = f"--max-factor {_rounded(2 * high - 1)}"
            advice.append(
                f"{_named(rising)} still {_verb(rising, 'rise')} at {high:g}, the largest tried: try {wider}."
            )
        if falling:
            wider = f"--min-factor {_rounded(low / 2)}"
            advice.append(f"{_named(falling)} {_is(falling)} best at {low:g}, the smallest tried: try {wider}.")
        if losing:
            advice.append(
                f"{_named(losing)} {_verb(losing, 'lose')} with every factor above 1; none below 1 was tried."
            )
        return advice

    def subtitle(self) -> str:
        """Says in one line what was measured."""
        length, groups = self.split["max_tokens"], self.split["groups"]
        window = f" = {length / self.model_window:.1f}× the trained window" if self.model_window else ""
        return f"{self.task['name']}, {length} tokens{window}, {groups} contexts of the {self.split['name']} split"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for a JSON report."""
        return {
            "model": self.model_name,
            "model_window": self.model_window,
            "task": self.task,
            "split": self.split,
            "settings": self.settings,
            "layers": list(self.layers),
            "factors": list(self.factors),
            "key_sources": list(self.key_sources),
            "unscaled": {"accuracy_utilisation": _short(self.accuracy), "log_prob_utilisation": _short(self.log_prob)},
            "effects": [
                {
                    "layer": effect.layer,
                    "factor": effect.factor,
                    "accuracy_utilisation": _short(effect.accuracy),
                    "accuracy_change": _short_interval(effect.accuracy_change),
                    "log_prob_utilisation": _short(effect.log_prob),
                    "log_prob_change": _short_interval(effect.log_prob_change),
                }
                for effect in self.effects
            ],
            "layers_worth_searching": list(self.layers_worth_searching()),
            "layers_that_gain": list(self.layers_that_gain()),
            "rises_at_edge": list(self.rises_at_edge()),
            "rises_at_low_edge": list(self.rises_at_low_edge()),
            "advice": self.advice(),
        }


def sensitivity(
    model: nn.Module,
    task: Task,
    *,
    factors: Sequence[float] = DEFAULT_FACTORS,
    layers: Sequence[int] | None = None,
    rope_type: str = "default",
    factor: float = 1.0,
    original_max_position_embeddings: int | None = None,
    weights: tuple[float, float, float] = DEFAULT_WEIGHTS,
    split: SplitName = "search",
    num_groups: int = 16,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: bool | SearchProgress = True,
) -> Sensitivity:
    """Scales one layer at a time by each of `factors`, all others by 1.0, and measures what changes.

    The differences are to the unscaled model: every layer's factor 1.0, `rope_type` and `factor` in force. Layers with
    a shared KV cache move with the layer whose keys they attend to. Where the model allows it, vectors share their
    leading layers, which saves up to half of the work.

    Args:
        model: a transformers causal language model; left as it was found.
        task: where the examples come from.
        factors: what each layer is scaled by; positive, distinct and other than 1.
        layers: which layers to scale, one at a time; default: all that rotate keys of their own.
        rope_type: `"default"`, `"linear"` (PI) or `"dynamic"` (Dynamic-NTK).
        factor: global factor of `"linear"` and `"dynamic"`.
        original_max_position_embeddings: trained window for `"dynamic"`; default: the model's.
        weights: λ_first, λ_middle, λ_last of context utilisation.
        split: which split to measure on. What decides about a search should not be its test split.
        num_groups: independent contexts; each is asked at every gold position.
        batch_tokens: tokens per forward pass; halved when memory runs out.
        progress: a progress bar (default), none (`False`), or your own.

    Returns:
        The effect of each layer and factor; `.advice()` says what follows for a search.

    Raises:
        SearchError: an argument that cannot work; the message names it, its value and what was expected.
        InvalidConfigError: `rope_type` and `factor` do not go together.
        TaskError: the split cannot be made or does not fit the model.
        TaskError: the unscaled model answers nothing, or everything.
        UnsupportedModelError: the model's rotation cannot be scaled per layer.
    """
    settings = SearchSettings(
        rope_type=rope_type,
        factor=factor,
        original_max_position_embeddings=original_max_position_embeddings,
        weights=weights,
        batch_tokens=batch_tokens,
    )
    tried = _checked_factors(factors)
    if split not in SPLIT_NAMES:
        raise SearchError(f"split={split!r} is unknown, expected one of {', '.join(SPLIT_NAMES)}.")
    if isinstance(num_groups, bool) or not isinstance(num_groups, int) or num_groups < MIN_GROUPS:
        raise SearchError(f"num_groups={num_groups!r} must be an integer of at least {MIN_GROUPS}, for an interval.")
    key_sources = find_stack(model).key_sources
    space = FactorSpace(settings.grid, _checked_layers(layers, key_sources), key_sources)
    data = task.split(split, num_groups)
    check_vocabulary(model, data.examples)
    scorer = Scorer(model, batch_tokens=batch_tokens)
    if isinstance(task, PromptTask):
        with keeping_modes(model):
            found = preflight(scorer, task, wanted={split: num_groups})
        found.check()
        data = with_targets(data, found, task)

    with adapted(model, settings.adapter_config([1.0] * space.num_layers)) as peft_model:
        scorer.check(data)
        measured = _Measured(ModelEvaluator(Scorer(peft_model, batch_tokens=batch_tokens)), data, settings)
        measured.run(space, tried, progress)
    unscaled = measured.values[_unscaled(space)]
    return Sensitivity(
        layers=space.scaled_layers,
        factors=tried,
        accuracy=_mean(unscaled.accuracy),
        log_prob=_mean(unscaled.log_prob),
        effects=tuple(
            _effect(layer, value, measured.values[_one_scaled(space, layer, value)], unscaled, data.measure)
            for layer in space.scaled_layers
            for value in tried
        ),
        key_sources=key_sources,
        settings={
            "rope_type": rope_type,
            "factor": settings.factor,
            "original_max_position_embeddings": original_max_position_embeddings,
            "weights": list(weights),
        },
        model_name=model_name(model),
        model_window=trained_window(model),
        task=task.describe(),
        split=data.describe(),
    )


class _Values:
    """Utilisation of each group so far, of the accuracies and of the gold log-probabilities."""

    def __init__(self) -> None:
        self.accuracy: list[float] = []
        self.log_prob: list[float] = []


class _Measured:
    """Measures factor vectors on a split, part by part."""

    def __init__(self, evaluator: ModelEvaluator, split: Split, settings: SearchSettings) -> None:
        size = min(settings.batch_tokens // split.max_tokens, split.num_groups // _PROGRESS_PARTS)
        starts = range(0, split.num_groups, max(size, 1))
        self._parts = [split.part(start, start + starts.step) for start in starts]
        self._weights = settings.weights
        self._evaluator = evaluator
        self.values: dict[Factors, _Values] = {}

    def run(self, space: FactorSpace, factors: Sequence[float], progress: bool | SearchProgress) -> None:
        """Measures the unscaled model, and each layer of `space` with each factor."""
        with audience_of(progress) as audience:
            audience.stage("one layer at a time", len(self._parts) * len(factors))
            for part in self._parts:
                for number, factor in enumerate(factors):
                    vectors = [_one_scaled(space, layer, factor) for layer in space.scaled_layers]
                    self._measure([_unscaled(space), *vectors] if number == 0 else vectors, part)
                    audience.advance()

    def _measure(self, vectors: Sequence[Factors], part: Split) -> None:
        for vector, scores in zip(vectors, self._evaluator.scores(vectors, part), strict=True):
            values = self.values.setdefault(vector, _Values())
            values.accuracy += scores.utilisation_by_group("accuracy", self._weights).tolist()
            values.log_prob += scores.utilisation_by_group("log_prob", self._weights).tolist()


def _unscaled(space: FactorSpace) -> Factors:
    return (1.0,) * space.num_layers


def _one_scaled(space: FactorSpace, layer: int, factor: float) -> Factors:
    return space.tie([factor if i == layer else 1.0 for i in range(space.num_layers)])


def _effect(layer: int, factor: float, scaled: _Values, unscaled: _Values, measure: Measure) -> LayerEffect:
    return LayerEffect(
        layer,
        factor,
        _mean(scaled.accuracy),
        _mean(scaled.log_prob),
        paired_interval(scaled.accuracy, unscaled.accuracy, measure),
        mean_interval(np.subtract(scaled.log_prob, unscaled.log_prob)),
    )


def _checked_factors(factors: Sequence[float]) -> tuple[float, ...]:
    """Returns the factors as floats, ascending."""
    if isinstance(factors, (str, bytes)) or not isinstance(factors, Iterable):
        raise SearchError(f"factors={factors!r} must be a sequence of numbers.")
    values = tuple(factors)
    if not values:
        raise SearchError("factors=() must hold at least one factor.")
    for value in values:
        if not is_number(value) or not np.isfinite(value) or value <= 0:
            raise SearchError(f"factors={_shown(values)}: {value!r} must be a positive finite number.")
        LayerRopeConfig(layer_factors=[float(value)])  # its range
    if 1 in values:
        raise SearchError(
            f"factors={_shown(values)}: 1 is the unscaled model, to which all are compared; leave it out."
        )
    if len(set(map(float, values))) != len(values):
        raise SearchError(f"factors={_shown(values)} must be distinct.")
    return tuple(sorted(map(float, values)))


def _checked_layers(layers: Sequence[int] | None, key_sources: Sequence[int]) -> tuple[int, ...]:
    """Returns the layers, ascending; by default all that rotate keys of their own."""
    if layers is None:
        return tuple(layer for layer, source in enumerate(key_sources) if layer == source)
    values, last = tuple(layers), len(key_sources) - 1
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) for layer in values)
    if not values or not whole or len(set(values)) != len(values) or min(values) < 0 or max(values) > last:
        raise SearchError(f"layers={_shown(values)} must be distinct layer indices from 0 to {last}.")
    bound = [layer for layer in sorted(values) if key_sources[layer] != layer]
    if bound:
        sources = sorted({key_sources[layer] for layer in bound})
        raise SearchError(
            f"layers={_shown(values)}: {_named(bound)} {_verb(bound, 'attend')} to keys of {_named(sources)} (a shared "
            f"KV cache) and {_verb(bound, 'take')} the factor there; name {_named(sources)} instead."
        )
    return tuple(sorted(values))


def _named(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {format_layers(layers)}"


def _verb(layers: Sequence[int], verb: str) -> str:
    return verb if len(layers) > 1 else f"{verb}s"


def _is(layers: Sequence[int]) -> str:
    return "are" if len(layers) > 1 else "is"


def _listed(factors: Sequence[float]) -> str:
    return ", ".join(f"{factor:g}" for factor in factors)


def _shown(values: Sequence[Any]) -> str:
    return f"({', '.join(map(repr, values))})"


def _rounded(factor: float) -> str:
    return f"{factor:.3g}"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _short(value: float) -> float:
    return round(value, 6)


def _short_interval(interval: Interval) -> dict[str, float]:
    return {name: _short(value) for name, value in asdict(interval).items()}
