"""`layerrope prompts`."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import typer

from ..base_model import load_tokenizer
from ..errors import TaskError
from ..files.strict_json import to_json
from ..scoring.preflight import preflight, with_targets
from ..scoring.scorer import Scorer
from ..tasks import PromptTask, SplitName, Task
from ..tasks.specification import TaskSpecification
from .app import app, err, plain_errors
from .inputs import build_task, load, window_of, with_defaults
from .options import (
    Compute,
    ComputeOptions,
    DebugOption,
    ModelArgument,
    SplitChoice,
    Typed,
    options_of,
    takes_settings,
    task_option,
)

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
    targets: Annotated[
        bool,
        typer.Option(
            "--targets", help="Also run the model, and print what it writes before each answer and by which tokens."
        ),
    ] = False,
    computing: ComputeOptions,
    debug: DebugOption = False,
) -> None:
    """Print a task's prompts as JSON lines, for people and for other harnesses.

    Each line has `prompt`, `answers` and `position`. Needs the model's tokenizer and config; its weights only for
    `--targets`.

    Example: `layerrope prompts --limit 1`

    Example: `layerrope prompts --task kv_retrieval --data kv-retrieval-75_keys.jsonl.gz --position 37 --limit 5`
    """
    with plain_errors(debug):
        if targets and position is not None:
            raise TaskError(f"--targets shows the task's own positions: leave --position {position} out.")
        compute = Compute.of(model, computing)
        source, specification = compute.source, TaskSpecification(**asked)
        if specification.name == "perplexity":
            raise TaskError("--task perplexity has no prompts: it scores running text.")
        tokenizer = load_tokenizer(source)
        specification = with_defaults(specification, window_of(source), source.model is None, tokenizer)
        built = build_task(specification, tokenizer)
        wanted = built.positions if position is None else (position,)
        num_groups = -(-limit // len(wanted))
        if "length" in asked:
            built.split(split.value, num_groups)  # refuses what is longer
        lines = []
        for prompt in built.prompts(split.value, num_groups, None if position is None else wanted)[:limit]:
            text = built.as_sent(prompt) if isinstance(built, PromptTask) else prompt.text
            lines.append({"prompt": text, "answers": list(prompt.answers), "position": prompt.position})
        if targets:
            found = _targets(built, compute, split.value, num_groups)
            lines = [line | target for line, target in zip(lines, found, strict=False)]
        for line in lines:
            typer.echo(to_json(line))


def _targets(task: Task, compute: Compute, split: SplitName, groups: int) -> list[dict[str, Any]]:
    """Of each example of a split what the model writes before its answer, and the answer's tokens; on stderr what was
    found out.
    """
    if not isinstance(task, PromptTask):
        raise TaskError(f"--targets: {task.name} has no written answers to learn from.")
    scorer = Scorer(load(compute.source), batch_tokens=compute.batch_tokens)
    found = preflight(scorer, task, wanted={split: groups})
    for line in found.remarks():
        err.print(line, highlight=False, markup=False)
    for sample in found.samples:
        err.print(f"for example: {sample}", highlight=False, markup=False)
    decode = task.tokenizer.decode
    return [
        {"opening": decode(e.opening_ids), "target": [decode([token]) for token in e.answer_ids]}
        for e in with_targets(task.split(split, groups), found, task).examples
    ]
