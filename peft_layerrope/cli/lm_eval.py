"""`layerrope lm-eval`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated

import typer

from ..errors import LayerRopeError
from ..lm_eval_tasks import lm_eval_tasks_path
from .app import app, plain_errors

INCLUDE = "--include_path"
CONFIG = ("--config", "-C")


@app.command(
    name="lm-eval",
    options_metavar="[OPTIONS] ARGUMENTS OF LM_EVAL...",
    # our options stand first; from the first of lm_eval's on, everything is lm_eval's, its --help too
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "allow_extra_args": True},
)
def lm_eval_command(
    context: typer.Context,
    print_include_path: Annotated[
        bool, typer.Option("--print-include-path", help="Print the folder of our task files and exit.")
    ] = False,
) -> None:
    """Run lm-evaluation-harness, with LAYER_ROPE adapters loadable by `peft=` and our position curves as tasks.

    All arguments go to `lm_eval`; `layerrope lm-eval run --help` shows them. Needs
    `pip install "peft-layerrope[lm-eval]"`.

    The tasks `layerrope_kv`, `layerrope_multi_doc` and `layerrope_kv_words` report accuracy, over all prompts and for
    every position of the answer, on the prompts that `layerrope prompts` wrote. They are found because our folder is
    the `--include_path`, unless you pass one or a `--config`. Prompts beyond the model's window need `max_length`, or
    lm_eval would cut them.

    Plain `lm_eval` takes the tasks too (`--include_path "$(layerrope lm-eval --print-include-path)"`), but no
    LAYER_ROPE adapter; and neither applies the factors of a baked model.

    Example: `layerrope prompts --task kv_words --length 512 --limit 220 > prompts.jsonl`

    Example: `layerrope lm-eval --model hf --model_args pretrained=BASE,peft=ADAPTER,max_length=520
    --tasks layerrope_kv_words --metadata data=prompts.jsonl`

    Example: `layerrope lm-eval --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks hellaswag`
    """
    if print_include_path:
        typer.echo(lm_eval_tasks_path())
    elif not context.args:
        typer.echo(context.get_help())
    else:
        with plain_errors(debug=False):
            run_lm_eval(context.args)


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Runs lm_eval's own command in this process, where PEFT knows the adapter type.

    Raises:
        LayerRopeError: lm_eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise LayerRopeError('lm_eval is not installed: pip install "peft-layerrope[lm-eval]"')
    before = sys.argv
    sys.argv = ["lm-eval", *with_include_path(arguments)]  # lm_eval reads and edits it: it takes no arguments
    try:
        import_module("lm_eval.__main__").cli_evaluate()
    finally:
        sys.argv = before


def with_include_path(arguments: Sequence[str]) -> list[str]:
    """Adds the folder of our tasks, unless the arguments (or a file that they name) decide about it."""
    decided = any(a.split("=")[0] in (INCLUDE, *CONFIG) for a in arguments)
    if decided or len(arguments) == 1:  # a single argument asks for some help text
        return list(arguments)
    start = 0 if arguments[0].startswith("-") else 1  # behind a subcommand
    return [*arguments[:start], INCLUDE, lm_eval_tasks_path(), *arguments[start:]]
