"""`layerrope evaluate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from peft.utils import CONFIG_NAME

from .. import __version__
from ..base_model import describe_loading, load_tokenizer
from ..comparison import (
    Comparison,
    Progress,
    by_position_tables,
    check_candidates,
    compare,
    comparison_markdown,
    describe_setting,
    forced_by_position_tables,
    plot_comparison,
    summary_table,
    written_table,
)
from ..comparison.candidates import BASELINES, Candidate, of_adapters, parse_baseline
from ..errors import TaskError
from ..files import public_name, to_json, write_atomically, writing
from ..report import fitness_remark, position_table
from ..runs import RUN_FOLDER, locked
from ..scoring.preflight import PREFLIGHT_NAME, preflight, with_targets
from ..scoring.scorer import DEFAULT_BUCKETS, Scorer
from ..searcher.plan import RichProgress, SearchProgress, since
from ..tasks.base import MEASURES, SplitName
from ..tasks.prompts import PromptTask
from ..tasks.specification import TaskSpecification
from . import err, out, resumable
from .options import (
    Compute,
    ComputeOptions,
    JsonOption,
    ModelArgument,
    TaskOptions,
    build_task,
    check_file,
    check_output,
    check_plot,
    command,
    keep_date,
    load,
    remove_results,
    resolve_task,
    run_option,
    task_option,
    window_of,
    with_difficulty,
    with_kept_date,
    write_json,
)

_compared_option = partial(typer.Option, rich_help_panel="Compared")
_JSON_NAME, _MARKDOWN_NAME, _PLOT_NAME = "evaluation.json", "evaluation.md", "{measure}_by_position.png"
_RESULTS = (_JSON_NAME, _MARKDOWN_NAME, PREFLIGHT_NAME, *(_PLOT_NAME.format(measure=measure) for measure in MEASURES))


@command("evaluate")
def evaluate_command(
    *,
    model: ModelArgument = None,
    adapter: Annotated[
        list[str] | None,
        _compared_option(help="Hub id or folder of an adapter, LAYER_ROPE or any other of PEFT's; may be given again."),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        _compared_option(
            help=f"{', '.join(BASELINES.values())}; may be given again. The first is what the others are compared "
            "with. Default: none."
        ),
    ] = None,
    asked: TaskOptions,
    split: Annotated[SplitName, task_option(help="Which split; quote figures from test only.")] = "test",
    groups: Annotated[int, task_option(help="Contexts, each asked at every position; or windows of text.")] = 100,
    buckets: Annotated[
        int | None,
        task_option(help=f"Parts of a perplexity window by token position. Default: {DEFAULT_BUCKETS}."),
    ] = None,
    teacher_forced: Annotated[
        bool,
        task_option(
            "--teacher-forced",
            help="Only read the answers off one forward pass, which is quick, instead of having them written.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        run_option(help="Folder for evaluation.json and .md, the plot, and the scores."),
    ] = None,
    resume: Annotated[
        bool,
        run_option("--resume", help="Go on with what is in --output, also after a kill; begin, if nothing is."),
    ] = False,
    overwrite: Annotated[bool, run_option("--overwrite", help="Replace what is in --output.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw it into this PNG file.")] = None,
    json_output: JsonOption = None,
    computing: ComputeOptions,
) -> None:
    """Print accuracy at each gold position and context utilisation U; or compare adapters and baselines side by side.

    Alone, a model is evaluated as it is, without any size on prompts of up to 4,096 tokens, as in a search. Adapters
    and baselines are scored on the same examples, and the differences to the first are paired by context.

    Example: `layerrope evaluate --adapter demo-adapter --baseline none --baseline yarn:2`

    Example: `layerrope evaluate Qwen/Qwen3-8B --task multi_doc_qa --data nq-open-20_total_documents_gold_at_0.jsonl.gz
    --adapter my-adapter --output comparison`

    Example: `layerrope evaluate model-q4_k_m.gguf`, `layerrope evaluate Qwen/Qwen3-8B --model-args load_in_4bit=true`

    Example: `layerrope evaluate Qwen/Qwen3-8B --task perplexity --data book.txt --length 8192 --adapter my-adapter`

    Answers are written and judged by the task's public metric where it has one. Beside that stands the likelihood that
    a search climbs, of the answer as the unscaled model writes it, which a few contexts of the search split show.

    The task's settings stand beside every figure. `--output` keeps the scores of each part of the work, and
    `--resume` goes on with them.
    """
    specification = TaskSpecification(**asked)
    candidates = _candidates(adapter or [], baseline or [])
    check_output(output, resume, overwrite)
    if output is not None and (output / CONFIG_NAME).exists():
        raise TaskError(
            f"--output {output} holds an adapter, whose files would be mixed with these: use another folder."
        )
    check_file(json_output, "--json")
    check_plot(plot)
    compute = Compute.of(model, computing)
    source = compute.source
    tokenizer = load_tokenizer(source)
    specification = with_kept_date(specification, output, resume)
    specification = resolve_task(specification, window_of(source), source.model is None, tokenizer, to_run=True)
    loaded = load(source) if specification.difficulty is not None else None
    if loaded is not None:
        specification = with_difficulty(specification, tokenizer, loaded, compute.batch_tokens)
    built = build_task(specification, tokenizer)
    examples = built.split(split, groups)
    if buckets is not None and examples.measure != "loss":
        raise TaskError(f"--buckets {buckets} is for perplexity; {specification.name} has gold positions.")
    if loaded is None:
        loaded = load(source)
    found = None
    if isinstance(built, PromptTask):
        check_candidates(loaded, candidates)  # comparing does it first; here the model is to write before that
        # What the unscaled model writes, by which the answers' likelihood is measured. A run that goes on has the
        # same targets, however this machine rounds.
        scorer, kept = Scorer(loaded, batch_tokens=compute.batch_tokens), output if resume else None
        with RichProgress(err) as audience:
            audience.stage("preflight", 1)
            found = preflight(scorer, built, wanted={split: groups}, tell=audience.note, kept=kept)
        examples = with_targets(examples, found, built)
    if teacher_forced:
        examples = replace(examples, judge=None)
    with ExitStack() as stack:
        if output is not None:
            stack.enter_context(resumable("the same command and --resume."))
            stack.enter_context(locked(output))

        def begun() -> None:
            if output is not None:
                if overwrite:
                    remove_results(output, _RESULTS)
                keep_date(specification, output)
                if found is not None:
                    found.save(output)

        with RichProgress(err) as audience:
            comparison = compare(
                loaded,
                examples,
                candidates,
                task_description=built.describe(),
                num_buckets=buckets if buckets is not None else DEFAULT_BUCKETS,
                batch_tokens=compute.batch_tokens,
                folder=output / RUN_FOLDER if output is not None else None,
                resume=resume,
                overwrite=overwrite,
                progress=_told_to(audience, [candidate.label for candidate in candidates], begun),
            )
        try:
            _print(comparison, source.model or "demo model", found.remarks() if found is not None else [])
        finally:  # also where nobody reads what is printed
            name = public_name(loaded.config._name_or_path)
            base = describe_loading(loaded)
            content = {"model": name, "base": base, "version": __version__, **comparison.to_dict()}
            if found is not None:
                content["preflight"] = found.describe()
            if json_output is not None:
                write_json(json_output, content)
            if plot is not None:
                _draw(comparison, name, plot)
            if output is not None:  # the report last in JSON, so that where it is everything is
                _draw(comparison, name, output / _PLOT_NAME.format(measure=comparison.measure))
                write_atomically(output / _MARKDOWN_NAME, f"# {name}\n\n{comparison_markdown(comparison)}")
                write_atomically(output / _JSON_NAME, to_json(content, indent=2) + "\n")
                out.print(f"report, plot and scores: {output}", soft_wrap=True)


def _told_to(audience: SearchProgress, labels: list[str], begun: Callable[[], None]) -> Progress:
    """What tells an audience how far a comparison is, with the candidates as its stages."""
    first, started, current = None, 0.0, None

    def tell(label: str, done: int, total: int) -> None:
        nonlocal first, started, current
        parts = total // len(labels)
        if first is None:
            begun()
            first, started = done, time.perf_counter()
        if done == first + 1:  # candidates take about as long as each other; what an earlier run did took no time
            audience.expect(dict.fromkeys(labels[first // parts :], parts * since(started)))
        if label == current or done == total:
            audience.advance()
            return
        current = label
        audience.stage(label, parts)
        for _ in range(done % parts):
            audience.advance()

    return tell


def _draw(comparison: Comparison, name: str, image: Path) -> None:
    with writing(image):
        image.write_bytes(plot_comparison(comparison, name))


def _candidates(adapters: list[str], baselines: list[str]) -> list[Candidate]:
    """What is compared, each adapter's files read once: a wrong one is to fail before the model is loaded."""
    candidates = [*map(parse_baseline, baselines or ["none"]), *of_adapters(adapters)]
    labels = [candidate.label for candidate in candidates]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise TaskError(f"{twice} is given twice.")
    for candidate in candidates:
        candidate.identity()
    return candidates


def _print(comparison: Comparison, name: str, remarks: list[str]) -> None:
    out.print(describe_setting(comparison))
    for line in remarks:
        out.print(line)
    if len(comparison.scores) == 1:
        label, scores = next(iter(comparison.scores.items()))
        out.print(position_table(scores, f"{name}, {label}").to_rich())
        return
    out.print(summary_table(comparison, name).to_rich())
    tables = by_position_tables(comparison, "By position")
    tables += forced_by_position_tables(comparison, "By position, teacher-forced")
    for table in (*tables, written_table(comparison)):
        if table is not None:
            out.print(table.to_rich())
    for line in fitness_remark(comparison.scores):
        out.print(line)
