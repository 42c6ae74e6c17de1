"""`layerrope report`."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..base_model import ModelSource, load_tokenizer
from ..cards import SPECIFICATION_NAME
from ..errors import SearchError
from ..experiments.measuring import factor_vector
from ..experiments.report import ReportRequest, run_steps, write_report
from ..loading import load_adapter_config
from ..messages import DEMO_NAME
from ..runs import locked
from ..searcher.plan import RichProgress
from ..searcher.result import SearchRecord, read_record
from ..searcher.settings import SearchSpecification, read_specification
from ..tasks.specification import TaskSpecification
from ..tuner.sites import trained_window
from . import err, out, resumable
from .experiments import repeated
from .options import (
    Compute,
    ComputeOptions,
    Typed,
    build_task,
    check_output,
    command,
    load,
    options_of,
    resolve_task,
)

_NOT_TAKEN = ("device", "trust_remote_code")  # of a file, which may be a stranger's: that code may run has to be typed
_LONGEST = 64  # times the trained window: more is a damaged or hostile file


@command("report")
def report_command(
    *,
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder of an adapter that was searched.")],
    model: Annotated[str | None, typer.Option(help="Hub id or folder. Default: as in search.json.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write. Default: FOLDER/report.html.")] = None,
    kind: Annotated[
        Literal["html", "md"], typer.Option("--format", help="html: one file; md: with a folder of plots.")
    ] = "html",
    also: Annotated[list[str] | None, typer.Option(help="A further adapter to compare with; may be repeated.")] = None,
    groups: Annotated[
        int | None, typer.Option(help="Contexts of every experiment. Default: each has its own.", min=2)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer contexts and factors.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an earlier call has finished.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure all of it anew.")] = False,
    asked: Annotated[Typed, options_of(TaskSpecification, "name", "data", "length")],
    computing: ComputeOptions,
) -> None:
    """Run every experiment that applies to a searched adapter, and write one report.

    Model, task and length are those of the search unless options say otherwise. Finished sections are kept in a folder
    beside the report.

    Example: `layerrope report demo-adapter`

    Example: `layerrope report demo-adapter --quick --format md --output demo.md`
    """
    output = output or folder / f"report.{kind}"
    record, config = read_record(folder), load_adapter_config(str(folder))
    if config.layer_factors != record.layer_factors:
        raise SearchError(f"{folder}: adapter_config.json and search.json have different layer_factors.")
    if not output.suffix or output.is_dir():
        raise SearchError(f"--output {output} must be a file such as report.html.")
    sections = output.with_suffix("")
    check_output(sections, resume, overwrite)
    searched = _searched(folder, record)
    known = {f.name: getattr(searched, f.name) for f in fields(ModelSource) if f.name not in _NOT_TAKEN}
    compute = Compute.of(model, computing, known)
    # another task has few of the settings of the one that was searched on
    task = searched.task.of_task(asked["name"]) if "name" in asked else searched.task
    tokenizer, loaded = load_tokenizer(compute.source), load(compute.source)
    factor_vector(loaded, config)
    window = trained_window(loaded)
    specification = resolve_task(replace(task, **asked), window, compute.source.model is None, tokenizer)
    if window is not None and specification.length > _LONGEST * window:
        raise SearchError(
            f"{folder}: prompts of {specification.length} tokens are more than {_LONGEST}× the model's window of "
            f"{window}; pass --length."
        )
    build_task(specification, tokenizer)  # one that cannot be made stops here
    request = ReportRequest(
        model=loaded,
        source=compute.source,
        adapter=str(folder),
        config=config,
        record=record,
        specification=specification,
        make_task=lambda wanted: build_task(wanted, tokenizer),
        others=also or [],
        num_groups=groups,
        quick=quick,
    )
    again = repeated(context, ["report", str(folder)], ("folder", "kind"))
    with resumable("the same command and --resume."), locked(sections):
        with RichProgress(err) as audience:
            ran, skipped = run_steps(request, sections, compute.batch_tokens, resume, audience)
        write_report(output, request, ran, skipped, again, markdown=kind == "md")
    for section_name, reason in skipped:
        err.print(f"not run: {section_name}: {reason}")
    out.print(f"report: {output}", soft_wrap=True)


def _searched(folder: Path, record: SearchRecord) -> SearchSpecification:
    """The search that is reported on; a file that its task read is named by whoever asks for the report."""
    path, known = folder / SPECIFICATION_NAME, record.task
    if path.is_file():
        found = SearchSpecification.of(read_specification(path), str(path))
        task = replace(found.task, length=found.task.length or known.length, data=None)
    else:
        found = SearchSpecification()
        positions = len(known.positions) if known.name != "perplexity" else 0
        task = TaskSpecification(known.name, known.length, positions or None, known.seed)
    return replace(found, model=None if record.model == DEMO_NAME else record.model, task=task)
