"""`sensitivity`, one layer at a time, as a section of a report."""

from __future__ import annotations

import io

from torch import nn

from ..searcher.progress import SearchProgress, SilentProgress
from ..searcher.sensitivity import LayerEffect, sensitivity
from ..tasks import Task
from ..tuner.config import LayerRopeConfig
from .measuring import Measuring, in_force
from .section import Section, SectionFigure, SectionTable
from .sensitivity_report import plot_sensitivity

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
    rows = [
        (str(layer), *(cell for effect in result.of_layer(layer) for cell in _cells(effect))) for layer in result.layers
    ]
    header = ("layer", *(name for factor in result.factors for name in (f"{factor:g}: U", "Δ")))
    caption = (
        "Only that layer is scaled. U: context utilisation of the accuracies in %, "
        f"{100 * result.accuracy:.1f} unscaled. Δ: change of the gold log-prob's U in nats, from {result.log_prob:.3f} "
        "unscaled. *: the paired 95 % interval over contexts excludes 0, as it does for 1 in 20 by chance."
    )
    picture = io.BytesIO()
    plot_sensitivity(result, picture, result.subtitle())
    return Section(
        name=NAME,
        title="One layer at a time",
        question="Which layers does scaling matter to?",
        measured=result.subtitle() + in_force(config),
        findings=tuple(line[:1].upper() + line[1:] for line in result.advice()),
        tables=(SectionTable(header, tuple(rows), caption=caption, text_columns=()),),
        figures=(SectionFigure("layers", "Effect of scaling one layer by several factors.", picture.getvalue()),),
        data=result.to_dict(),
    )


class _Borrowed(SilentProgress):
    """Passes on what it is told; `sensitivity` would close what it was given."""

    def __init__(self, audience: SearchProgress) -> None:
        self._audience = audience

    def stage(self, name: str, total: int) -> None:
        self._audience.stage(name, total)

    def advance(self) -> None:
        self._audience.advance()

    def note(self, text: str) -> None:
        self._audience.note(text)


def _cells(effect: LayerEffect) -> tuple[str, str]:
    change = effect.log_prob_change
    return f"{100 * effect.accuracy:.1f}", f"{change.value:+.3f}{'*' if change.excludes_zero() else ''}"
