"""The command `layerrope`: the application, its consoles, and how errors reach people."""

from __future__ import annotations

import difflib
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from .. import __version__
from ..errors import InvalidConfigError, LayerRopeError, SearchError, TaskError

SUMMARIES = {
    "evaluate": "Print accuracy at each gold position and context utilisation U; or compare adapters and baselines "
    "side by side.",
    "report": "Run every experiment that applies to a searched adapter, and write one report.",
    "search": "Search per-layer factors and compare them, held out, with simpler choices.",
    "verify": "Measure the factor that each layer's rotation really has, and compare it with the adapter's.",
    "sensitivity": "Scale one layer at a time: which layers are worth searching, and is a range beyond 2 worth it?",
    "prompts": "Print a task's prompts as JSON lines, for people and for other harnesses.",
    "lm-eval": "Run lm-evaluation-harness, with LAYER_ROPE adapters loadable by `peft=` and our position curves as "
    "tasks.",
    "export": "Write a checkpoint of the scaled model that transformers loads without this library.",
    "serve-check": "Ask a running server for log-probabilities of a few prompts: does it serve the scaled model?",
    "push": "Upload an adapter with its card to the Hub.",
    "pull": "Download an adapter from the Hub, with its card and reports.",
    "experiment": "Measure what lies behind a search's figures: the paper's experiments, on held-out examples.",
}
"""The commands and the first sentences of their helps."""


class Commands(TyperGroup):
    """The commands, which are imported once one of them is called: `--help` does not wait for torch."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        return list(SUMMARIES)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> TyperCommand | TyperGroup | None:
        if cmd_name in self.commands or cmd_name not in SUMMARIES:
            return self.commands.get(cmd_name)
        return TyperCommand(cmd_name, help=SUMMARIES[cmd_name])

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> tuple:
        if args[0] not in SUMMARIES:  # a slip, for which the nearest command is told
            self.commands = {name: self.get_command(ctx, name) for name in SUMMARIES}
        elif len(self.commands) < len(SUMMARIES):
            for name in ("evaluate", "search", "tools", "experiments"):
                import_module(f".{name}", __package__)
            self.commands = typer.main.get_command(app).commands
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="layerrope",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
# what is printed may hold names and messages from anywhere: none of it is markup
out = Console(highlight=False, markup=False)
err = Console(highlight=False, markup=False, stderr=True)

USAGE_ERROR, FAILURE, INTERRUPTED, TERMINATED = 2, 1, 128 + signal.SIGINT, 128 + signal.SIGTERM
_USAGE_ERRORS = (SearchError, TaskError, InvalidConfigError)


@contextmanager
def plain_errors(verbose: bool = False, quiet: bool = False, typed: Iterable[object] = ()) -> Iterator[None]:
    """One line per error: exit status 2 for settings that cannot work, 1 for a failure, 130 for Ctrl-C.

    `verbose` leaves errors as they are, and lets transformers tell what it does; `quiet` shows nothing else on stderr.
    Where an error names a path among what was `typed` that does not exist, the nearest name that does is told.
    """
    from transformers.utils import logging as transformers_logging

    if verbose:
        transformers_logging.set_verbosity_info()
        transformers_logging.enable_progress_bar()
    if quiet:
        transformers_logging.disable_progress_bar()  # and those of downloads
    err.quiet = quiet
    try:
        yield
    except KeyboardInterrupt:
        err.print("interrupted.")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        told = None if verbose else _told(error)
        if told is None:
            raise
        err.quiet = False
        _tell_error(told + _nearest(told, typed))
        raise typer.Exit(USAGE_ERROR if isinstance(error, _USAGE_ERRORS) else FAILURE) from error
    finally:
        err.quiet = False


def _tell_error(text: str) -> None:
    err.print(Text.assemble(("error:", "bold red"), f" {text}"), soft_wrap=True)


def _nearest(told: str, typed: Iterable[object]) -> str:
    """What may have been meant by a path that an error names, and that does not exist."""
    for value in typed:
        if isinstance(value, (list, tuple)):
            if found := _nearest(told, value):
                return found
        elif isinstance(value, (str, Path)) and str(value) in told and not Path(value).exists():
            with suppress(OSError, ValueError):
                beside = [path.name for path in Path(value).absolute().parent.iterdir()]
                for name in difflib.get_close_matches(Path(value).name, beside, n=1):
                    return f" Did you mean {shell_word(Path(value).with_name(name))}?"
    return ""


def _told(error: Exception) -> str | None:
    """What people are told of an error; None of one that nobody expected, and of a stdout that is closed."""
    # here and not above, where --help would wait for them
    from huggingface_hub import errors as hub

    from ..report import printable
    from ..scoring.batching import is_out_of_memory

    login_errors = (hub.RepositoryNotFoundError, hub.LocalTokenNotFoundError)
    if isinstance(error, LayerRopeError):
        return str(error)
    if isinstance(error, (hub.HTTPError, hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, *login_errors)):
        text = printable(" ".join(str(error).split()))[:500]
        status = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else None
        login = isinstance(error, login_errors) or status in (401, 403)
        return f"the Hub: {text}{' Log in with `hf auth login`, or set HF_TOKEN.' if login else ''}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}".removesuffix(".") + "."
    if isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error):
        return "out of memory: use a smaller model or --dtype, shorter prompts, or a larger device."
    return None


@contextmanager
def resumable(how: str) -> Iterator[None]:
    """Says how to go on after an interruption, and after a write that failed: `how`, such as "the same command and
    --resume".
    """
    try:
        yield
    except KeyboardInterrupt:
        err.print(f"interrupted; nothing is lost. Go on with {how}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        if error.filename is not None and not isinstance(error, BlockingIOError):  # a file that was being written
            error.strerror = (
                f"{error.strerror or error}. Nothing that was measured is lost: make room, then go on with {how}"
            )
        raise


def shell_word(path: Path) -> str:
    """The path as it may be typed in a shell."""
    return shlex.quote(str(path))


def _version(value: bool) -> None:
    if value:
        out.print(__version__)
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Per-layer RoPE scaling as a PEFT adapter: search the factors, evaluate and verify them."""
    # after --help and --version, which need no torch
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    # PEFT still asks transformers by a name that it deprecated; nothing a user of this command can act on
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of weights that are loaded, and those of downloads, which people want
    if not HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()


def run() -> None:
    """Entry point of the `layerrope` script.

    SIGTERM is taken as Ctrl-C is, but with exit status 143. A stdout that cannot be written, on a full disk, is told in
    one line; one that nobody reads any more (`| head`) ends the command without a word, with exit status 1.
    """
    terminated = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGTERM, terminate)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(TERMINATED if terminated else INTERRUPTED)
    except OSError as error:
        if error.filename is not None:  # not stdout
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail again at the end
        _tell_error(f"the output cannot be written: {error.strerror}.")
        sys.exit(FAILURE)
    except SystemExit as done:
        if terminated and done.code == INTERRUPTED:
            sys.exit(TERMINATED)
        raise
