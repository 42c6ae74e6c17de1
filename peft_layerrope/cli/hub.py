"""`layerrope push` and `layerrope pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import hub
from .app import app, out, plain_errors
from .options import DebugOption


@app.command()
def push(
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
    debug: DebugOption = False,
) -> None:
    """Upload an adapter with its card to the Hub.

    The two adapter files, the card, `search.json`, `search.yaml` and the plots go up, checked and without paths of this
    machine, and nothing else. The token is that of `hf auth login`, or `HF_TOKEN`.

    Example: `layerrope push my-adapter me/llama-long --private`

    Example: `layerrope push my-adapter somebody/llama-long --create-pr`
    """
    with plain_errors(debug):
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
    out.print(commit.pr_url or commit.commit_url, highlight=False, soft_wrap=True)


@app.command()
def pull(
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New, empty, or from an earlier pull of REPO_ID.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. Default: main.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace whatever DIR holds.")] = False,
    debug: DebugOption = False,
) -> None:
    """Download an adapter from the Hub, with its card and reports.

    DIR appears when everything is there and checked; after an interruption the same command goes on.

    Example: `layerrope pull me/llama-long my-adapter --revision v2`
    """
    with plain_errors(debug):
        path = hub.pull(repo_id, folder, revision, overwrite=overwrite)
    out.print(f"adapter: {path}", highlight=False, soft_wrap=True)
