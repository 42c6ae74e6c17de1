"""Tables for terminals and Markdown, and how scores are written in them. Knows nothing of how they were made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import rich.table
from rich import box
from rich.cells import cell_len
from rich.text import Text

from .scoring.scores import DEFAULT_WEIGHTS, Interval, PositionScores, perplexity, rank_key
from .tasks.base import Measure

_WIDEST, _GAP = 80, 2  # columns of a terminal: of a table, between two of its columns
_WORD, _PART = 20, 8  # of a word that is not broken, and of what it is broken into where the table is wide
_MARKDOWN_SPECIAL = re.compile(r"[\\`*_\[\]|~$]|^(?:[#>+=-]|\d+(?=[.)]))")
_FIGURES = re.compile(r"[-+±–\d.,%\[\] ]*")  # of which Markdown makes nothing in a cell


@dataclass(frozen=True)
class Table:
    """A table of text."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]  # as many cells in each as in the header
    title: str = ""  # what it shows
    caption: str = ""  # how to read it
    text_columns: tuple[int, ...] = (0,)  # indices of those that hold words, and are aligned left

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"a row has {len(row)} cells, expected {len(self.header)}: {row}.")

    def to_rich(self, style: Callable[[str], str] | None = None) -> rich.table.Table:
        """Returns the table for a terminal of 80 columns. Figures are broken only if broken words do not suffice."""
        rendered = rich.table.Table(
            title=Text(printable(self.title), "table.title") if self.title else None,
            caption=Text(printable(self.caption), "table.caption") if self.caption else None,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
            collapse_padding=True,
            pad_edge=False,
        )
        widths, fits = self._widths()
        for index, (name, width) in enumerate(zip(self.header, widths, strict=True)):
            text = index in self.text_columns
            size = {"width": width} if fits and not text else {"min_width": width}
            rendered.add_column(Text(printable(name)), justify="left" if text else "right", overflow="fold", **size)
        for row in self.rows:
            rendered.add_row(*(Text(printable(cell), style(cell) if style is not None else "") for cell in row))
        return rendered

    def _widths(self) -> tuple[list[int], bool]:
        """The width of every column of figures, with its name whole or folded, and the least one of every column of
        words; and whether they fit. Where they do not, the least width of every column.
        """
        columns = list(zip(self.header, *self.rows, strict=True))
        words = [max((cell_len(word) for cell in column for word in cell.split()), default=1) for column in columns]
        cells = [max(map(cell_len, column[1:]), default=1) for column in columns]
        whole = list(map(cell_len, self.header))
        folded = [min(max(map(cell_len, name.split() or [""])), _WORD) for name in self.header]
        for names, longest in ((whole, _WORD), (folded, _WORD), (folded, _PART)):
            least = [max(pair) for pair in zip(cells, names, strict=True)]
            for i in self.text_columns:
                least[i] = min(words[i], longest)
            if sum(least) + _GAP * len(least) <= _WIDEST:
                return least, True
        return [min(word, _WORD) for word in words], False

    def to_markdown(self) -> str:
        """Returns the table as Markdown, with its title before and its caption after."""
        rule = ["---" if i in self.text_columns else "---:" for i in range(len(self.header))]
        cells = [[c if _FIGURES.fullmatch(c) else escape_markdown(c) for c in row] for row in (self.header, *self.rows)]
        body = "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:]))
        title = f"**{escape_markdown(self.title)}**" if self.title else ""
        return "\n\n".join(part for part in (title, body, escape_markdown(self.caption)) if part)


def printable(text: str) -> str:
    """Returns text without control characters, which could move a terminal's cursor or turn the direction of text."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def escape_markdown(text: str) -> str:
    """Returns text that Markdown shows as it is: in one line, and free of markup and HTML."""
    text = printable(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKDOWN_SPECIAL.sub(lambda found: found[0] + "\\" if found[0].isdigit() else f"\\{found[0]}", text)


@dataclass(frozen=True)
class Unit:
    """What scores are shown in. Scores themselves are higher where they are better."""

    name: str  # of what is measured
    symbol: str  # after a value
    step: str  # after a difference
    scale: float  # from a score to what is shown; negative where less is better
    digits: int  # after the point

    def value(self, score: float) -> str:
        """A single score."""
        return f"{self.scale * score:.{self.digits}f}"

    def mean(self, interval: Interval) -> str:
        """A mean with its interval."""
        value, low, high = self.shown_interval(interval)
        return f"{value:.{self.digits}f} [{low:.{self.digits}f}, {high:.{self.digits}f}]"

    def change(self, interval: Interval) -> str:
        """A difference with half the width of its symmetric interval."""
        half = max(interval.high - interval.value, interval.value - interval.low)  # one end may be cut at ±1
        return f"{self.scale * interval.value:+.{self.digits}f} ± {abs(self.scale) * half:.{self.digits}f}"

    def gain(self, interval: Interval) -> str:
        """The same with plus for what is better: nats of loss saved."""
        return replace(self, scale=abs(self.scale)).change(interval)

    def change_in_words(self, interval: Interval) -> str:
        """A difference with its interval, for a sentence."""
        value, low, high = self.shown_interval(interval)
        return f"{value:+.{self.digits}f} {self.step} [{low:+.{self.digits}f}, {high:+.{self.digits}f}]"

    def shown(self, scores: Sequence[float] | np.ndarray) -> np.ndarray:
        """Scores as they are drawn."""
        return self.scale * np.asarray(scores, dtype=np.float64)

    def shown_interval(self, interval: Interval) -> tuple[float, float, float]:
        """Value, lower and upper end as they are drawn."""
        value, *ends = (self.scale * score for score in (interval.value, interval.low, interval.high))
        return value, min(ends), max(ends)


ACCURACY = Unit("accuracy", "%", "points", 100, 1)
LOSS = Unit("loss", "nats", "nats", -1, 3)
NATS = Unit("log-prob", "nats", "nats", 1, 3)


def unit_of(measure: Measure) -> Unit:
    """Returns the unit of a task's scores."""
    return LOSS if measure == "loss" else ACCURACY


def perplexity_of(score: float) -> str:
    """Writes the perplexity of minus a loss."""
    return f"{perplexity(-score):.2f}"


def score_cells(scores: PositionScores, wanted: Iterable[str]) -> dict[str, str]:
    """Returns cells that sum up scores, by the column's name: those of `wanted` that there are of such scores."""
    unit, average, by_position = unit_of(scores.measure), scores.average(), scores.value_by_position
    cells = {unit.name: unit.mean(average)}
    if scores.measure == "loss":
        cells["perplexity"] = perplexity_of(average.value)
    else:
        cells |= {"worst": unit.value(min(by_position)), "U": unit.value(scores.utilization())}
    if len(by_position) > 2:
        cells["middle"] = unit.value(float(np.mean(by_position[1:-1])))
    if len(by_position) > 1:
        cells |= {"first": unit.value(by_position[0]), "last": unit.value(by_position[-1])}
    return {name: cells[name] for name in wanted if name in cells}


_MEANINGS = {
    "accuracy": "accuracy: {right} in %, mean over all gold positions",
    "worst": "worst: at the worst position",
    "middle": "middle: mean over all inner positions",
    "U": f"U: context utilisation of the accuracies in % (weights {', '.join(f'{w:g}' for w in DEFAULT_WEIGHTS)} for "
    "first, middle and last)",
    "loss": "loss: in nats, mean over the scored tokens",
    "perplexity": "perplexity: the loss's exponential",
    "log-prob": "log-prob: of the gold, in nats",
    "strict": "strict: the first value written is the gold",
    "forced": "forced: every token of the target, as the answer was opened, the most probable one in one forced pass",
    "vs control": 'control: of "first k at 1, rest b" and "first a, rest b" the one that is better on the search split',
    "tried": "tried: distinct candidates scored on the search split",
    "KL": "KL: divergence of next-token distributions from the unscaled model's on text that it wrote, in nats",
    "text loss": "text loss: rise of the loss on people's text, in nats",
    "kept": "kept: change of the probability of right answers on the task that is to be kept, in points",
}


def meanings(columns: Iterable[str], right: str = "right answers") -> str:
    """Says in a sentence what columns of these names hold; `right`: what counts in an accuracy."""
    return "; ".join(_MEANINGS[name].format(right=right) for name in dict.fromkeys(columns) if name in _MEANINGS) + "."


def legend(columns: Iterable[str], measure: Measure, right: str = "right answers", gains: bool = False) -> str:
    """Says how to read a table of scores with columns of these names; `right`: see [`meanings`]; `gains`: whether plus
    is what is better in its differences, also of losses.
    """
    loss = measure == "loss"
    over, better = ("windows", ", in nats of loss saved") if loss else ("contexts", "")
    paired = f"{better}: + is better" if gains else ", less is better" if loss else ""
    return f"{meanings(columns, right)} Brackets and ±: 95 % intervals over {over}; differences are paired{paired}."


def right_answers(scores: PositionScores) -> str:
    """What counts in an accuracy."""
    return "exact match" if scores.written is None else "right answers written"


def position_table(scores: PositionScores, title: str) -> Table:
    """Returns the scores by position: accuracy and gold log-probability, or loss and perplexity."""
    if scores.measure == "loss":
        rows = [*zip(map(str, scores.positions), scores.intervals(), strict=True), ("all", scores.average())]
        cells = [
            (name, LOSS.mean(i), f"{perplexity_of(i.value)} [{perplexity_of(i.high)}, {perplexity_of(i.low)}]")
            for name, i in rows
        ]
        caption = "Tokens from each position to the next. Brackets: 95 % intervals over windows."
        return Table(("token", "loss in nats", "perplexity"), tuple(cells), title, caption, ())
    more, log_prob = written_columns(scores), scores.log_prob_by_position
    columns = {
        "gold position": [*map(str, scores.positions), "average", "U"],
        "accuracy %": [
            *map(ACCURACY.mean, [*scores.intervals(), scores.average()]),
            ACCURACY.value(scores.utilization()),
        ],
        **{name: [*map(ACCURACY.value, [*v.mean(axis=0), v.mean()]), ""] for name, v in more.items()},
        "gold log-prob": list(map(NATS.value, [*log_prob, log_prob.mean(), scores.log_prob_utilization()])),
    }
    caption = "Brackets: 95 % intervals, of the average over contexts, else Wilson's; U: context utilisation."
    caption = " ".join([caption, *written_legend(scores)])
    return Table(tuple(columns), tuple(zip(*columns.values(), strict=True)), title, caption, ())


def written_columns(scores: PositionScores) -> dict[str, np.ndarray]:
    """Returns what is known of written answers beside the metric, `(groups, positions)` each, by its name in tables."""
    written = scores.written
    columns = {"strict": written.strict, "forced": written.forced} if written is not None else {}
    return {name: values for name, values in columns.items() if values is not None}


def written_legend(scores: PositionScores) -> list[str]:
    """Returns what the columns of [`written_columns`] mean, and how long the answers were, in sentences."""
    if scores.written is None:
        return []
    tokens, cut_off = scores.written.num_tokens.mean(), scores.written.cut_off.mean()
    return [
        *(f"{_MEANINGS[name]}." for name in written_columns(scores)),
        f"Answers have {tokens:.1f} tokens on average; {ACCURACY.value(cut_off)} % were cut off.",
    ]


def fitness_remark(scores: Mapping[str, PositionScores]) -> list[str]:
    """Returns a line where the likeliest answers, to which a search climbs, are not those that are most often right."""
    if any(each.written is None or each.written.forced is None for each in scores.values()):
        return []
    likeliest = max(scores, key=lambda name: rank_key(scores[name].log_prob.mean()))
    best = max(scores, key=lambda name: scores[name].average().value)
    if scores[likeliest].average().value == scores[best].average().value:
        return []
    return [f'note: the answers of "{likeliest}" are the likeliest, but "{best}" writes the most right ones.']


def format_factors(factors: Sequence[float]) -> str:
    """Writes factors for people; a uniform vector as a single number."""
    return " ".join(f"{factor:g}" for factor in (factors[:1] if len(set(factors)) == 1 else factors))


def times_window(tokens: int, window: int | None) -> str:
    """Writes `" = 2.0× the trained window"`, or nothing where that is not known."""
    if not window:
        return ""
    share = tokens / window
    return f" = {share:{'.1f' if share >= 0.1 else '.1g'}}× the trained window"


def times(count: int, what: str) -> str:
    """Writes how many there are of something, such as `"1 generation"`."""
    return f"{count} {what}{'s' * (count != 1)}"


def duration(seconds: float) -> str:
    """Writes a time for people."""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
