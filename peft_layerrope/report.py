"""Tables, from plain results. Knows nothing of how they were made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from rich import box
from rich.table import Table

from .families import NOT_BUILT, REFUSED, SUPPORTED, WRONG, Trial
from .scoring.scores import Interval, PositionScores, perplexity, rank_key
from .tasks import Measure
from .verification import MISMATCH, OK, Verification


class Row(Protocol):
    """A line of the held-out table."""

    name: str
    label: str
    factors: Sequence[float]
    fitness: float
    evaluations: int
    scores: PositionScores
    harm: Any  # with `divergence` and `loss_rise`, each an `Interval` (the latter maybe None); or None


class Comparison(Protocol):
    """A held-out table with paired differences."""

    def __iter__(self) -> Iterable[Row]: ...

    def difference(self, name: str, baseline: str) -> Interval:
        """Average accuracy (or minus the loss) of row `name` minus that of `baseline`, paired."""


class Plan(Protocol):
    """What a search is going to cost."""

    evaluations: Mapping[str, int]
    num_evaluations: int
    tokens_per_evaluation: int
    tokens: int
    memory_bytes: int
    seconds_per_evaluation: float
    seconds: float


def format_factors(factors: Sequence[float]) -> str:
    """Writes factors for people; a uniform vector as a single number."""
    if len(set(factors)) == 1:
        return f"{factors[0]:g}"
    return " ".join(f"{factor:g}" for factor in factors)


def percent(value: float) -> str:
    """Writes a share in percent."""
    return f"{100 * value:.1f}"


def value_with_interval(interval: Interval, measure: Measure) -> str:
    """Writes an estimate of `PositionScores` with its interval: accuracy in percent, or the loss in nats."""
    if measure == "loss":
        return f"{-interval.value:.3f} [{-interval.high:.3f}, {-interval.low:.3f}]"
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def difference(interval: Interval, measure: Measure) -> str:
    """Writes a paired difference; plus is better: points of accuracy gained, or nats of loss saved."""
    half = max(interval.high - interval.value, interval.value - interval.low)  # one end may be cut at ±1
    if measure == "loss":
        return f"{interval.value:+.3f} ± {half:.3f}"
    return f"{100 * interval.value:+.1f} ± {100 * half:.1f}"


def perplexity_with_interval(interval: Interval) -> str:
    """Writes the perplexity of minus a loss, with its interval."""
    value, low, high = (perplexity(-x) for x in (interval.value, interval.high, interval.low))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


_HARM_LEGEND = (
    "KL: divergence of next-token distributions from the unscaled model's on text that it wrote; text loss: rise of "
    "the loss on people's text; both in nats."
)
TABLE_LEGEND = (
    "accuracy: {what} in %, mean over all gold positions; worst: at the worst position; U: context utilisation "
    "of the accuracies. Brackets and ±: 95 % intervals over contexts; differences are paired. Control: of "
    '"first k at 1, rest b" and "first a, rest b" the one that is better on the search split.'
)
LOSS_LEGEND = (
    "loss: mean over the scored tokens, in nats. Brackets and ±: 95 % intervals over windows; differences are paired, "
    "and + is better: nats of loss saved."
)


def _measure_of(table: Comparison) -> Measure:
    return next(iter(table)).scores.measure


def _legend(table: Comparison) -> str:
    if _measure_of(table) == "loss":
        return LOSS_LEGEND
    written = next(iter(table)).scores.written is not None
    return TABLE_LEGEND.format(what="right answers written" if written else "exact match")


def _score_cells(scores: PositionScores) -> list[str]:
    """Accuracy, worst and U; or loss and perplexity."""
    average = value_with_interval(scores.average(), scores.measure)
    if scores.measure == "loss":
        return [average, f"{perplexity(-scores.average().value):.2f}"]
    return [average, percent(scores.accuracy_by_position.min()), percent(scores.utilisation())]


_AGAINST = {"none": "vs none", "uniform": "vs uniform", "uniform_bounded": "vs uniform"}


def _comparison_cells(table: Comparison, against: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the held-out scores: method, what [`_score_cells`] has, paired differences."""
    measure = _measure_of(table)
    against = [name for name in against if name in {row.name for row in table}]
    cells = []
    for row in table:
        line = [row.label, *_score_cells(row.scores)]
        for name in against:
            line.append("" if name == row.name else difference(table.difference(row.name, name), measure))
        cells.append(line)
    columns = ["loss", "perplexity"] if measure == "loss" else ["accuracy", "worst", "U"]
    header = [_AGAINST.get(name, "vs control") for name in against]
    return ["method", *columns, *header], cells


def _choice_cells(table: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and cells of what each method chose on the search split, after how many tries, and what it does to
    ordinary text where that is known.
    """
    harmed = any(row.harm is not None for row in table)
    cells = []
    for row in table:
        line = [row.label, str(row.evaluations), f"{row.fitness:.3f}"]
        if harmed:
            rise = row.harm.loss_rise
            line += [f"{row.harm.divergence.value:.4f}", f"{rise.value:+.4f}" if rise is not None else "–"]
        cells.append([*line, format_factors(row.factors)])
    return ["method", "tried", "fitness", *(["KL", "text loss"] if harmed else []), "factors"], cells


def comparison_table(table: Comparison, title: str, against: Sequence[str] = ()) -> Table:
    """Returns the held-out comparison as a rich table of at most 80 columns, compared with these rows."""
    return rich_table(title, _legend(table), *_comparison_cells(table, against), left=(0,))


def choice_table(table: Comparison) -> Table:
    """Returns what each method chose on the search split as a rich table."""
    title = "Chosen on the search split, from so many distinct factor vectors"
    header, cells = _choice_cells(table)
    caption = _HARM_LEGEND if "KL" in header else None
    return rich_table(title, caption, header, cells, left=(0, len(header) - 1))


def rich_table(
    title: str,
    caption: str | None,
    header: list[str],
    cells: list[list[str]],
    left: Sequence[int],
    folded: Sequence[int] = (),
) -> Table:
    """Returns a plain table.

    Args:
        title: above it.
        caption: below it.
        header: names of the columns.
        cells: lines below the header.
        left: columns that are flush left; only these, and
        folded: these, are folded where the table does not fit.
    """
    rendered = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        collapse_padding=True,
        pad_edge=False,
    )
    for i, column in enumerate(header):
        rendered.add_column(
            column, justify="left" if i in left else "right", no_wrap=i not in (*left, *folded), overflow="fold"
        )
    for line in cells:
        rendered.add_row(*line)
    return rendered


def markdown_table(table: Comparison, against: Sequence[str] = ()) -> str:
    """Returns the held-out comparison with the factors in Markdown, for a model card."""
    header, scores = _comparison_cells(table, against)
    names, choices = _choice_cells(table)
    kept = [i for i, name in enumerate(names) if name not in ("method", "fitness")]
    lines = [
        [*header, *(names[i] for i in kept)],
        ["---", *["---:"] * (len(header) + len(kept) - 2), "---"],
        *([*score, *(choice[i] for i in kept)] for score, choice in zip(scores, choices, strict=True)),
    ]
    tried = "tried: distinct factor vectors evaluated on the search split."
    if "KL" in names:
        tried = f"{tried} {_HARM_LEGEND}"
    return f"{markdown(lines)}\n\n{tried} {_legend(table)}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Returns lines of cells as a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plan_table(plan: Plan) -> Table:
    """Returns what a search is going to cost at most, stage by stage."""
    cells = [[name, str(count)] for name, count in plan.evaluations.items()]
    cells.append(["all", str(plan.num_evaluations)])
    return rich_table("The search, at most", plan_line(plan), ["stage", "evaluations"], cells, left=(0,))


def plan_line(plan: Plan) -> str:
    """The same in a sentence."""
    each = f"{plan.num_evaluations} evaluations of {plan.tokens_per_evaluation:,} tokens"
    total = f"{plan.tokens / 1e6:.1f} M tokens with the held-out splits, {plan.memory_bytes / 2**30:.1f} GiB"
    return (
        f"at most {each}, {total}, {duration(plan.seconds)} (one evaluation: {plan.seconds_per_evaluation:.2f} s). "
        "Racing, shared layers and vectors known already make it shorter."
    )


def duration(seconds: float) -> str:
    """Writes a time for people."""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def position_table(scores: PositionScores, title: str) -> Table:
    """Returns the scores by position as a rich table: accuracy and gold log-probability, or loss and perplexity."""
    if scores.measure == "loss":
        rows = [*zip(map(str, scores.positions), scores.intervals(), strict=True), ("all", scores.average())]
        cells = [[name, value_with_interval(i, "loss"), perplexity_with_interval(i)] for name, i in rows]
        caption = "Tokens from each position to the next. Brackets: 95 % intervals over windows."
        return rich_table(title, caption, ["token", "loss in nats", "perplexity"], cells, left=())
    more = written_columns(scores)
    header = ["gold position", "accuracy %", *more, "gold log-prob"]
    cells = []
    for row, (position, interval) in enumerate(zip(scores.positions, scores.intervals(), strict=True)):
        others = [percent(values[:, row].mean()) for values in more.values()]
        log_prob = f"{scores.log_prob_by_position[row]:.3f}"
        cells.append([str(position), value_with_interval(interval, "accuracy"), *others, log_prob])
    others = [percent(values.mean()) for values in more.values()]
    log_prob = f"{scores.log_prob_by_position.mean():.3f}"
    cells.append(["average", value_with_interval(scores.average(), "accuracy"), *others, log_prob])
    blanks = [""] * len(more)
    cells.append(["U", percent(scores.utilisation()), *blanks, f"{scores.log_prob_utilisation():.3f}"])
    caption = "Brackets: 95 % intervals, of the average over contexts, else Wilson's; U: context utilisation."
    return rich_table(title, " ".join([caption, *written_legend(scores)]), header, cells, left=())


def written_columns(scores: PositionScores) -> dict[str, np.ndarray]:
    """Returns what is known of written answers beside the metric, `(groups, positions)` each, by its name in tables."""
    written = scores.written
    columns = {"strict": written.strict, "forced": written.forced} if written is not None else {}
    return {name: values for name, values in columns.items() if values is not None}


def written_legend(scores: PositionScores) -> list[str]:
    """Returns what the columns of [`written_columns`] mean, and how long the answers were, in sentences."""
    if scores.written is None:
        return []
    meanings = {
        "strict": "strict: the first value written is the gold.",
        "forced": "forced: every token of the target the most probable one, in one teacher-forced pass.",
    }
    lines = [meanings[name] for name in written_columns(scores)]
    tokens, cut_off = scores.written.num_tokens.mean(), scores.written.cut_off.mean()
    return [*lines, f"Answers have {tokens:.1f} tokens on average; {percent(cut_off)} % were cut off."]


def fitness_remark(scores: Mapping[str, PositionScores]) -> list[str]:
    """Returns a line where other answers are the likeliest, which a search climbs to, than are right the most often.

    Args:
        scores: by the name of what was scored, all on the same examples.
    """
    if any(each.written is None or each.written.forced is None for each in scores.values()):
        return []
    likeliest = max(scores, key=lambda name: rank_key(scores[name].log_prob.mean()))
    best = max(scores, key=lambda name: scores[name].average().value)
    if scores[likeliest].average().value == scores[best].average().value:
        return []
    return [f'note: the answers of "{likeliest}" are the likeliest, but "{best}" writes the most right ones.']


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
