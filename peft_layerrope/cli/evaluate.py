"""`layerrope evaluate`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.progress import track

from .. import report
from ..evaluation import DEFAULT_BATCH_TOKENS, evaluate
from ..loading import load_adapter
from ..searcher.specification import TaskSpecification
from .app import app, err, out, plain_errors
from .options import (
    BatchTokensOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    PositionsOption,
    SplitChoice,
    TaskName,
    TaskOption,
    TaskSeedOption,
    build_task,
    display_name,
    load,
    resolve_length,
    tokenizer_of,
)


@app.command(name="evaluate")
def evaluate_command(
    model: ModelArgument = None,
    adapter: Annotated[str | None, typer.Option(help="Hub id or folder of an adapter.")] = None,
    task: TaskOption = TaskName.kv_words,
    length: LengthOption = None,
    positions: PositionsOption = 11,
    task_seed: TaskSeedOption = 0,
    split: Annotated[
        SplitChoice, typer.Option(help="Which split; quote figures from test only.", rich_help_panel="Task")
    ] = SplitChoice.test,
    groups: Annotated[
        int, typer.Option(help="Contexts; each is asked at every position.", rich_help_panel="Task")
    ] = 100,
    json_output: JsonOption = None,
    batch_tokens: BatchTokensOption = DEFAULT_BATCH_TOKENS,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Print accuracy at each gold position and context utilisation U, with or without an adapter.

    Example: `layerrope evaluate --adapter demo-adapter`
    """
    with plain_errors(debug):
        tokenizer = tokenizer_of(model)
        loaded = load(model, device, dtype)
        length = resolve_length(length, loaded, is_demo=model is None)
        built = build_task(TaskSpecification(task.value, length, positions, task_seed), tokenizer)
        subject = load_adapter(loaded, adapter) if adapter is not None else loaded
        scores = evaluate(
            subject,
            built,
            split=split.value,
            num_groups=groups,
            batch_tokens=batch_tokens,
            progress=lambda batches: track(batches, "evaluating", console=err, transient=True),
        )
        title = f"{display_name(model)} + {adapter}" if adapter else display_name(model)
        out.print(report.position_table(scores, title))
        if json_output is not None:
            content = {"task": built.describe(), "adapter": adapter, "scores": scores.to_dict()}
            json_output.write_text(json.dumps(content, indent=2) + "\n")
