"""Progress of a search, for people to watch."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class SearchProgress(Protocol):
    """What a search tells its audience."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def stage(self, name: str, total: int) -> None:
        """A stage of at most `total` steps begins; the one before is over."""

    def advance(self) -> None:
        """One step is done."""

    def note(self, text: str) -> None:
        """Something worth showing beside the bar, e.g. the best fitness so far."""


class SilentProgress:
    """Says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def stage(self, name: str, total: int) -> None:
        """See [`SearchProgress`]."""

    def advance(self) -> None:
        """See [`SearchProgress`]."""

    def note(self, text: str) -> None:
        """See [`SearchProgress`]."""


class RichProgress:
    """One progress bar per stage, on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console or Console(stderr=True),
        )
        self._task = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish_stage()
        self._progress.stop()

    def stage(self, name: str, total: int) -> None:
        """See [`SearchProgress`]."""
        self._finish_stage()
        self._task = self._progress.add_task(name, total=total, note="")

    def advance(self) -> None:
        """See [`SearchProgress`]."""
        self._progress.advance(self._task)

    def note(self, text: str) -> None:
        """See [`SearchProgress`]."""
        self._progress.update(self._task, note=text)

    def _finish_stage(self) -> None:
        if self._task is not None:
            done = self._progress.tasks[self._task].completed
            self._progress.update(self._task, total=done)  # a stage may need fewer steps than its limit


def audience_of(progress: bool | SearchProgress) -> SearchProgress:
    """Returns whom to tell: a progress bar (True), nobody (False), or the caller's own."""
    if isinstance(progress, bool):
        return RichProgress() if progress else SilentProgress()
    return progress
