"""`layerrope search`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .. import report
from ..atomic import writing
from ..card import ACCURACY_PLOT, FACTORS_PLOT
from ..demo import demo_model_path
from ..errors import LayerRopeError, SearchError
from ..evaluation import DEFAULT_BATCH_TOKENS
from ..run_lock import FolderInUseError, check_free, locked
from ..scores import DEFAULT_WEIGHTS
from ..searcher import Guards, SearchResult, SearchSettings, plan_search
from ..searcher import search as run_search
from ..searcher.result import REPORT_NAME, TIMING_NAME
from ..searcher.sensitivity import parse_layers
from ..searcher.specification import SearchSpecification, merge, read_specification
from ..searcher.state import LOCK_NAME, LOG_NAME, STATE_NAME
from .app import app, err, out, plain_errors, resumable, shell_word
from .options import (
    BatchTokensOption,
    ChatTemplateOption,
    DataOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    FactorOption,
    KeysOption,
    LengthOption,
    ModelArgument,
    NumDocumentsOption,
    NumKeysOption,
    PositionsOption,
    RopeType,
    RopeTypeOption,
    StrideOption,
    TaskOption,
    TaskSeedOption,
    build_task,
    load,
    resolve_task,
    tokenizer_of,
    window_of,
)
from .output import check_output

SPECIFICATION_NAME, RUN_FOLDER = "search.yaml", "run"
_COMMAND_LOCK = "search.lock"  # of the state, the specification and the result; `LOCK_NAME` is of the state alone
_RESULTS = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, REPORT_NAME, TIMING_NAME, ACCURACY_PLOT, FACTORS_PLOT)


class ObjectiveName(StrEnum):
    """Choices of --objective."""

    log_prob = "log_prob"
    accuracy = "accuracy"


class CurveName(StrEnum):
    """Choices of --curve."""

    bezier = "bezier"
    linear = "linear"
    direct = "direct"


class AlgorithmName(StrEnum):
    """Choices of --algorithm."""

    genetic = "genetic"
    cma_es = "cma-es"
    greedy = "greedy"
    random = "random"


# Where an option's value stands in search.yaml.
_PATHS: dict[str, tuple[str, ...]] = {
    "model": ("model",),
    "device": ("device",),
    "dtype": ("dtype",),
    "task": ("task", "name"),
    "task_seed": ("task", "seed"),
    **{
        name: ("task", name)
        for name in (
            "length",
            "positions",
            "data",
            "num_keys",
            "keys",
            "num_documents",
            "stride",
            "chat_template",
        )
    },
    "min_factor": ("search", "grid", "low"),
    "max_factor": ("search", "grid", "high"),
    "step": ("search", "grid", "step"),
    "layers": ("search", "scaled_layers"),
    "max_tail_drop": ("search", "guards", "max_tail_drop"),
    "max_short_rise": ("search", "guards", "max_short_rise"),
    **{
        name: ("search", name)
        for name in (
            "rope_type",
            "factor",
            "objective",
            "weights",
            "curve",
            "algorithm",
            "population",
            "generations",
            "refine",
            "gradient_steps",
            "refine_evaluations",
            "race",
            "controls",
            "search_groups",
            "validation_groups",
            "test_groups",
            "batch_tokens",
            "share_mib",
            "bootstrap",
            "seed",
        )
    },
}
_SEARCH, _SCALING, _DATA, _RUN = "Search", "Scaling", "Examples", "Running"


@app.command()
def search(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for the adapter, the report, the plots and the state.")],
    model: ModelArgument = None,
    rope_type: RopeTypeOption = RopeType.default,
    factor: FactorOption = 1.0,
    min_factor: Annotated[float, typer.Option(help="Smallest factor of a layer.", rich_help_panel=_SCALING)] = 1.0,
    max_factor: Annotated[float, typer.Option(help="Largest factor of a layer.", rich_help_panel=_SCALING)] = 2.0,
    step: Annotated[float, typer.Option(help="Step of the factor grid.", rich_help_panel=_SCALING)] = 0.1,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers that may be scaled, such as 0-3,7. Default: all but the first 2 of every 32. "
            "`layerrope sensitivity` says which are worth it.",
            rich_help_panel=_SCALING,
        ),
    ] = None,
    task: TaskOption = None,
    data: DataOption = None,
    length: LengthOption = None,
    positions: PositionsOption = None,
    task_seed: TaskSeedOption = 0,
    num_keys: NumKeysOption = None,
    keys: KeysOption = None,
    num_documents: NumDocumentsOption = None,
    stride: StrideOption = None,
    chat_template: ChatTemplateOption = False,
    curve: Annotated[
        CurveName | None,
        typer.Option(
            help="What is searched: a Bézier curve, a straight line, or each factor.", rich_help_panel=_SEARCH
        ),
    ] = None,
    algorithm: Annotated[
        AlgorithmName, typer.Option(help="greedy and random search the factors themselves.", rich_help_panel=_SEARCH)
    ] = AlgorithmName.genetic,
    population: Annotated[
        int, typer.Option(help="Curves per generation.", rich_help_panel=_SEARCH)
    ] = SearchSettings.population,
    generations: Annotated[
        int, typer.Option(help="Generations after the first.", rich_help_panel=_SEARCH)
    ] = SearchSettings.generations,
    objective: Annotated[
        ObjectiveName, typer.Option(help="Fitness: gold log-probability or exact match.", rich_help_panel=_SEARCH)
    ] = ObjectiveName.log_prob,
    weights: Annotated[
        tuple[float, float, float],
        typer.Option(help="λ first, middle, last of context utilisation.", rich_help_panel=_SEARCH),
    ] = DEFAULT_WEIGHTS,
    refine: Annotated[
        bool, typer.Option(help="Gradient and coordinate steps after the curve.", rich_help_panel=_SEARCH)
    ] = True,
    gradient_steps: Annotated[
        int, typer.Option(help="Gradient steps on the factors.", rich_help_panel=_SEARCH)
    ] = SearchSettings.gradient_steps,
    refine_evaluations: Annotated[
        int, typer.Option(help="Vectors that the coordinate steps may evaluate.", rich_help_panel=_SEARCH)
    ] = SearchSettings.refine_evaluations,
    race: Annotated[bool, typer.Option(help="Give up on vectors that clearly lose, on a part of the examples.")] = True,
    controls: Annotated[
        bool, typer.Option(help="Search the controls too, at the same budget.", rich_help_panel=_SEARCH)
    ] = True,
    guards: Annotated[bool, typer.Option(help="Keep to the limits below.", rich_help_panel="Guards")] = True,
    max_tail_drop: Annotated[
        float,
        typer.Option(help="How far accuracy at the last position may fall (0 to 1).", rich_help_panel="Guards"),
    ] = Guards.max_tail_drop,
    max_short_rise: Annotated[
        float, typer.Option(help="How far the loss on short prompts may rise, in nats.", rich_help_panel="Guards")
    ] = Guards.max_short_rise,
    search_groups: Annotated[
        int, typer.Option(help="Contexts to search on.", rich_help_panel=_DATA)
    ] = SearchSettings.search_groups,
    validation_groups: Annotated[
        int, typer.Option(help="Contexts that choose between curve and refinement.", rich_help_panel=_DATA)
    ] = SearchSettings.validation_groups,
    test_groups: Annotated[
        int, typer.Option(help="Contexts of the held-out table.", rich_help_panel=_DATA)
    ] = SearchSettings.test_groups,
    seed: Annotated[int, typer.Option(help="Seed of the searchers.", rich_help_panel=_SEARCH)] = 0,
    config: Annotated[
        Path | None,
        typer.Option(help="A search.yaml to repeat; options given beside it go first.", rich_help_panel=_RUN),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan with its cost, and stop.", rich_help_panel=_RUN)
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the search in --output, also after a kill; begin, if there is none.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of an earlier search.", rich_help_panel=_RUN)
    ] = False,
    bootstrap: Annotated[
        int,
        typer.Option(
            help="Draw the search split so many times again, and report how the choice varies.", rich_help_panel=_RUN
        ),
    ] = 0,
    workers: Annotated[int, typer.Option(help="Ray workers; 0 searches in this process.", rich_help_panel=_RUN)] = 0,
    ray_address: Annotated[
        str | None, typer.Option(help="A running Ray cluster, such as auto.", rich_help_panel=_RUN)
    ] = None,
    share_mib: Annotated[
        int,
        typer.Option(help="Memory for layers that factor vectors have in common, in MiB.", rich_help_panel="Model"),
    ] = SearchSettings.share_mib,
    batch_tokens: BatchTokensOption = DEFAULT_BATCH_TOKENS,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Search per-layer factors and compare them, held out, with simpler choices.

    Example: `layerrope search --output demo-adapter` searches the shipped demo model in about two minutes.

    Example: `layerrope search meta-llama/Llama-3.1-8B-Instruct --length 8192 --output my-adapter --dry-run`

    Example: `layerrope search --output my-adapter --resume` goes on where a search was interrupted.

    The folder gets the adapter, its card with the held-out table, `search.json`, `search.yaml` (which repeats the
    search), two plots, and `run/` with the state and `log.jsonl`, a line for every evaluation.
    """
    with plain_errors(debug):
        specification = _specification(context, output, config, resume, guards)
        if not dry_run:
            check_free(output / RUN_FOLDER, _COMMAND_LOCK)
        check_output(output, resume, overwrite)
        pool = _workers(workers, ray_address, specification)
        tokenizer = tokenizer_of(specification.model)
        window = window_of(specification.model)
        task = resolve_task(specification.task, window, is_demo=specification.model is None)
        specification = replace(specification, task=task)
        built = build_task(specification.task, tokenizer)
        loaded = load(specification.model, specification.device, specification.dtype)
        if dry_run:
            out.print(report.plan_table(plan_search(loaded, built, specification.search)))
            return
        folder = output / RUN_FOLDER
        how_to_go_on = f"layerrope search --output {shell_word(output)} --resume"
        with _forgotten_if_refused(output, resume), resumable(how_to_go_on), locked(folder, _COMMAND_LOCK):
            if not resume:
                _clear(output)
            if not (resume and (output / SPECIFICATION_NAME).exists()):  # other settings are refused, and not noted
                specification.save(output / SPECIFICATION_NAME)
            with pool as distribute:
                result = run_search(
                    loaded,
                    built,
                    specification.search,
                    folder=folder,
                    resume=resume and (folder / STATE_NAME).exists(),
                    on_plan=lambda plan: err.print(report.plan_line(plan), highlight=False),
                    distribute=distribute,
                )
            result.save(output)
        _print_result(result, output)


@contextmanager
def _forgotten_if_refused(output: Path, resume: bool) -> Iterator[None]:
    """Takes back what was written for a search that was refused before its first evaluation."""
    try:
        yield
    except FolderInUseError:  # what is there is somebody else's
        raise
    except LayerRopeError:
        run = output / RUN_FOLDER
        if not resume and not (run / STATE_NAME).exists():
            (output / SPECIFICATION_NAME).unlink(missing_ok=True)
            (run / LOG_NAME).unlink(missing_ok=True)
            for folder in (run, output):
                with suppress(OSError):  # not empty: there was something before; or gone already
                    folder.rmdir()
        raise


def _specification(
    context: typer.Context, output: Path, config: Path | None, resume: bool, guards: bool
) -> SearchSpecification:
    """What the file says, or the defaults, with what was typed put in."""
    saved = output / SPECIFICATION_NAME
    if config is None and resume and saved.exists():
        config = saved
    values = read_specification(config) if config is not None else {}
    changes: dict[tuple[str, ...], Any] = {}
    for name, path in _PATHS.items():
        if context.get_parameter_source(name).name == "COMMANDLINE":  # typer may bring a click of its own
            value = context.params[name]
            changes[path] = parse_layers(value) if name == "layers" else value
    if not guards:
        changes["search", "guards"] = {"max_tail_drop": None, "max_short_rise": None}
    return SearchSpecification.of(merge(values, changes), str(config) if config is not None else "options")


def _workers(count: int, address: str | None, specification: SearchSpecification) -> AbstractContextManager[Any]:
    """Ray workers that load the model themselves; nothing, where the search runs in this process."""
    if count < 0:
        raise SearchError(f"--workers {count} must be at least 0.")
    if not count and address is None:
        return nullcontext()
    from ..searcher.ray_workers import RayWorkers  # an optional extra

    return RayWorkers(
        max(count, 1),
        address=address,
        model_source=specification.model or demo_model_path(),
        device=specification.device,
        dtype=specification.dtype,
    )


def _clear(output: Path) -> None:
    """Removes an earlier search with its result, which nobody is to take for the new one's. The card stays: its owner
    may have written in it.
    """
    folder = output / RUN_FOLDER
    with locked(folder, LOCK_NAME), writing(output):
        for name in _RESULTS:
            (output / name).unlink(missing_ok=True)
        for path in folder.iterdir():
            if path.name not in (LOCK_NAME, _COMMAND_LOCK):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _print_result(result: SearchResult, output: Path) -> None:
    out.print()
    out.print(report.choice_table(result.table))
    out.print(report.comparison_table(result.table, f"Held out: {result.subtitle()}", result.better_control))
    for line in result.remarks():
        out.print(line, highlight=False)
    out.print(f"adapter, report and plots: {output}", highlight=False)
