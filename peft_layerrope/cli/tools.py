"""Smaller commands: verify, sensitivity, prompts, lm-eval, export, serve-check, push, pull."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .. import hub
from ..base_model import ModelSource, load_tokenizer
from ..declaration import spellings
from ..errors import InvalidConfigError, LayerRopeError, TaskError, shown
from ..experiments import DEFAULT_GROUPS, Measuring
from ..experiments.layer_sensitivity import (
    DEFAULT_FACTORS,
    NAME,
    change_style,
    plot_sensitivity,
    sensitivity,
    sensitivity_table,
)
from ..files import DEMO_NAME, public_name, to_json, writing
from ..lm_eval_tasks import lm_eval_tasks_path
from ..loading import load_adapter, load_adapter_config
from ..report import Table
from ..scoring.preflight import preflight, with_targets
from ..scoring.scorer import Scorer
from ..searcher.plan import RichProgress
from ..searcher.settings import SearchSettings
from ..serving.check import check_server, probe_prompts
from ..serving.export import FORMATS, divergence_between, export
from ..tasks.base import SplitName
from ..tasks.prompts import PromptTask
from ..tasks.specification import TaskSpecification
from ..tuner.config import LayerRopeConfig
from ..tuner.scaling import merged_factors
from ..verification import MISMATCH, NO_ROTATION, OK, Verification, verify
from . import app, err, out, plain_errors
from .options import (
    Compute,
    ComputeOptions,
    JsonOption,
    LoadOptions,
    ModelArgument,
    TaskOptions,
    Typed,
    build_task,
    check_file,
    check_output,
    check_plot,
    command,
    load,
    options_of,
    resolve_task,
    task_option,
    window_of,
    with_defaults,
    with_difficulty,
    write_json,
)


def _source_of(model: str | None, loading: Typed, config: LayerRopeConfig | None) -> ModelSource:
    """What was typed of a model. The demo model is not taken for an adapter of another: a stranger's file does not say
    what is loaded.
    """
    base = config.base_model_name_or_path if config is not None else None
    if model is None and base not in (None, "", DEMO_NAME):
        raise InvalidConfigError(
            f"the adapter is for {shown(public_name(base))}: name the model, its Hub id or folder."
        )
    return Compute.of(model, loading).source


@command("verify")
def verify_command(
    *,
    model: ModelArgument = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of an adapter. Default: the factors baked into the model."),
    ] = None,
    json_output: JsonOption = None,
    loading: LoadOptions,
) -> None:
    """Measure the factor that each layer's rotation really has, and compare it with the adapter's.

    Reads the rotation where each layer receives it, in a forward pass of 12 tokens. Exit status 1, with the layers
    named, if any differs. A layer without a rotation (NoPE, linear attention) has nothing to scale and is shown as
    such.

    Example: `layerrope verify --adapter demo-adapter`

    Example: `layerrope verify meta-llama/Llama-3.1-8B-Instruct --adapter my-adapter`
    """
    check_file(json_output, "--json")
    config = load_adapter_config(adapter) if adapter is not None else None
    source = _source_of(model, loading, config)
    loaded = load(source)
    result = verify(load_adapter(loaded, adapter) if adapter is not None else loaded, config)
    if json_output is not None:
        write_json(json_output, result.to_dict())
    name = source.model or "demo model"
    table = _verification_table(result, f"{name} + {adapter}" if adapter else name)
    out.print(table.to_rich(lambda cell: _STYLES.get(cell.partition(":")[0], "")))
    result.raise_for_mismatch()


@command("sensitivity")
def sensitivity_command(
    *,
    model: ModelArgument = None,
    factors: Annotated[
        list[float] | None,
        typer.Option("--try", help="A factor to try on each layer; may be given again. Default: 1.3, 1.6, 2."),
    ] = None,
    layers_to_transform: Annotated[
        str | None,
        typer.Option(
            *spellings(SearchSettings, "layers_to_transform"), help="Layers to try, such as 0-3,7. Default: all."
        ),
    ] = None,
    rope: Annotated[Typed, options_of(SearchSettings, "rope_type", "factor")],
    asked: TaskOptions,
    groups: Annotated[int, task_option(help="Contexts of the search split.", min=2)] = DEFAULT_GROUPS[NAME],
    plot: Annotated[Path | None, typer.Option(help="Also draw it into this PNG file.")] = None,
    json_output: JsonOption = None,
    computing: ComputeOptions,
) -> None:
    """Scale one layer at a time: which layers are worth searching, and is a range beyond 2 worth it?

    Prints context utilisation and the change of the gold log-probability for each layer and factor, with a star where
    its 95 % interval excludes 0, and says what to pass to `layerrope search`. Without a size, prompts are those of a
    search.

    Example: `layerrope sensitivity --plot sensitivity.png`

    Example: `layerrope sensitivity meta-llama/Llama-3.1-8B-Instruct --length 8192 --try 1.5 --try 3`
    """
    config = LayerRopeConfig(**rope)
    SearchSettings(layers_to_transform=layers_to_transform)  # a text that names none stops here
    check_file(json_output, "--json")
    check_plot(plot)
    compute, specification = Compute.of(model, computing), TaskSpecification(**asked)
    source, tokenizer = compute.source, load_tokenizer(compute.source)
    specification = resolve_task(specification, window_of(source), source.model is None, tokenizer, to_run=True)
    task = build_task(replace(specification, difficulty=None), tokenizer)
    loaded = load(source)
    if specification.difficulty is not None:
        specification = with_difficulty(specification, tokenizer, loaded, compute.batch_tokens)
        task = build_task(specification, tokenizer)
    with RichProgress(err) as audience:
        measuring = Measuring(loaded, groups, compute.batch_tokens, audience=audience)
        result = sensitivity(measuring, task, config, factors or DEFAULT_FACTORS, layers_to_transform)
    try:
        table = sensitivity_table(result, f"{source.model or 'demo model'}: {result.subtitle()}")
        out.print(table.to_rich(change_style))
        for line in result.advice():
            out.print(line)
    finally:  # also where nobody reads what is printed
        if plot is not None:
            with writing(plot):
                plot.write_bytes(plot_sensitivity(result))
        if json_output is not None:
            write_json(json_output, result.to_dict())


# a task that has prompts: there is no text to stride over
_SETTINGS = [field.name for field in fields(TaskSpecification) if field.name != "stride"]


@command("prompts")
def prompts_command(
    *,
    model: ModelArgument = None,
    asked: Annotated[Typed, options_of(TaskSpecification, *_SETTINGS, also={"task_seed": "--seed"})],
    position: Annotated[
        int | None,
        typer.Option(help="Index of the gold pair or document, from 0. Default: all of the task's.", min=0),
    ] = None,
    limit: Annotated[int, typer.Option(help="How many prompts.", min=1)] = 10,
    split: Annotated[SplitName, task_option(help="Which split.")] = "test",
    targets: Annotated[
        bool,
        typer.Option(
            "--targets", help="Also run the model, and print what it writes before each answer and by which tokens."
        ),
    ] = False,
    computing: ComputeOptions,
) -> None:
    """Print a task's prompts as JSON lines, for people and for other harnesses.

    Each line has `prompt`, `answers` and `position`. Needs the model's tokenizer and config; its weights only for
    `--targets`.

    Example: `layerrope prompts --limit 1`

    Example: `layerrope prompts --task kv_retrieval --data kv-retrieval-75_keys.jsonl.gz --position 37 --limit 5`
    """
    compute = Compute.of(model, computing)
    source, specification = compute.source, TaskSpecification(**asked)
    if specification.name == "perplexity":
        raise TaskError("--task perplexity has no prompts: it scores running text.")
    tokenizer = load_tokenizer(source)
    specification = with_defaults(specification, window_of(source), source.model is None, tokenizer)
    built = build_task(specification, tokenizer)
    if targets and (position is not None or not isinstance(built, PromptTask)):
        reason = f"{built.name} has none" if position is None else "leave --position out"
        raise TaskError(f"--targets shows written answers at the task's own positions: {reason}.")
    wanted = built.positions if position is None else (position,)
    num_groups = -(-limit // len(wanted))
    if "length" in asked:
        built.split(split, num_groups)  # refuses what is longer
    lines = []
    for prompt in built.prompts(split, num_groups, None if position is None else wanted)[:limit]:
        text = built.as_sent(prompt) if isinstance(built, PromptTask) else prompt.text
        lines.append({"prompt": text, "answers": list(prompt.answers), "position": prompt.position})
    if targets:
        found = _targets(built, compute, split, num_groups)
        lines = [line | target for line, target in zip(lines, found, strict=False)]
    for line in lines:
        typer.echo(to_json(line))


def _targets(task: PromptTask, compute: Compute, split: SplitName, groups: int) -> list[dict[str, Any]]:
    """Of each example of a split what the model writes before its answer, and the answer's tokens; on stderr what was
    found out.
    """
    scorer = Scorer(load(compute.source), batch_tokens=compute.batch_tokens)
    found = preflight(scorer, task, wanted={split: groups})
    for line in found.remarks():
        err.print(line)
    for sample in found.samples:
        err.print(f"for example: {sample}")
    decode = task.tokenizer.decode
    return [
        {"opening": decode(e.opening_ids), "target": [decode([token]) for token in e.answer_ids]}
        for e in with_targets(task.split(split, groups), found, task).examples
    ]


_STYLES = {OK: "green", MISMATCH: "bold red", NO_ROTATION: "dim"}  # of cells that begin with a status


def _verification_table(verification: Verification, title: str) -> Table:
    """A line for each layer: its factor as expected and as measured, and what that means."""
    rows = []
    for check in verification.layers:
        measured = "" if check.measured is None else f"{check.measured:.3f}"
        status = f"{check.status}: {check.note}" if check.note else check.status
        rows.append((str(check.layer), f"{check.expected:.3f}", measured, status))
    return Table(("layer", "expected", "measured", "status"), tuple(rows), title, text_columns=(3,))


INCLUDE = "--include_path"


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
        with plain_errors():
            run_lm_eval(context.args)


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Runs lm_eval's own command in this process, where PEFT knows the adapter type."""
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
    decided = any(a.split("=")[0] in (INCLUDE, "--config", "-C") for a in arguments)
    if decided or len(arguments) == 1:  # a single argument asks for some help text
        return list(arguments)
    start = 0 if arguments[0].startswith("-") else 1  # behind a subcommand
    return [*arguments[:start], INCLUDE, lm_eval_tasks_path(), *arguments[start:]]


@command("export")
def export_command(
    *,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Hub id or folder of an adapter.")],
    model: ModelArgument = None,
    output: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    form: Annotated[Literal[tuple(FORMATS)], typer.Option("--format", help="How the checkpoint says the factors.")],
    max_distinct: Annotated[
        int | None,
        typer.Option(
            min=1, help="Different factors at most: the nearest are merged, and what that does to text is told."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    loading: LoadOptions,
) -> None:
    """Write a checkpoint of the scaled model that transformers loads without this library.

    `granite-swa` says a base per layer (Dynamic-NTK with a target length), `mellum` two ropes (Qwen3), `layer-types`
    one rope per type of layers, `remote-code` any factors, by a file of code in the checkpoint. The logits are compared
    with the adapter's before the folder is there; what a format cannot say is refused, with the layers named.

    Example: `layerrope export my-adapter Qwen/Qwen2.5-0.5B-Instruct --format remote-code --output my-model`

    Example: `layerrope export my-adapter Qwen/Qwen3-0.6B --format mellum --output my-model`
    """
    check_output(output, resume=None, overwrite=overwrite)
    config = load_adapter_config(adapter)
    source = _source_of(model, loading, config)
    loaded, tokenizer = load(source), load_tokenizer(source)
    if max_distinct is not None and config.layer_factors is not None:
        merged = replace(config, layer_factors=merged_factors(config.layer_factors, max_distinct))
        apart = divergence_between(loaded, config, merged, probe_prompts(loaded, tokenizer))
        out.print(f"{max_distinct} different factors at most: divergence {apart:.2g} nats on text")
        config = merged
    difference = export(loaded, tokenizer, config, form, output)
    out.print(f"{output}: its logits differ from the adapter's by {difference:.2g} at most")


@command("serve-check")
def serve_check_command(
    *,
    url: Annotated[str, typer.Argument(metavar="URL", help="Of an OpenAI-compatible server, http://HOST:PORT.")],
    model: ModelArgument = None,
    adapter: Annotated[str, typer.Option(help="Hub id or folder of the adapter that is to be in force.")],
    loading: LoadOptions,
) -> None:
    """Ask a running server for log-probabilities of a few prompts: does it serve the scaled model?

    Compares them with those of the scaled and of the unscaled model, computed here. Exit status 1 if they are not the
    scaled one's.

    Example: `layerrope serve-check http://localhost:8000 Qwen/Qwen2.5-0.5B-Instruct --adapter my-adapter`
    """
    config = load_adapter_config(adapter)
    source = _source_of(model, loading, config)
    loaded = load(source)
    found = check_server(url, loaded, config, probe_prompts(loaded, load_tokenizer(source)))
    found.raise_unless_scaled()
    out.print(
        f"the server serves the scaled model: its log-probabilities differ from it by {found.to_scaled:.2g}, from the "
        f"unscaled one by {found.to_unscaled:.2g}",
    )


@command("push")
def push(
    *,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a LAYER_ROPE adapter.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name, or name for your own.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Visibility of a new repository. Default: your account's."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made if there is none. Default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Default: Upload LAYER_ROPE adapter.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model, where it was loaded from a folder.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the adapter. Default: what its card says.")] = None,
) -> None:
    """Upload an adapter with its card to the Hub.

    The two adapter files, the card, `search.json`, `search.yaml` and the plots go up, checked and without paths of this
    machine, and nothing else. The token is that of `hf auth login`, or `HF_TOKEN`.

    Example: `layerrope push my-adapter me/llama-long --private`

    Example: `layerrope push my-adapter somebody/llama-long --create-pr`
    """
    commit = hub.push_to_hub(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        base_model=base_model,
        license=license,
    )
    out.print(commit.pr_url or commit.commit_url, soft_wrap=True)


@command("pull")
def pull(
    *,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name.")],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Made if missing; may hold an earlier pull of REPO_ID.")
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. Default: main.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is not from such a pull.")] = False,
) -> None:
    """Download an adapter from the Hub, with its card and reports.

    Files go into DIR when all are there and checked; after an interruption the same command goes on.

    Example: `layerrope pull me/llama-long my-adapter --revision v2`
    """
    path = hub.pull(repo_id, folder, revision, overwrite=overwrite)
    out.print(f"adapter: {path}", soft_wrap=True)
