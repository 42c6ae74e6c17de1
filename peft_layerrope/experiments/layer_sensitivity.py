"""`sensitivity`, one layer at a time, as a section of a report."""

from __future__ import annotations

from matplotlib.ticker import MaxNLocator
from torch import nn

from ..plots import COLOURS, draw_line, new_figure, to_png, unit_axis
from ..report import NATS, Table, Unit, unit_of
from ..searcher.plan import SearchProgress
from ..searcher.sensitivity import LayerEffect, Sensitivity, sensitivity
from ..searcher.space import format_layers
from ..tasks import Task
from ..tuner.config import LayerRopeConfig
from .measuring import Measuring, in_force
from .section import Section, SectionFigure

NAME = "sensitivity"
DEFAULT_GROUPS = 16


def run_sensitivity(
    model: nn.Module,
    task: Task,
    config: LayerRopeConfig | None = None,
    *,
    num_groups: int = DEFAULT_GROUPS,
    measuring: Measuring | None = None,
) -> Section:
    """Scales one layer at a time, as `layerrope sensitivity` does: on the search split.

    Args:
        model: a transformers causal language model; left as it was found.
        task: where the examples come from.
        config: whose rope type and global factor are in force; default: the plain rope.
        num_groups: contexts of the search split.
        measuring: how to measure; nothing is kept in its folder.

    Raises:
        SearchError: see `searcher.sensitivity`.
        TaskError: the task cannot give the contexts.
    """
    config, measuring = config or LayerRopeConfig(), measuring or Measuring()
    result = sensitivity(
        model,
        task,
        rope_type=config.rope_type,
        factor=config.factor,
        original_max_position_embeddings=config.original_max_position_embeddings,
        num_groups=num_groups,
        batch_tokens=measuring.batch_tokens,
        progress=_Borrowed(measuring.audience),
    )
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


class _Borrowed(SearchProgress):
    """Passes on what it is told; `sensitivity` would close what it was given."""

    def __init__(self, audience: SearchProgress) -> None:
        self._audience = audience

    def stage(self, name: str, total: int) -> None:
        self._audience.stage(name, total)

    def advance(self) -> None:
        self._audience.advance()

    def note(self, text: str) -> None:
        self._audience.note(text)


_MOST_FACTORS_BESIDE = 4  # more do not fit into 80 columns
_GROUP_WIDTH = 0.6  # of the points of one layer, where the distance of two layers is 1


def sensitivity_table(result: Sensitivity, title: str = "") -> Table:
    """Returns U and the change of the gold log-probability's U: a line for each layer; with more than four factors a
    line for each layer and factor.
    """
    beside = len(result.factors) <= _MOST_FACTORS_BESIDE
    name = "loss" if _is_loss(result) else "U"
    header = [cell for factor in result.factors for cell in (f"{factor:g}: {name}", "Δ")] if beside else [name, "Δ"]
    rows = []
    for layer in result.layers:
        lines = [(f"{effect.factor:g}", *_cells(result, effect)) for effect in result.of_layer(layer)]
        if beside:
            lines = [tuple(cell for _, *cells in lines for cell in cells)]
        rows += [(_label(result, layer), *line) for line in lines]
    return Table(("layer", *([] if beside else ["factor"]), *header), tuple(rows), title, _legend(result))


def change_style(cell: str) -> str:
    """The style of a cell of [`sensitivity_table`] in a terminal."""
    return "" if not cell.endswith("*") else "green" if cell.startswith("+") else "red"


def _label(result: Sensitivity, layer: int) -> str:
    followers = result.followers(layer)
    return f"{layer} (+{format_layers(followers)})" if followers else str(layer)


def _is_loss(result: Sensitivity) -> bool:
    return result.split.get("measure") == "loss"


def _unit(result: Sensitivity) -> Unit:
    return unit_of(result.split.get("measure", "accuracy"))


def _cells(result: Sensitivity, effect: LayerEffect) -> tuple[str, str]:
    change = effect.log_prob_change
    return _unit(result).value(effect.accuracy), f"{change.value:+.3f}{'*' if change.excludes_zero() else ''}"


def _legend(result: Sensitivity) -> str:
    what = (
        f"U: context utilisation of the accuracies in %, {100 * result.accuracy:.1f} unscaled. Δ: change of the gold "
        f"log-prob's U in nats, from {result.log_prob:.3f} unscaled."
    )
    if _is_loss(result):
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
    loss, unit = _is_loss(result), _unit(result)
    for number, factor in enumerate(result.factors):
        effects = [effect for effect in result.effects if effect.factor == factor]
        shift = _GROUP_WIDTH * ((number + 0.5) / len(result.factors) - 0.5)
        x = [result.layers.index(effect.layer) + shift for effect in effects]
        colour = COLOURS[number % len(COLOURS)]
        draw_line(upper, x, [e.log_prob_change for e in effects], NATS, f"× {factor:g}", colour, fmt="o")
        lower.plot(x, unit.shown([effect.accuracy for effect in effects]), "o", color=colour, markersize=4)
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
