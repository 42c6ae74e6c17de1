"""`sensitivity`: one layer is scaled at a time. Which are worth searching, and over what range?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from ..base_model import adapted, keeping_modes, model_name
from ..plots import COLORS, draw_line, new_figure, to_png, unit_axis
from ..report import NATS, Table, times_window, unit_of
from ..scoring.batching import check_vocabulary
from ..scoring.preflight import preflight, with_targets
from ..scoring.scorer import Scorer
from ..scoring.scores import DEFAULT_WEIGHTS, Interval, PositionScores, rank_key
from ..searcher.evaluator import densely_scored
from ..searcher.settings import SearchSettings
from ..searcher.space import format_layers
from ..tasks.base import Measure, Task
from ..tasks.prompts import PromptTask
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import find_stack
from . import (
    Measuring,
    in_force,
    json_data,
    log_prob_difference,
    tried_factors,
    utilization_difference,
    with_factors,
)
from .section import Section, SectionFigure

NAME = "sensitivity"
DEFAULT_FACTORS = (1.3, 1.6, 2.0)


@dataclass(frozen=True)
class LayerEffect:
    """What scaling one layer does, all others at 1.0."""

    layer: int  # those that attend to its keys are scaled with it
    factor: float
    accuracy_utilization: float  # context utilisation U of the accuracies, from 0 to 1
    accuracy_change: Interval  # that minus the unscaled model's, with a paired 95 % interval over groups
    log_prob_utilization: float  # U of the gold log-probabilities, in nats
    log_prob_change: Interval  # that minus the unscaled model's, likewise


@dataclass(frozen=True)
class Sensitivity:
    """Result of [`sensitivity`].

    Each of its intervals holds with 95 % by itself: of many effects that are none, one in twenty looks like one. And
    a layer without an effect of its own may have one together with others.
    """

    layers: tuple[int, ...]  # that were scaled, ascending
    factors: tuple[float, ...]  # that were tried, ascending
    accuracy: float  # U of the unscaled model's accuracies, from 0 to 1
    log_prob: float  # U of the unscaled model's gold log-probabilities, in nats
    effects: tuple[LayerEffect, ...]  # one for each layer and factor, layer by layer
    key_sources: tuple[int, ...]  # for each layer of the model the one whose keys it attends to, mostly itself
    settings: dict[str, Any]  # rope type, global factor and the like
    model_name: str  # of the base model, free of local paths
    model_window: int | None  # the model's trained window in tokens; None if its config does not say
    task: dict[str, Any]  # its description
    split: dict[str, Any]  # its description

    @property
    def measure(self) -> Measure:
        return self.split.get("measure", "accuracy")

    def of_layer(self, layer: int) -> tuple[LayerEffect, ...]:
        """Returns the effects of one layer, by ascending factor."""
        return tuple(effect for effect in self.effects if effect.layer == layer)

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
        return self._best_at(max(1.0, *self.factors))

    def rises_at_low_edge(self) -> tuple[int, ...]:
        """Layers whose best factor is the smallest tried, below 1 and significantly better than unscaled."""
        return self._best_at(min(1.0, *self.factors))

    def _best_at(self, factor: float) -> tuple[int, ...]:
        at = [effect for effect in self.effects if effect.factor == factor and effect.log_prob_change.low > 0]
        return tuple(effect.layer for effect in at if self.best_factor(effect.layer) == factor)

    def advice(self) -> list[str]:
        """Returns what this suggests for a search: plain sentences that name layers."""
        worth, gain = self.layers_worth_searching(), self.layers_that_gain()
        low, high = self.factors[0], self.factors[-1]
        if not worth:
            return [
                "no layer changes the gold log-probability measurably with a factor of "
                f"{', '.join(f'{factor:g}' for factor in self.factors)} in {self.split['groups']} contexts: try other "
                "factors, more contexts or longer prompts."
            ]
        others = "the others change nothing measurable by themselves"
        why = "each one that was tried changes the result" if worth == self.layers else others
        advice = [f"search {_named(worth)}: {why}."]
        if gain and gain != worth:
            advice.append(f"of these only {_named(gain, 'gain')} by a factor of their own.")
        if rising := self.rises_at_edge():
            advice.append(f"{_named(rising, 'still rise')} at {high:g}, the largest tried: try larger ones.")
        if falling := self.rises_at_low_edge():
            advice.append(f"{_named(falling, 'score')} best at {low:g}, the smallest tried: try smaller ones.")
        # with factors above 1 alone, the unscaled model is the low end of the range
        if losing := [layer for layer in worth if low > 1 and self.best_factor(layer) == 1.0]:
            advice.append(f"{_named(losing, 'lose')} with every factor above 1; none below 1 was tried.")
        return advice

    def subtitle(self) -> str:
        """Says in one line what was measured."""
        tokens, groups, split = (self.split[name] for name in ("max_tokens", "groups", "name"))
        window = times_window(tokens, self.model_window)
        return f"{self.task['name']}, {tokens} tokens{window}, {groups} contexts of the {split} split"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for a JSON report."""
        return json_data(
            model=self.model_name,
            model_window=self.model_window,
            task=self.task,
            split=self.split,
            settings=self.settings,
            layers=self.layers,
            factors=self.factors,
            key_sources=self.key_sources,
            unscaled={"accuracy_utilization": self.accuracy, "log_prob_utilization": self.log_prob},
            effects=self.effects,
            layers_worth_searching=self.layers_worth_searching(),
            layers_that_gain=self.layers_that_gain(),
            rises_at_edge=self.rises_at_edge(),
            rises_at_low_edge=self.rises_at_low_edge(),
            advice=self.advice(),
        )


def _named(layers: Sequence[int], verb: str = "") -> str:
    """The layers, and what they do."""
    several = len(layers) > 1
    return f"layer{'s' * several} {format_layers(layers)}" + (f" {verb}{'s' * (not several)}" if verb else "")


def sensitivity(
    measuring: Measuring,
    task: Task,
    config: LayerRopeConfig,
    factors: Sequence[float] = DEFAULT_FACTORS,
    layers_to_transform: str | Sequence[int] | None = None,
) -> Sensitivity:
    """Scales one layer at a time by each of `factors`, all others by 1.0, and measures what changes: on the search
    split, for what decides about a search should not be its test split.

    The differences are to the unscaled model: every layer's factor 1.0, the rope type in force. Layers with a shared KV
    cache move with the layer whose keys they attend to. Rope type and global factor are those of `config`;
    `layers_to_transform` may be text such as `"0-3,7"`, and are all with keys of their own by default. Nothing is kept.

    Raises:
        LayerRopeError: a factor or a layer that cannot be.
        TaskError: the split cannot be made or does not fit the model, or the unscaled model answers nothing, or
            everything.
        UnsupportedModelError: the model's rotation cannot be scaled per layer.
    """
    model, tried = measuring.model, tried_factors(factors)
    space = SearchSettings(layers_to_transform=layers_to_transform).space(find_stack(model).key_sources)
    split = measuring.split(task, "search")
    check_vocabulary(model, split.examples)
    scorer = Scorer(model, batch_tokens=measuring.batch_tokens)
    if isinstance(task, PromptTask):
        with keeping_modes(model):
            found = preflight(scorer, task, wanted={split.name: measuring.num_groups})
        found.check(task)
        split = with_targets(split, found, task)
    unscaled = [1.0] * space.num_layers
    pairs = [(layer, factor) for layer in space.scaled_layers for factor in tried]
    with adapted(model, with_factors(model, config, unscaled)) as peft_model:
        scorer.model = peft_model
        scorer.check(split)
        measuring.audience.stage("one layer at a time", 1 + len(pairs))

        def scores(vector: Sequence[float]) -> PositionScores:
            peft_model.base_model.set_layer_factors(space.tie(vector))
            found = densely_scored(scorer, split)
            measuring.audience.advance()
            return found

        before = scores(unscaled)
        effects = []
        for layer, factor in pairs:
            after = scores([factor if i == layer else 1.0 for i in range(space.num_layers)])
            accuracy = round(after.utilization(), 6), utilization_difference(after, before)
            log_prob = round(after.log_prob_utilization(), 6), log_prob_difference(after, before)
            effects.append(LayerEffect(layer, factor, *accuracy, *log_prob))
    measuring.batch_tokens = scorer.batch_tokens
    return Sensitivity(
        layers=space.scaled_layers,
        factors=tried,
        accuracy=round(before.utilization(), 6),
        log_prob=round(before.log_prob_utilization(), 6),
        effects=tuple(effects),
        key_sources=space.key_sources,
        settings={
            "rope_type": config.rope_type,
            "factor": config.factor,
            "original_max_position_embeddings": config.original_max_position_embeddings,
            "weights": list(DEFAULT_WEIGHTS),
        },
        model_name=model_name(model),
        model_window=measuring.window,
        task=task.describe(),
        split=split.describe(),
    )


def run_sensitivity(measuring: Measuring, task: Task, config: LayerRopeConfig) -> Section:
    """Does what [`sensitivity`] does, as a section of a report."""
    result = sensitivity(measuring, task, config)
    return Section(
        name=NAME,
        title="One layer at a time",
        question="Which layers does scaling matter to?",
        measured=result.subtitle() + in_force(config),
        findings=tuple(line[:1].upper() + line[1:] for line in result.advice()),
        tables=(sensitivity_table(result),),
        figures=(SectionFigure("layers", "Effect of scaling one layer by several factors.", plot_sensitivity(result)),),
        data=result.to_dict(),
    )


_MOST_FACTORS_BESIDE = 4  # more do not fit into 80 columns
_GROUP_WIDTH = 0.6  # of the points of one layer, where the distance of two layers is 1


def sensitivity_table(result: Sensitivity, title: str = "") -> Table:
    """Returns U and the change of the gold log-probability's U: a line for each layer; with more than four factors a
    line for each layer and factor.
    """
    beside = len(result.factors) <= _MOST_FACTORS_BESIDE
    name, unit = "loss" if result.measure == "loss" else "U", unit_of(result.measure)
    rows = []
    for layer in result.layers:
        followers = result.followers(layer)
        label = f"{layer} (+{format_layers(followers)})" if followers else str(layer)
        lines = []
        for effect in result.of_layer(layer):
            change = effect.log_prob_change
            shown = f"{change.value:+.3f}{'*' * change.excludes_zero()}"
            lines.append((f"{effect.factor:g}", unit.value(effect.accuracy_utilization), shown))
        if beside:
            rows.append((label, *(cell for _, *cells in lines for cell in cells)))
        else:
            rows += [(label, *line) for line in lines]
    columns = [cell for factor in result.factors for cell in (f"{factor:g}: {name}", "Δ")]
    return Table(("layer", *(columns if beside else ("factor", name, "Δ"))), tuple(rows), title, _legend(result))


def change_style(cell: str) -> str:
    """The style of a cell of [`sensitivity_table`] in a terminal."""
    return "" if not cell.endswith("*") else "green" if cell.startswith("+") else "red"


def _legend(result: Sensitivity) -> str:
    what = (
        f"U: context utilisation of the accuracies in % (teacher-forced exact match), {100 * result.accuracy:.1f} "
        f"unscaled. Δ: change of the gold log-prob's U in nats, from {result.log_prob:.3f} unscaled."
    )
    if result.measure == "loss":
        what = f"loss: in nats per token, {-result.accuracy:.3f} unscaled. Δ: nats saved."
    legend = (
        f"Only that layer is scaled. {what} *: the paired 95 % interval over contexts excludes 0, as it does for 1 in "
        "20 by chance."
    )
    if any(result.followers(layer) for layer in result.layers):
        legend += " (+n): layers that attend to its keys and are scaled with it."
    return legend


def plot_sensitivity(result: Sensitivity) -> bytes:
    """Draws the change of the gold log-probability's U with 95 % intervals, and U of the accuracies, as PNG: a point
    for each layer and factor.
    """
    figure, (upper, lower) = new_figure(6.4, rows=2, sharex=True, height_ratios=(3, 2))
    figure.set_figwidth(min(max(figure.get_figwidth(), 2.2 + 0.09 * len(result.effects)), 14))
    loss, unit = result.measure == "loss", unit_of(result.measure)
    for number, factor in enumerate(result.factors):
        effects = [effect for effect in result.effects if effect.factor == factor]
        shift = _GROUP_WIDTH * ((number + 0.5) / len(result.factors) - 0.5)
        x = [result.layers.index(effect.layer) + shift for effect in effects]
        color = COLORS[number % len(COLORS)]
        draw_line(upper, x, [e.log_prob_change for e in effects], NATS, f"× {factor:g}", color, fmt="o")
        lower.plot(x, unit.shown([effect.accuracy_utilization for effect in effects]), "o", color=color, markersize=4)
    upper.axhline(0, color="black", linewidth=0.8, label="unscaled")
    lower.axhline(unit.shown(result.accuracy), color="black", linewidth=0.8)
    unit_axis(lower, unit)
    upper.set_ylabel("nats saved" if loss else "change of U of the\ngold log-prob (nats)")
    lower.set(ylabel="loss (nats)" if loss else "U of the accuracy (%)", xlabel="layer that is scaled")
    count = len(result.layers)
    step = -(-count // 40)
    for axes in (upper, lower):  # layers evenly spaced, also where some were left out, every other one on a band
        for position in range(1, count, 2):
            axes.axvspan(position - 0.5, position + 0.5, color="0.96", linewidth=0, zorder=0)
        axes.set_xticks(range(0, count, step), [str(layer) for layer in result.layers[::step]])
        axes.set_xlim(-0.5, count - 0.5)
        axes.yaxis.set_major_locator(MaxNLocator(6))
    title = "Effect of scaling one layer by a factor; bars: paired 95 % intervals over contexts"
    return to_png(figure, title, result.subtitle())
