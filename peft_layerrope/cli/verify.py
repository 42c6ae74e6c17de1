"""`layerrope verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import report
from ..loading import load_adapter, load_adapter_config
from ..verification import verify
from .app import app, out, plain_errors
from .inputs import display_name, load
from .options import Compute, DebugOption, JsonOption, LoadOptions, ModelArgument, takes_settings
from .output import check_file, write_json


@app.command(name="verify")
@takes_settings
def verify_command(
    *,
    model: ModelArgument = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of an adapter. Default: the factors baked into the model."),
    ] = None,
    json_output: JsonOption = None,
    loading: LoadOptions,
    debug: DebugOption = False,
) -> None:
    """Measure the factor that each layer's rotation really has, and compare it with the adapter's.

    Reads the rotation where each layer receives it, in a forward pass of 12 tokens. Exit status 1, with the layers
    named, if any differs. A layer without a rotation (NoPE, linear attention) has nothing to scale and is shown as
    such.

    Example: `layerrope verify --adapter demo-adapter`

    Example: `layerrope verify meta-llama/Llama-3.1-8B-Instruct --adapter my-adapter`
    """
    with plain_errors(debug):
        check_file(json_output, "--json")
        source = Compute.of(model, loading).source
        loaded = load(source)
        subject = load_adapter(loaded, adapter) if adapter is not None else loaded
        result = verify(subject, load_adapter_config(adapter) if adapter is not None else None)
        if json_output is not None:
            write_json(json_output, result.to_dict())
        name = display_name(source.model)
        out.print(report.verification_table(result, f"{name} + {adapter}" if adapter else name))
        result.raise_for_mismatch()
