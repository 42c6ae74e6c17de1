"""`layerrope sensitivity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base_model import load_tokenizer
from ..experiments.sensitivity_report import plot_sensitivity, sensitivity_table
from ..files.atomic import writing
from ..searcher import SearchSettings
from ..searcher.grid import parse_layers
from ..searcher.sensitivity import DEFAULT_FACTORS, sensitivity
from ..tasks.specification import TaskSpecification
from .app import app, out, plain_errors
from .inputs import build_task, display_name, load, resolve_task, window_of
from .options import (
    Compute,
    DebugOption,
    JsonOption,
    LoadOptions,
    ModelArgument,
    TaskOptions,
    Typed,
    options_of,
    takes_settings,
    task_option,
)
from .output import check_file, check_plot, write_json


@app.command(name="sensitivity")
@takes_settings
def sensitivity_command(
    *,
    model: ModelArgument = None,
    factors: Annotated[
        list[float] | None,
        typer.Option("--try", help="A factor to try on each layer; may be given again. Default: 1.3, 1.6, 2."),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to try, such as 0-3,7. Default: all.")] = None,
    measured: Annotated[Typed, options_of(SearchSettings, "rope_type", "factor", "share_mib", "batch_tokens")],
    asked: TaskOptions,
    groups: Annotated[int, task_option(help="Contexts of the search split.")] = SearchSettings.search_groups,
    plot: Annotated[Path | None, typer.Option(help="Also draw it into this PNG file.")] = None,
    json_output: JsonOption = None,
    loading: LoadOptions,
    debug: DebugOption = False,
) -> None:
    """Scale one layer at a time: which layers are worth searching, and is a range beyond 2 worth it?

    Prints context utilisation and the change of the gold log-probability for each layer and factor, with a star where
    its 95 % interval excludes 0, and says what to pass to `layerrope search`. Takes a fraction of a search.

    Example: `layerrope sensitivity --plot sensitivity.png`

    Example: `layerrope sensitivity meta-llama/Llama-3.1-8B-Instruct --length 8192 --try 1.5 --try 3`
    """
    with plain_errors(debug):
        wanted = parse_layers(layers) if layers is not None else None
        check_file(json_output, "--json")
        check_plot(plot)
        specification = TaskSpecification(**asked)
        source = Compute.of(model, loading).source
        tokenizer = load_tokenizer(source)
        specification = resolve_task(specification, window_of(source), source.model is None, tokenizer)
        built = build_task(specification, tokenizer)
        loaded = load(source)
        result = sensitivity(
            loaded,
            built,
            factors=tuple(factors or DEFAULT_FACTORS),
            layers=wanted,
            num_groups=groups,
            **measured,
        )
        try:
            out.print(sensitivity_table(result, f"{display_name(source.model)}: {result.subtitle()}"))
            for line in result.advice():
                out.print(line, highlight=False)
        finally:  # also where nobody reads what is printed
            if plot is not None:
                with writing(plot):
                    plot_sensitivity(result, plot, result.subtitle())
            if json_output is not None:
                write_json(json_output, result.to_dict())
