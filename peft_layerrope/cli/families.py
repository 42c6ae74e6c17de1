"""`layerrope families`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import transformers
import typer
from rich.progress import track

from .. import families, report
from ..errors import LayerRopeError, SearchError
from .app import app, err, out, plain_errors
from .options import DebugOption, JsonOption
from .output import check_file, write_json


@app.command(name="families")
def families_command(
    model_types: Annotated[
        list[str] | None, typer.Argument(help="transformers model types, such as llama gemma3_text. Default: all.")
    ] = None,
    json_output: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Try which model families of the installed transformers can be scaled, and print why others cannot.

    Each is built from a shrunken configuration and has to pass four checks: all factors 1 change nothing, all factors
    2 equal halved frequencies bit for bit, one layer's factor changes that layer's output and none before it, and
    only differences of positions count. Nothing is downloaded. All families take about a minute.

    Example: `layerrope families llama gemma3_text gpt2`
    """
    kinds = families.model_types()
    with plain_errors(debug):
        unknown = [name for name in model_types or [] if name not in kinds]
        if unknown:
            raise SearchError(f"{', '.join(unknown)}: not a decoder family of the installed transformers.")
        check_file(json_output, "--json")
        names = model_types or list(kinds)
        trials = [families.try_family(n) for n in track(names, "trying", console=err, transient=True)]
        if json_output is not None:
            write_json(json_output, [asdict(trial) for trial in trials])
        out.print(report.families_table(trials, kinds, f"Families of transformers {transformers.__version__}"))
        out.print(report.count_families(trials), highlight=False)
        wrong = [trial.model_type for trial in trials if trial.status == families.WRONG]
        if wrong:
            raise LayerRopeError(f"{', '.join(wrong)}: scaling does not do what it claims. Please report this.")
