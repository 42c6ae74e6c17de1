"""Tables and plots, from plain results. Knows nothing of how they were made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from .bezier import sample_curve
from .families import NOT_BUILT, REFUSED, SUPPORTED, WRONG, Trial
from .scores import PositionScores
from .statistics import Interval
from .verification import MISMATCH, OK, Verification


class Row(Protocol):
    """A line of the held-out table."""

    name: str
    label: str
    factors: Sequence[float]
    fitness: float
    evaluations: int
    scores: PositionScores


class Comparison(Protocol):
    """A held-out table with paired differences."""

    def __iter__(self) -> Iterable[Row]: ...

    def difference(self, name: str, baseline: str) -> Interval:
        """Average accuracy of row `name` minus that of `baseline`, paired."""


class Plan(Protocol):
    """What a search is going to cost."""

    evaluations: Mapping[str, int]
    num_evaluations: int
    tokens_per_evaluation: int
    tokens: int
    memory_bytes: int
    seconds_per_evaluation: float
    seconds: float


_DPI = 150
_GREY, _COLOURS = "0.55", ("0.55", "tab:orange", "tab:green", "tab:blue")


def format_factors(factors: Sequence[float]) -> str:
    """Writes factors for people; a uniform vector as a single number."""
    if len(set(factors)) == 1:
        return f"{factors[0]:g}"
    return " ".join(f"{factor:g}" for factor in factors)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _percent_interval(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _percent_mean(interval: Interval, signed: bool = False) -> str:
    """A mean with its symmetric interval."""
    sign = "+" if signed else ""
    return f"{100 * interval.value:{sign}.1f} ± {100 * (interval.high - interval.value):.1f}"


TABLE_LEGEND = (
    "accuracy: exact match in %, mean over all gold positions; worst: at the worst position; U: context utilisation "
    'of the accuracies. ±: 95 % interval over contexts; differences are paired. Control: of "first k at 1, rest b" and '
    '"first a, rest b" the one that is better on the search split.'
)


def _comparison_cells(table: Comparison, control: str | None) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the held-out scores: method, accuracy, worst, U, paired differences."""
    against = [name for name in ("uniform", control) if name in {row.name for row in table}]
    cells = []
    for row in table:
        line = [
            row.label,
            _percent_mean(row.scores.average()),
            _percent(row.scores.accuracy_by_position.min()),
            _percent(row.scores.utilisation()),
        ]
        for name in against:
            line.append("" if name == row.name else _percent_mean(table.difference(row.name, name), signed=True))
        cells.append(line)
    header = ["vs uniform" if name == "uniform" else "vs control" for name in against]
    return ["method", "accuracy", "worst", "U", *header], cells


def _choice_cells(table: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and cells of what each method chose on the search split, and after how many tries."""
    cells = [[row.label, str(row.evaluations), f"{row.fitness:.3f}", format_factors(row.factors)] for row in table]
    return ["method", "tried", "fitness", "factors"], cells


def comparison_table(table: Comparison, title: str, control: str | None = None) -> Table:
    """Returns the held-out comparison as a rich table of at most 80 columns; `control` names the row to compare with,
    beside the best uniform factor.
    """
    return _rich_table(title, TABLE_LEGEND, *_comparison_cells(table, control), left=(0,))


def choice_table(table: Comparison) -> Table:
    """Returns what each method chose on the search split as a rich table."""
    title = "Chosen on the search split, from so many distinct factor vectors"
    return _rich_table(title, None, *_choice_cells(table), left=(0, 3))


def _rich_table(
    title: str, caption: str | None, header: list[str], cells: list[list[str]], left: Sequence[int]
) -> Table:
    rendered = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for i, column in enumerate(header):
        rendered.add_column(column, justify="left" if i in left else "right", no_wrap=i not in left)
    for line in cells:
        rendered.add_row(*line)
    return rendered


def markdown_table(table: Comparison, control: str | None = None) -> str:
    """Returns the held-out comparison with the factors in Markdown, for a model card."""
    header, scores = _comparison_cells(table, control)
    _, choices = _choice_cells(table)
    lines = [
        [*header, "tried", "factors"],
        ["---", *["---:"] * len(header), "---"],
        *([*score, choice[1], choice[3]] for score, choice in zip(scores, choices, strict=True)),
    ]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{body}\n\ntried: distinct factor vectors evaluated on the search split. {TABLE_LEGEND}"


def plan_table(plan: Plan) -> Table:
    """Returns what a search is going to cost at most, stage by stage."""
    cells = [[name, str(count)] for name, count in plan.evaluations.items()]
    cells.append(["all", str(plan.num_evaluations)])
    return _rich_table("The search, at most", plan_line(plan), ["stage", "evaluations"], cells, left=(0,))


def plan_line(plan: Plan) -> str:
    """The same in a sentence."""
    each = f"{plan.num_evaluations} evaluations of {plan.tokens_per_evaluation:,} tokens"
    total = f"{plan.tokens / 1e6:.1f} M tokens with the held-out splits, {plan.memory_bytes / 2**30:.1f} GiB"
    return (
        f"at most {each}, {total}, {_duration(plan.seconds)} (one evaluation: {plan.seconds_per_evaluation:.2f} s). "
        "Racing, shared layers and vectors known already make it shorter."
    )


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def position_table(scores: PositionScores, title: str) -> Table:
    """Returns accuracy and gold log-probability by gold position as a rich table."""
    cells = []
    for position, interval, log_prob in zip(
        scores.positions, scores.intervals(), scores.log_prob_by_position, strict=True
    ):
        cells.append([str(position), _percent_interval(interval), f"{log_prob:.3f}"])
    cells.append(["average", _percent_mean(scores.average()), f"{scores.log_prob_by_position.mean():.3f}"])
    cells.append(["U", _percent(scores.utilisation()), f"{scores.log_prob_utilisation():.3f}"])
    caption = "Brackets: 95 % Wilson intervals; ±: 95 % interval over contexts; U: context utilisation."
    return _rich_table(title, caption, ["gold position", "accuracy %", "gold log-prob"], cells, left=())


def plot_accuracy_by_position(curves: Mapping[str, PositionScores], path: str | Path, subtitle: str) -> None:
    """Draws accuracy over gold position with 95 % Wilson bands, one line per method, as PNG.

    Args:
        curves: label to scores; the first is drawn in grey as "before".
        path: file to write.
        subtitle: what was measured, under the title.
    """
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for (label, scores), colour in zip(curves.items(), _COLOURS, strict=False):
        intervals = scores.intervals()
        low, high = [100 * i.low for i in intervals], [100 * i.high for i in intervals]
        axes.fill_between(scores.positions, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(scores.positions, 100 * scores.accuracy_by_position, "o-", color=colour, label=label, markersize=4)
    axes.set(xlabel="position of the answer (index of the pair)", ylabel="accuracy (%)", ylim=(-3, 103))
    _finish(figure, axes, "Accuracy by position of the answer", subtitle, path)


def plot_factors_by_depth(
    factors: Sequence[float],
    path: str | Path,
    *,
    control_points: Sequence[Sequence[float]] | None = None,
    scaled_layers: Sequence[int] | None = None,
) -> None:
    """Draws the factor of every layer, and the Bézier curve that the search came from, as PNG.

    Args:
        factors: one per layer.
        path: file to write.
        control_points: four `(x, y)` points; x runs over `scaled_layers`.
        scaled_layers: layers that the curve spans; default: all.
    """
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    layers = list(range(len(factors)))
    axes.bar(layers, factors, width=0.6, color="tab:blue", alpha=0.8, label="factor of the layer")
    if control_points is not None:
        spanned = list(scaled_layers) if scaled_layers is not None else layers
        depth = np.linspace(spanned[0], spanned[-1], 200)
        axes.plot(depth, sample_curve(control_points, 200), color="tab:orange", label="Bézier curve before refinement")
        x = [spanned[0] + point[0] * (spanned[-1] - spanned[0]) for point in control_points]
        axes.plot(x, [point[1] for point in control_points], "s:", color=_GREY, markersize=4, label="control points")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="layer", ylabel="factor", xticks=layers if len(layers) <= 16 else None)
    _finish(figure, axes, "RoPE scaling factor by depth", "1.0 leaves a layer as it was trained", path)


def _finish(figure: Figure, axes: Axes, title: str, subtitle: str, path: str | Path) -> None:
    axes.set_title(title, loc="left", pad=20)
    axes.annotate(subtitle, (0, 1), (0, 6), "axes fraction", "offset points", fontsize=8, color="0.35")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=_DPI)


def verification_table(verification: Verification, title: str) -> Table:
    """A line for each layer: its factor as expected and as measured, and what that means."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("layer", "expected", "measured"):
        table.add_column(column, justify="right")
    table.add_column("status", overflow="fold")
    for check in verification.layers:
        style = {OK: "green", MISMATCH: "bold red"}.get(check.status, "dim")
        measured = "" if check.measured is None else f"{check.measured:.3f}"
        status = f"{check.status}: {check.note}" if check.note else check.status
        table.add_row(str(check.layer), f"{check.expected:.3f}", measured, f"[{style}]{status}[/]")
    return table


def families_table(trials: Sequence[Trial], kinds: Mapping[str, str], title: str) -> Table:
    """A line for each family: whether the tuner can scale it, and why not or with what exception."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("model type", "kind", "result"):
        table.add_column(column, no_wrap=True)
    table.add_column("reason", overflow="fold")
    styles = {SUPPORTED: "green", REFUSED: "yellow", NOT_BUILT: "dim", WRONG: "bold red"}
    for trial in trials:
        reason = trial.reason
        if trial.unrotated_layers:
            reason = f"layers {trial.unrotated_layers} of the tiny model have no rotation to scale"
        table.add_row(
            trial.model_type, kinds.get(trial.model_type, ""), f"[{styles[trial.status]}]{trial.status}[/]", reason
        )
    return table


def count_families(trials: Sequence[Trial]) -> str:
    """The counts in one line."""
    counts = [(status, sum(t.status == status for t in trials)) for status in (SUPPORTED, REFUSED, NOT_BUILT, WRONG)]
    return ", ".join(f"{count} {status}" for status, count in counts)
