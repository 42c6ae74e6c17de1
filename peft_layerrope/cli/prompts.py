"""`layerrope prompts`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..errors import TaskError
from ..tasks import PromptTask
from .app import app, plain_errors
from .options import (
    ChatTemplateOption,
    DataOption,
    DebugOption,
    KeysOption,
    LengthOption,
    ModelArgument,
    NumDocumentsOption,
    NumKeysOption,
    PositionsOption,
    SplitChoice,
    TaskOption,
    build_task,
    task_of,
    tokenizer_of,
    window_of,
    with_defaults,
)


@app.command(name="prompts")
def prompts_command(
    model: ModelArgument = None,
    task: TaskOption = None,
    data: DataOption = None,
    length: LengthOption = None,
    positions: PositionsOption = None,
    task_seed: Annotated[
        int, typer.Option("--task-seed", "--seed", help="Seed of the examples.", rich_help_panel="Task")
    ] = 0,
    num_keys: NumKeysOption = None,
    keys: KeysOption = None,
    num_documents: NumDocumentsOption = None,
    chat_template: ChatTemplateOption = False,
    position: Annotated[
        int | None,
        typer.Option(help="Index of the gold pair or document, from 0. Default: all of the task's.", min=0),
    ] = None,
    limit: Annotated[int, typer.Option(help="How many prompts.", min=1)] = 10,
    split: Annotated[SplitChoice, typer.Option(help="Which split.", rich_help_panel="Task")] = SplitChoice.test,
    debug: DebugOption = False,
) -> None:
    """Print a task's prompts as JSON lines, for people and for other harnesses.

    Each line has `prompt`, `answers` and `position`. Needs the model's tokenizer and config, not its weights.

    Example: `layerrope prompts --limit 1`

    Example: `layerrope prompts --task kv_retrieval --data kv-retrieval-75_keys.jsonl.gz --position 37 --limit 5`
    """
    with plain_errors(debug):
        asked = task_of(
            task,
            data=data,
            length=length,
            positions=positions,
            task_seed=task_seed,
            num_keys=num_keys,
            keys=keys,
            num_documents=num_documents,
            stride=None,
            chat_template=chat_template,
        )
        specification = with_defaults(asked, window_of(model), is_demo=model is None)
        if specification.name == "perplexity":
            raise TaskError("--task perplexity has no prompts: it scores running text.")
        built = build_task(specification, tokenizer_of(model))
        wanted = built.positions if position is None else (position,)
        num_groups = -(-limit // len(wanted))
        if length is not None:
            built.split(split.value, num_groups)  # refuses what is longer
        for prompt in built.prompts(split.value, num_groups, wanted)[:limit]:
            text = built.as_sent(prompt) if isinstance(built, PromptTask) else prompt.text
            line = {"prompt": text, "answers": list(prompt.answers), "position": prompt.position}
            typer.echo(json.dumps(line))
