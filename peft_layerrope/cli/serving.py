"""Commands about where the model runs: export, serve-check."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..base_model import load_tokenizer
from ..loading import load_adapter_config
from ..serving.check import check_server, probe_prompts
from ..serving.export import FORMATS, export
from .app import app, out, plain_errors
from .options import Compute, DebugOption, LoadOptions, ModelArgument, check_output, load, takes_settings

FormatChoice = StrEnum("FormatChoice", {name: name for name in FORMATS})


@app.command(name="export")
@takes_settings
def export_command(
    *,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Hub id or folder of an adapter.")],
    model: ModelArgument = None,
    output: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    form: Annotated[FormatChoice, typer.Option("--format", help="How the checkpoint says the factors.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    loading: LoadOptions,
    debug: DebugOption = False,
) -> None:
    """Write a checkpoint of the scaled model that transformers loads without this library.

    `granite-swa` says a base per layer (Dynamic-NTK with a target length), `mellum` two ropes (Qwen3), `layer-types`
    one rope per type of layers, `remote-code` any factors, by a file of code in the checkpoint. The logits are compared
    with the adapter's before the folder is there; what a format cannot say is refused, with the layers named.

    Example: `layerrope export my-adapter --format remote-code --output my-model`

    Example: `layerrope export my-adapter Qwen/Qwen3-0.6B --format mellum --output my-model`
    """
    with plain_errors(debug):
        check_output(output, resume=False, overwrite=overwrite)
        config, source = load_adapter_config(adapter), Compute.of(model, loading).source
        difference = export(load(source), load_tokenizer(source), config, form.value, output)
    out.print(f"{output}: its logits differ from the adapter's by {difference:.2g} at most", highlight=False)


@app.command(name="serve-check")
@takes_settings
def serve_check_command(
    *,
    url: Annotated[str, typer.Argument(metavar="URL", help="Of an OpenAI-compatible server, http://HOST:PORT.")],
    model: ModelArgument = None,
    adapter: Annotated[str, typer.Option(help="Hub id or folder of the adapter that is to be in force.")],
    loading: LoadOptions,
    debug: DebugOption = False,
) -> None:
    """Ask a running server for log-probabilities of a few prompts: does it serve the scaled model?

    Compares them with those of the scaled and of the unscaled model, computed here. Exit status 1 if they are not the
    scaled one's.

    Example: `layerrope serve-check http://localhost:8000 Qwen/Qwen2.5-0.5B-Instruct --adapter my-adapter`
    """
    with plain_errors(debug):
        config, source = load_adapter_config(adapter), Compute.of(model, loading).source
        loaded = load(source)
        found = check_server(url, loaded, config, probe_prompts(loaded, load_tokenizer(source)))
        found.raise_unless_scaled()
    out.print(
        f"the server serves the scaled model: its log-probabilities differ from it by {found.to_scaled:.2g}, from the "
        f"unscaled one by {found.to_unscaled:.2g}",
        highlight=False,
    )
