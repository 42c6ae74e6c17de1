"""`layerrope experiment NAME`: each command names its options and calls the function that measures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ..comparison.contenders import Contender, parse_baseline
from ..declaration import changed
from ..errors import SearchError, TaskError
from ..experiments import attention, control_points, extrapolation, halves, sweep, transfer, u_shape
from ..experiments.lengths import default_lengths, task_of_length, window_and_task
from ..experiments.search_record import RECORD_NAME, read_record
from ..loading import load_adapter_config
from ..searcher import FactorGrid, SearchSettings
from ..tasks import Task
from ..tasks.specification import TASK_NAMES, TaskName
from ..tuner.config import LayerRopeConfig
from .app import app, err
from .experiment_run import AdapterOption, AdaptersOption, GroupsOption, Run, experiment, experiment_app
from .options import Typed, options_of

app.add_typer(experiment_app)


@experiment(u_shape.NAME)
def u_shape_command(run: Run, groups: GroupsOption = u_shape.DEFAULT_GROUPS) -> None:
    """Is there a dip in the middle? Accuracy by position of the unscaled model, in its window and at --length.

    Example: `layerrope experiment u-shape`

    Example: `layerrope experiment u-shape meta-llama/Llama-3.1-8B-Instruct --length 16384 --output results`
    """
    tasks = window_and_task(run.make_task, run.specification, run.window)
    run.finish(lambda measuring: u_shape.run_u_shape(run.model, tasks, num_groups=groups, measuring=measuring))


@experiment(sweep.NAME)
def sweep_command(
    run: Run,
    *,
    factors: Annotated[
        list[float] | None, typer.Option("--try", help="A factor; may be repeated. Default: 1, 1.1 ... 2.")
    ] = None,
    rope: Annotated[Typed, options_of(SearchSettings, "rope_type", "factor")],
    groups: GroupsOption = sweep.DEFAULT_GROUPS,
) -> None:
    """Scale all layers by one factor at a time: what is won in the middle, and what is lost in the tail?

    Example: `layerrope experiment sweep`

    Example: `layerrope experiment sweep --try 1.25 --try 1.5 --try 3`
    """
    config = LayerRopeConfig(**rope)
    tried = tuple(factors or sweep.DEFAULT_FACTORS)
    run.finish(
        lambda measuring: sweep.run_sweep(
            run.model, run.task, config, factors=tried, num_groups=groups, measuring=measuring
        )
    )


@experiment(halves.NAME)
def halves_command(run: Run, adapter: AdapterOption, groups: GroupsOption = halves.DEFAULT_GROUPS) -> None:
    """Apply an adapter's factors to the first half of the layers, the last half, all, and none.

    Example: `layerrope experiment halves --adapter demo-adapter`
    """
    config = load_adapter_config(adapter)
    run.finish(lambda measuring: halves.run_halves(run.model, run.task, config, num_groups=groups, measuring=measuring))


@experiment(control_points.NAME)
def control_points_command(
    run: Run,
    *,
    adapter: AdapterOption,
    by: Annotated[float, typer.Option(help="How far a coordinate is moved.")] = control_points.STEP,
    grid: Annotated[Typed, options_of(FactorGrid, default="the search's")],
    groups: GroupsOption = control_points.DEFAULT_GROUPS,
) -> None:
    """Move each coordinate of an adapter's Bézier curve up and down: which of them matter?

    Example: `layerrope experiment control-points --adapter demo-adapter`
    """
    config = load_adapter_config(adapter)
    control_points.genes_of(config)  # before a model is loaded
    searched = changed(_grid_of(adapter), grid)
    run.finish(
        lambda measuring: control_points.run_control_points(
            run.model, run.task, config, grid=searched, step=by, num_groups=groups, measuring=measuring
        )
    )


@experiment(attention.NAME)
def attention_command(run: Run, adapter: AdapterOption, groups: GroupsOption = attention.DEFAULT_GROUPS) -> None:
    """Read where the model looks for the answer, layer by layer, with and without an adapter.

    One prompt runs at a time; its last token alone runs with eager attention.

    Example: `layerrope experiment attention --adapter demo-adapter`
    """
    config = load_adapter_config(adapter)
    run.finish(
        lambda measuring: attention.run_attention(run.model, run.task, config, num_groups=groups, measuring=measuring)
    )


@experiment(extrapolation.NAME)
def extrapolation_command(
    run: Run,
    adapters: AdaptersOption,
    lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths such as 4096,8192. Default: 1, 2 and 4 times the window.")
    ] = None,
    baselines: Annotated[
        list[str] | None,
        typer.Option("--baseline", help="A further baseline such as uniform:1.5 or yarn:2; may be repeated."),
    ] = None,
    groups: GroupsOption = extrapolation.DEFAULT_GROUPS,
) -> None:
    """Compare adapters with PI and Dynamic-NTK, matched to the length, as prompts grow beyond the window.

    Example: `layerrope experiment extrapolation --adapter demo-adapter`

    Example: `layerrope experiment extrapolation --adapter demo-adapter --task perplexity --data book.txt --baseline
    yarn:2`
    """
    wanted = _lengths(lengths)
    further = [extrapolation.Line.fixed(parse_baseline(text), is_baseline=True) for text in baselines or []]
    tested = [extrapolation.Line.fixed(Contender.of_adapter(adapter)) for adapter in adapters]
    if run.window is None and wanted is None:
        raise TaskError("the model's config names no trained window (max_position_embeddings): pass --lengths.")
    if wanted is not None:
        tasks = {length: task_of_length(run.make_task, run.specification, length) for length in wanted}
    else:
        tasks, refused = default_lengths(run.make_task, run.specification, run.window)
        for length, reason in refused.items():
            err.print(f"left out {length} tokens: {reason}", highlight=False, markup=False)
    lines = [*extrapolation.matched_baselines(), *further, *tested]
    run.finish(
        lambda measuring: extrapolation.run_extrapolation(
            run.model, tasks, lines, num_groups=groups, measuring=measuring
        )
    )


@experiment(transfer.NAME)
def transfer_command(
    run: Run,
    adapters: AdaptersOption,
    on: Annotated[
        list[str] | None,
        typer.Option("--on", help="A task, with a length if need be: kv_words:512; may be repeated. Default: --task."),
    ] = None,
    groups: GroupsOption = transfer.DEFAULT_GROUPS,
) -> None:
    """Measure every adapter on every task and length: do factors hold where they were not searched?

    Example: `layerrope experiment transfer --adapter demo-adapter --on kv_words:256 --on kv_words:512`
    """
    contenders = [Contender.of_adapter(adapter) for adapter in adapters]
    asked = {cell: _parse_cell(cell) for cell in on or []}
    cells = {cell: _cell_task(run, *parts) for cell, parts in asked.items()}
    if not cells:
        cells = {f"{run.specification.name}:{run.specification.length}": run.task}
    run.finish(
        lambda measuring: transfer.run_transfer(run.model, cells, contenders, num_groups=groups, measuring=measuring)
    )


def _grid_of(adapter: str) -> FactorGrid:
    """The grid that the adapter was searched on, if its folder says so."""
    folder = Path(adapter)
    return read_record(folder).grid if (folder / RECORD_NAME).is_file() else FactorGrid()


def _lengths(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1 or len(set(lengths)) != len(lengths):
        raise SearchError(f"--lengths {text!r} must be distinct numbers of tokens such as 4096,8192.")
    return lengths


def _parse_cell(text: str) -> tuple[TaskName, int | None]:
    name, _, length = text.partition(":")
    if name not in TASK_NAMES or (text != name and not re.fullmatch("[1-9][0-9]{0,8}", length)):
        expected = f"one of {', '.join(TASK_NAMES)}, with a length if need be, such as {TASK_NAMES[0]}:512"
        raise TaskError(f"--on {text!r}: expected {expected}.")
    return name, int(length) if length else None


def _cell_task(run: Run, name: TaskName, length: int | None) -> Task:
    specification = run.specification.of_task(name)
    return run.make_task(specification) if length is None else task_of_length(run.make_task, specification, length)
