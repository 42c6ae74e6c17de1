"""`layerrope prompts`."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Annotated

import typer

from ..errors import TaskError
from ..tasks import PromptTask
from ..tasks.specification import TaskSpecification
from .app import app, plain_errors
from .inputs import build_task, tokenizer_of, window_of, with_defaults
from .options import DebugOption, ModelArgument, SplitChoice, Typed, options_of, takes_settings, task_option

# a task that has prompts: there is no text to stride over
_SETTINGS = [field.name for field in fields(TaskSpecification) if field.name != "stride"]


@app.command(name="prompts")
@takes_settings
def prompts_command(
    *,
    model: ModelArgument = None,
    asked: Annotated[Typed, options_of(TaskSpecification, *_SETTINGS, also={"task_seed": "--seed"})],
    position: Annotated[
        int | None,
        typer.Option(help="Index of the gold pair or document, from 0. Default: all of the task's.", min=0),
    ] = None,
    limit: Annotated[int, typer.Option(help="How many prompts.", min=1)] = 10,
    split: Annotated[SplitChoice, task_option(help="Which split.")] = SplitChoice.test,
    debug: DebugOption = False,
) -> None:
    """Print a task's prompts as JSON lines, for people and for other harnesses.

    Each line has `prompt`, `answers` and `position`. Needs the model's tokenizer and config, not its weights.

    Example: `layerrope prompts --limit 1`

    Example: `layerrope prompts --task kv_retrieval --data kv-retrieval-75_keys.jsonl.gz --position 37 --limit 5`
    """
    with plain_errors(debug):
        specification = with_defaults(TaskSpecification(**asked), window_of(model), is_demo=model is None)
        if specification.name == "perplexity":
            raise TaskError("--task perplexity has no prompts: it scores running text.")
        built = build_task(specification, tokenizer_of(model))
        wanted = built.positions if position is None else (position,)
        num_groups = -(-limit // len(wanted))
        if "length" in asked:
            built.split(split.value, num_groups)  # refuses what is longer
        for prompt in built.prompts(split.value, num_groups, wanted)[:limit]:
            text = built.as_sent(prompt) if isinstance(built, PromptTask) else prompt.text
            line = {"prompt": text, "answers": list(prompt.answers), "position": prompt.position}
            typer.echo(json.dumps(line))
