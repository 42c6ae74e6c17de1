"""Comparing candidates on one split, and the tables of what came out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from ..base_model import describe_loading, library_versions, model_fingerprint
from ..errors import AdapterMismatchError, TaskError
from ..plots import plot_by_position
from ..report import (
    ACCURACY,
    NATS,
    Table,
    fitness_remark,
    legend,
    score_cells,
    unit_of,
    written_columns,
    written_legend,
)
from ..runs import Journal
from ..scoring.batching import check_vocabulary
from ..scoring.generation import check_judged
from ..scoring.scorer import DEFAULT_BATCH_TOKENS, DEFAULT_BUCKETS, Scorer, aligned_windows, check_buckets
from ..scoring.scores import Interval, PositionScores
from ..tasks.base import Split
from ..tuner.sites import embedding_table, find_stack
from .candidates import ROPE_TYPES, Candidate, candidate_on, describe_scaling

MAX_PARTS = 10
"""A split is scored in so many parts of whole groups, each kept as soon as it is there."""

Progress = Callable[[str, int, int], None]
"""Called with the label at work, parts done and parts in all, before each part and once at the end."""


@dataclass(frozen=True)
class Comparison:
    """What [`compare`] found.

    Attributes:
        scores: by label, in the order of the candidates.
        candidates: by label, what each is: its identity, and the factor of every layer where it has some.
        task: the task's description.
        split: the split's description.
        judged: how: `by`, and where answers are written the `metric` and the `max_new_tokens`.
        batch_tokens: tokens per forward pass that fitted into memory.
    """

    scores: Mapping[str, PositionScores]
    candidates: Mapping[str, Mapping[str, Any]]
    task: Mapping[str, Any]
    split: Mapping[str, Any]
    judged: Mapping[str, Any]
    batch_tokens: int = DEFAULT_BATCH_TOKENS

    @property
    def baseline(self) -> str:
        """The label that the others are compared with: the first."""
        return next(iter(self.scores))

    @property
    def measure(self) -> str:
        """`"accuracy"`, or `"loss"` for running text."""
        return self.scores[self.baseline].measure

    def difference(self, label: str, other: str) -> Interval:
        """Average accuracy (or minus the loss) of `label` minus that of `other`, paired, so that more is better."""
        return self.scores[label].paired_difference(self.scores[other])

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values for a JSON report."""
        return {
            "task": dict(self.task),
            "split": dict(self.split),
            "judged": dict(self.judged),
            "baseline": self.baseline,
            "candidates": {label: dict(what) for label, what in self.candidates.items()},
            "scores": {label: scores.to_dict() for label, scores in self.scores.items()},
            "difference_of": "minus the loss, in nats" if self.measure == "loss" else "average accuracy",
            "differences": {
                label: {other: self.difference(label, other).to_dict() for other in self.scores if other != label}
                for label in self.scores
            },
        }


def compare(
    model: nn.Module,
    split: Split,
    candidates: Sequence[Candidate],
    *,
    task_description: Mapping[str, Any] | None = None,
    num_buckets: int = DEFAULT_BUCKETS,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Scores every candidate on the same examples. The model is as it was found afterwards.

    Args:
        model: a transformers model without an adapter.
        split: the examples. Where it has a judge the models write their answers, which it judges; of windows of text
            (measure `"loss"`) the loss by bucket is measured; else an answer is right where every token of it is the
            most probable one.
        candidates: what is put onto the model in turn; the first is what the others are compared with.
        task_description: the task's `describe()`, for the report.
        num_buckets: for windows of text.
        batch_tokens: tokens per forward pass; halved when memory runs out.
        folder: keeps `journal.jsonl`, from which an interrupted comparison goes on; None keeps nothing.
        resume: go on with what is in `folder`, if there is something; the result is the same as of one uninterrupted
            run.
        overwrite: begin anew in `folder`; what is there is replaced once all is checked.
        progress: see `Progress`; first called when all is checked and the journal has begun.

    Raises:
        TaskError: candidates of one label, settings that cannot work, or a folder that does not fit.
        BlockingIOError: another comparison is at work in `folder`.
        OSError: the scores cannot be written, as on a full disk; make room and resume.
        LayerRopeError: an adapter that cannot be loaded or does not fit, before anything is scored.
    """
    scorer = Scorer(model, batch_tokens=batch_tokens)
    windows = aligned_windows(split) if split.measure == "loss" else split
    judged = split.judged()
    if split.measure == "loss":
        check_buckets(windows, num_buckets)
        judged |= {"buckets": num_buckets}
    else:
        check_judged(split)
    check_vocabulary(model, split.examples)
    described = check_candidates(model, candidates)
    identity = {
        "dtype": str(embedding_table(model).dtype),
        "device": embedding_table(model).device.type,
        "model": model_fingerprint(model),
        "base": describe_loading(model),
        "split": split.describe(),
        "answers": hashlib.sha256(repr([e.answers for e in split.examples]).encode()).hexdigest()[:16],
        "judged": judged,
        "candidates": {candidate.label: candidate.identity() for candidate in candidates},
        "versions": library_versions(),
    }

    count = min(MAX_PARTS, windows.num_groups)
    bounds = [part * windows.num_groups // count for part in range(count + 1)]
    parts = [windows.part(range(start, stop)) for start, stop in pairwise(bounds)]
    total = len(parts) * len(candidates)
    scores = {}
    with Journal(Path(folder) if folder is not None else None, identity, resume, overwrite) as journal:
        for index, candidate in enumerate(candidates):
            found = _kept_parts(journal, candidate.label)
            if len(found) < len(parts):
                scorer.model = model
                scorer.check(split)  # as it is: a candidate whose scores are not finite is shown with them
                journal.append("candidate", candidate.label, {"kept": len(found), "of": len(parts)})
                with candidate_on(model, candidate) as scorer.model:
                    for number in range(len(found), len(parts)):
                        if progress is not None:
                            progress(candidate.label, index * len(parts) + number, total)
                        found.append(scorer.measure(parts[number], num_buckets=num_buckets))
                        journal.append("part", [candidate.label, number], found[number].to_plain())
            scores[candidate.label] = PositionScores.joined(found)
    if progress is not None:
        progress(candidates[-1].label, total, total)
    what = dict(task_description or {}), split.describe(), judged
    return Comparison(scores, described, *what, batch_tokens=scorer.batch_tokens)


def _kept_parts(journal: Journal, label: str) -> list[PositionScores]:
    """The parts that a candidate was scored on so far, in order."""
    found: list[PositionScores] = []
    with journal.reading():
        while (plain := journal.get("part", [label, len(found)])) is not None:
            found.append(PositionScores.from_plain(plain))
    return found


def check_candidates(model: nn.Module, candidates: Sequence[Candidate]) -> dict[str, dict[str, Any]]:
    """Puts every candidate onto the model once: a wrong one must not cost hours. Returns what each is, by label.

    Raises:
        TaskError: candidates of one label.
        LayerRopeError: an adapter that cannot be loaded or does not fit.
    """
    labels = [candidate.label for candidate in candidates]
    if len(set(labels)) != max(1, len(labels)):
        raise TaskError(f"candidates {labels} must be at least one, and each of a label of its own.")
    described: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        try:
            with candidate_on(model, candidate):
                known = described[candidate.label] = candidate.identity()
        except AdapterMismatchError as error:
            raise AdapterMismatchError(f"{candidate.label}: {error}") from error
        config = candidate.layer_rope(len(find_stack(model).layers))
        if config is not None:
            known["layer_factors"] = config.layer_factors
            scaling = describe_scaling(model, config.rope_type, "on top of")
        elif candidate.kind in ROPE_TYPES:
            scaling = describe_scaling(model, candidate.kind, "in place of")
        else:
            scaling = describe_scaling(model, "default", "with")
        if scaling:
            known["scaling"] = scaling
    return described


_ROOM, _GAP = 70, 2  # of 80 columns beside the positions; between two columns
_MIDDLE_NEEDS = 3  # positions

POSITION_LEGEND = "Accuracy in % by gold position, with 95 % Wilson intervals."
BUCKET_LEGEND = "Loss in nats of the tokens from each position to the next, with 95 % intervals over windows."


def describe_task(task: Mapping[str, Any]) -> str:
    """Writes a task's description in one line: its name and every setting that is on."""
    settings = []
    for setting, value in task.items():
        if setting != "name" and value is not None and value is not False:
            listed = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            settings.append(f"{setting.replace('_', ' ')}: {'yes' if value is True else listed}")
    name = task.get("name", "task")
    return f"{name} ({'; '.join(settings)})" if settings else name


def describe_setting(comparison: Comparison) -> str:
    """Writes what was measured in one line: task, split, how it was judged, and what a scaling's name does not say."""
    split, judged, unit = comparison.split, comparison.judged, "windows" if comparison.measure == "loss" else "contexts"
    held = f"{split['name']} split, {split['groups']} {unit}, up to {split['max_tokens']} tokens"
    if "protocol" in split:
        held += f", {split['protocol']}"
    how = {"loss": "loss of the next token", "teacher-forced": "teacher-forced exact match"}.get(judged["by"])
    if how is None:
        how = f"generate(), judged by {judged['metric']}, up to {judged['max_new_tokens']} new tokens"
    scalings = [f"{label}: {what['scaling']}" for label, what in comparison.candidates.items() if what.get("scaling")]
    return "; ".join([describe_task(comparison.task), held, how, *scalings])


def summary_table(comparison: Comparison, title: str = "") -> Table:
    """Returns a line for each candidate: average, ends, U, and the paired difference to the first."""
    base, unit = comparison.baseline, unit_of(comparison.measure)
    first = comparison.scores[base]
    wanted = ("loss", "perplexity", "first", "last") if comparison.measure == "loss" else ("accuracy",)
    if comparison.measure != "loss" and len(first.positions) >= _MIDDLE_NEEDS:
        wanted = ("accuracy", "first", "middle", "last", "U")
    several = len(comparison.scores) > 1
    rows = []
    for label, scores in comparison.scores.items():
        gain = "" if label == base else unit.gain(comparison.difference(label, base))
        rows.append((label, *score_cells(scores, wanted).values(), *([gain] if several else [])))
    header = ("", *score_cells(first, wanted), *(["vs first"] if several else []))
    right = "right answers written" if comparison.judged["by"] == "generate()" else "exact match"
    return Table(header, tuple(rows), title, legend(header, comparison.measure, right, gains=True))


def written_table(comparison: Comparison) -> Table | None:
    """Returns a line for each candidate with what is known of its written answers beside the metric; None where none
    were written.
    """
    first = comparison.scores[comparison.baseline]
    if first.written is None:
        return None
    rows = []
    for label, scores in comparison.scores.items():
        shares = [scores.average().value, *(values.mean() for values in written_columns(scores).values())]
        lengths = f"{scores.written.num_tokens.mean():.1f}", ACCURACY.value(scores.written.cut_off.mean())
        rows.append((label, *map(ACCURACY.value, shares), NATS.value(scores.log_prob.mean()), *lengths))
    header = ("", "accuracy", *written_columns(first), "log-prob", "tokens", "cut off %")
    return Table(header, tuple(rows), "Written answers and likelihood", " ".join(written_legend(first)[:-1]))


def forced_by_position_tables(comparison: Comparison, title: str) -> list[Table]:
    """Returns, where answers were written, the same by position for the teacher-forced pass; see
    [`by_position_tables`].
    """
    forced = {
        label: replace(scores, correct=scores.written.forced)
        for label, scores in comparison.scores.items()
        if scores.written is not None and scores.written.forced is not None
    }
    return by_position_tables(replace(comparison, scores=forced), title) if forced else []


def by_position_tables(comparison: Comparison, title: str) -> list[Table]:
    """Returns scores by position with their intervals, a column for each candidate; several tables of at most 80
    columns where one would be wider.
    """
    whole = _position_table(comparison)
    positions, *columns = zip(whole.header, *whole.rows, strict=True)
    widest = max(len(cell) for row in whole.rows for cell in row[1:])
    beside = max(1, _ROOM // (widest + _GAP))
    tables: list[Table] = []
    for start in range(0, len(columns), beside):
        header, *rows = zip(positions, *columns[start : start + beside], strict=True)
        title, caption = ("", "") if tables else (title, whole.caption)
        tables.append(Table(header, tuple(rows), title, caption, text_columns=()))
    return tables


def _position_table(comparison: Comparison) -> Table:
    unit = unit_of(comparison.measure)
    positions = map(str, comparison.scores[comparison.baseline].positions)
    columns = [[unit.mean(interval) for interval in scores.intervals()] for scores in comparison.scores.values()]
    loss = comparison.measure == "loss"
    header = ("token" if loss else "position", *comparison.scores)
    caption = BUCKET_LEGEND if loss else POSITION_LEGEND
    return Table(header, tuple(zip(positions, *columns, strict=True)), "", caption, ())


def comparison_markdown(comparison: Comparison) -> str:
    """Returns the tables in Markdown, with what was measured and what the columns mean."""
    tables = summary_table(comparison), _position_table(comparison), written_table(comparison)
    parts = [describe_setting(comparison) + ".", *(table.to_markdown() for table in tables if table is not None)]
    return "\n\n".join([*parts, *fitness_remark(comparison.scores)]) + "\n"


def plot_comparison(comparison: Comparison, model: str) -> bytes:
    """Draws every candidate's scores over the position, with 95 % bands, as PNG; above them the model's name."""
    return plot_by_position(comparison.scores, f"{model}: {describe_setting(comparison)}")
