"""The command `layerrope`: one thin function per command."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from . import __version__, families, report
from .demo import demo_model_path
from .errors import InvalidConfigError, LayerRopeError, SearchError, TaskError
from .evaluation import DEFAULT_BATCH_TOKENS, DEFAULT_WEIGHTS, PositionScores, evaluate
from .loading import load_adapter, load_adapter_config, load_model, load_tokenizer
from .searcher import FactorGrid, SearchResult, SearchSettings
from .searcher import search as run_search
from .tasks import SPLIT_NAMES, KeyValueRetrieval, Task
from .verification import verify

app = typer.Typer(
    name="layerrope",
    help="Per-layer RoPE scaling as a PEFT adapter: search the factors, evaluate and verify them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
_out = Console()
_err = Console(stderr=True)

USAGE_ERROR, FAILURE = 2, 1
DEMO_LENGTH_FACTOR = 2  # the demo is searched beyond its window, which is what it repairs


class RopeType(StrEnum):
    """Choices of --rope-type."""

    default = "default"
    linear = "linear"
    dynamic = "dynamic"


class ObjectiveName(StrEnum):
    """Choices of --objective."""

    log_prob = "log_prob"
    accuracy = "accuracy"


class TaskName(StrEnum):
    """Choices of --task."""

    kv_retrieval = "kv_retrieval"


SplitChoice = StrEnum("SplitChoice", {name: name for name in SPLIT_NAMES})

TaskOption = Annotated[TaskName, typer.Option(help="Word-level key-value retrieval.", rich_help_panel="Task")]
LengthOption = Annotated[
    int | None,
    typer.Option(
        help="Prompt length in tokens. Default: the model's window; for the demo model twice its window.",
        rich_help_panel="Task",
    ),
]
PositionsOption = Annotated[
    int, typer.Option(help="Gold positions, spread evenly from first to last.", rich_help_panel="Task")
]
TaskSeedOption = Annotated[int, typer.Option(help="Seed of the examples.", rich_help_panel="Task")]
BatchTokensOption = Annotated[int, typer.Option(help="Tokens per forward pass.", rich_help_panel="Model")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda ... Default: a GPU if there is one.", rich_help_panel="Model")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 ...", rich_help_panel="Model")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def _plain_errors(debug: bool) -> Iterator[None]:
    """One line per error: exit status 2 for settings that cannot work, 1 for a failure."""
    try:
        yield
    except LayerRopeError as error:
        if debug:
            raise
        _err.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        usage = isinstance(error, (SearchError, TaskError, InvalidConfigError))
        raise typer.Exit(USAGE_ERROR if usage else FAILURE) from error


def _version(value: bool) -> None:
    if value:
        _out.print(__version__, highlight=False)
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


@app.command()
def search(
    output: Annotated[Path, typer.Option(help="Folder for the adapter, the report and the plots.")],
    model: Annotated[str | None, typer.Argument(help="Hub id or folder. Default: the demo model.")] = None,
    rope_type: Annotated[
        RopeType, typer.Option(help="default: plain; linear: PI; dynamic: Dynamic-NTK.", rich_help_panel="Scaling")
    ] = RopeType.default,
    factor: Annotated[
        float, typer.Option(help="Global factor of linear and dynamic.", rich_help_panel="Scaling")
    ] = 1.0,
    min_factor: Annotated[float, typer.Option(help="Smallest factor of a layer.", rich_help_panel="Scaling")] = 1.0,
    max_factor: Annotated[float, typer.Option(help="Largest factor of a layer.", rich_help_panel="Scaling")] = 2.0,
    step: Annotated[float, typer.Option(help="Step of the factor grid.", rich_help_panel="Scaling")] = 0.1,
    task: TaskOption = TaskName.kv_retrieval,
    length: LengthOption = None,
    positions: PositionsOption = 11,
    task_seed: TaskSeedOption = 0,
    population: Annotated[
        int, typer.Option(help="Curves per generation.", rich_help_panel="Search")
    ] = SearchSettings.population,
    generations: Annotated[
        int, typer.Option(help="Generations after the first.", rich_help_panel="Search")
    ] = SearchSettings.generations,
    objective: Annotated[
        ObjectiveName, typer.Option(help="Fitness: gold log-probability or exact match.", rich_help_panel="Search")
    ] = ObjectiveName.log_prob,
    weights: Annotated[
        tuple[float, float, float],
        typer.Option(help="λ first, middle, last of context utilisation.", rich_help_panel="Search"),
    ] = DEFAULT_WEIGHTS,
    refine: Annotated[
        bool, typer.Option(help="Coordinate refinement after the curve.", rich_help_panel="Search")
    ] = True,
    refine_evaluations: Annotated[
        int, typer.Option(help="Vectors that refinement may evaluate.", rich_help_panel="Search")
    ] = SearchSettings.refine_evaluations,
    controls: Annotated[
        bool, typer.Option(help="Search the controls too, at the same budget.", rich_help_panel="Search")
    ] = True,
    search_groups: Annotated[
        int, typer.Option(help="Contexts to search on.", rich_help_panel="Search")
    ] = SearchSettings.search_groups,
    test_groups: Annotated[
        int, typer.Option(help="Contexts of the held-out table.", rich_help_panel="Search")
    ] = SearchSettings.test_groups,
    seed: Annotated[int, typer.Option(help="Seed of the searchers.", rich_help_panel="Search")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier search.")] = False,
    batch_tokens: BatchTokensOption = DEFAULT_BATCH_TOKENS,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Search per-layer factors and compare them, held out, with simpler choices.

    Example: `layerrope search --output demo-adapter` searches the shipped demo model in about two minutes.

    Example: `layerrope search meta-llama/Llama-3.1-8B-Instruct --length 8192 --output my-adapter`
    """
    with _plain_errors(debug):
        settings = SearchSettings(
            rope_type=rope_type.value,
            factor=factor,
            grid=FactorGrid(min_factor, max_factor, step),
            objective=objective.value,
            weights=weights,
            population=population,
            generations=generations,
            refine=refine,
            refine_evaluations=refine_evaluations,
            controls=controls,
            search_groups=search_groups,
            test_groups=test_groups,
            batch_tokens=batch_tokens,
            seed=seed,
        )
        _check_output(output, overwrite)
        tokenizer = load_tokenizer(model or demo_model_path())
        loaded = load_model(model or demo_model_path(), device=device, dtype=dtype)
        built = _build_task(task, loaded, tokenizer, length, positions, task_seed, is_demo=model is None)
        result = run_search(loaded, built, settings)
        result.save(output)
        _print_result(result, output)


@app.command(name="evaluate")
def evaluate_command(
    model: Annotated[str | None, typer.Argument(help="Hub id or folder. Default: the demo model.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Hub id or folder of an adapter.")] = None,
    task: TaskOption = TaskName.kv_retrieval,
    length: LengthOption = None,
    positions: PositionsOption = 11,
    task_seed: TaskSeedOption = 0,
    split: Annotated[
        SplitChoice, typer.Option(help="Which split; quote figures from test only.", rich_help_panel="Task")
    ] = SplitChoice.test,
    groups: Annotated[
        int, typer.Option(help="Contexts; each is asked at every position.", rich_help_panel="Task")
    ] = 100,
    json_output: Annotated[Path | None, typer.Option("--json", help="Also write the scores to this JSON file.")] = None,
    batch_tokens: BatchTokensOption = DEFAULT_BATCH_TOKENS,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Print accuracy at each gold position and context utilisation U, with or without an adapter.

    Example: `layerrope evaluate --adapter demo-adapter`
    """
    with _plain_errors(debug):
        tokenizer = load_tokenizer(model or demo_model_path())
        loaded = load_model(model or demo_model_path(), device=device, dtype=dtype)
        built = _build_task(task, loaded, tokenizer, length, positions, task_seed, is_demo=model is None)
        subject = load_adapter(loaded, adapter) if adapter is not None else loaded
        scores = evaluate(
            subject,
            built,
            split=split.value,
            num_groups=groups,
            batch_tokens=batch_tokens,
            progress=lambda batches: track(batches, "evaluating", console=_err, transient=True),
        )
        name = "demo model" if model is None else model
        title = f"{name} + {adapter}" if adapter else name
        _out.print(report.position_table(scores, title))
        if json_output is not None:
            _write_scores(json_output, scores, built, adapter)


@app.command(name="verify")
def verify_command(
    model: Annotated[str | None, typer.Argument(help="Hub id or folder. Default: the demo model.")] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of an adapter. Default: the factors baked into the model."),
    ] = None,
    json_output: Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Measure the factor that each layer's rotation really has, and compare it with the adapter's.

    Reads the rotation where each layer receives it, in a forward pass of 12 tokens. Exit status 1, with the layers
    named, if any differs. A layer without a rotation (NoPE, linear attention) has nothing to scale and is shown as
    such.

    Example: `layerrope verify --adapter demo-adapter`

    Example: `layerrope verify meta-llama/Llama-3.1-8B-Instruct --adapter my-adapter`
    """
    with _plain_errors(debug):
        loaded = load_model(model or demo_model_path(), device=device, dtype=dtype)
        subject = load_adapter(loaded, adapter) if adapter is not None else loaded
        result = verify(subject, load_adapter_config(adapter) if adapter is not None else None)
        if json_output is not None:
            json_output.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
        name = "demo model" if model is None else model
        _out.print(report.verification_table(result, f"{name} + {adapter}" if adapter else name))
        result.raise_for_mismatch()


@app.command(name="families")
def families_command(
    model_types: Annotated[
        list[str] | None, typer.Argument(help="transformers model types, such as llama gemma3_text. Default: all.")
    ] = None,
    json_output: Annotated[
        Path | None, typer.Option("--json", help="Also write the results to this JSON file.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Try which model families of the installed transformers can be scaled, and print why others cannot.

    Each is built from a shrunken configuration and has to pass four checks: all factors 1 change nothing, all factors
    2 equal halved frequencies bit for bit, one layer's factor changes that layer's output and none before it, and
    only differences of positions count. Nothing is downloaded. All families take about a minute.

    Example: `layerrope families llama gemma3_text gpt2`
    """
    kinds = families.model_types()
    with _plain_errors(debug):
        unknown = [name for name in model_types or [] if name not in kinds]
        if unknown:
            raise SearchError(f"{', '.join(unknown)}: not a decoder family of the installed transformers.")
        names = model_types or list(kinds)
        trials = [families.try_family(n) for n in track(names, "trying", console=_err, transient=True)]
        if json_output is not None:
            json_output.write_text(json.dumps([asdict(trial) for trial in trials], indent=2) + "\n")
        _out.print(report.families_table(trials, kinds, f"Families of transformers {transformers.__version__}"))
        _out.print(report.count_families(trials), highlight=False)
        wrong = [trial.model_type for trial in trials if trial.status == families.WRONG]
        if wrong:
            raise LayerRopeError(f"{', '.join(wrong)}: scaling does not do what it claims. Please report this.")


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuses an output folder that cannot be used, before any work."""
    if output.exists() and not output.is_dir():
        raise SearchError(f"--output {output} exists and is not a folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise SearchError(f"--output {output} is not empty; pass --overwrite to replace an earlier search.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SearchError(f"--output {output} cannot be created: {error.strerror}.") from error
    if not os.access(output, os.W_OK):
        raise SearchError(f"--output {output} is not writable.")


def _build_task(
    name: TaskName,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int | None,
    positions: int,
    seed: int,
    is_demo: bool,
) -> Task:
    window = model.config.get_text_config(decoder=True).max_position_embeddings
    if length is None:
        length = window * (DEMO_LENGTH_FACTOR if is_demo else 1)
    if length > window:
        _err.print(f"prompts of {length} tokens are {length / window:g}× the model's window of {window}.")
    return KeyValueRetrieval(tokenizer, length, num_positions=positions, seed=seed)


def _print_result(result: SearchResult, output: Path) -> None:
    _out.print()
    _out.print(report.choice_table(result.table))
    _out.print(report.comparison_table(result.table, f"Held out: {result.subtitle()}"))
    counts = result.evaluations
    _out.print(
        f"{counts['per_layer_search']} evaluations for the per-layer search, {counts['all_methods']} for all methods "
        f"({counts['saved_by_memo']} saved by the memo), {sum(result.seconds.values()):.0f} s.",
        highlight=False,
    )
    if result.edge_layers:
        _out.print(
            f"note: the factors of layers {result.edge_layers} are at the edge of the range; a wider "
            "--min-factor/--max-factor may find better ones.",
            highlight=False,
        )
    _out.print(f"adapter, report and plots: {output}", highlight=False)


def _write_scores(path: Path, scores: PositionScores, task: Task, adapter: str | None) -> None:
    content = {"task": task.describe(), "adapter": adapter, "scores": scores.to_dict()}
    path.write_text(json.dumps(content, indent=2) + "\n")


def run() -> None:
    """Entry point of the `layerrope` script."""
    try:
        app()
    except KeyboardInterrupt:
        _err.print("interrupted; nothing was written.")
        sys.exit(130)
