"""The application, its consoles, and how errors reach people."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from transformers.utils import logging as transformers_logging

from .. import __version__
from ..errors import InvalidConfigError, LayerRopeError, SearchError, TaskError
from ..hub_errors import InvalidRepoIdError, PullTargetError

app = typer.Typer(
    name="layerrope",
    help="Per-layer RoPE scaling as a PEFT adapter: search the factors, evaluate and verify them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
_USAGE_ERRORS = (SearchError, TaskError, InvalidConfigError, InvalidRepoIdError, PullTargetError)


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """One line per error: exit status 2 for settings that cannot work, 1 for a failure."""
    try:
        yield
    except LayerRopeError as error:
        if debug:
            raise
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(USAGE_ERROR if isinstance(error, _USAGE_ERRORS) else FAILURE) from error


def _version(value: bool) -> None:
    if value:
        out.print(__version__, highlight=False)
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Per-layer RoPE scaling as a PEFT adapter: search the factors, evaluate and verify them."""
    # PEFT still asks transformers by a name that it deprecated; nothing a user of this command can act on
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def run() -> None:
    """Entry point of the `layerrope` script."""
    try:
        app()
    except KeyboardInterrupt:
        err.print("interrupted; nothing was written.")
        sys.exit(INTERRUPTED)
