"""Adapters to the Hub and from it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import get_token
from peft import PeftModel
from peft.utils import CONFIG_NAME

from .._version import __version__
from ..cards.merge import CARD_NAME
from ..errors import LayerRopeError
from ..files.strict_json import to_json
from ..tuner.config import LayerRopeConfig
from .errors import NotLoggedInError, PullTargetError, check_repo_id, hub_errors
from .folder import PUBLISHED, address_card, check_adapter_folder, stage

if TYPE_CHECKING:
    from ..searcher import SearchResult

PULL_RECORD = ".layerrope-pull.json"
"""In a pulled folder: where it is from, and what was in it, so that a later pull knows what it may replace."""


def push_to_hub(
    source: str | Path | SearchResult | PeftModel,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> CommitInfo:
    """Uploads a LAYER_ROPE adapter with its card, in one commit.

    `adapter_config.json`, `adapter_model.safetensors`, `README.md`, `search.json`, `search.yaml` and the plots go up,
    and nothing else of a folder. They are checked before anything is sent. The repository is made if there is none.
    What people wrote in the card that it has stays, unless `source` is a folder in whose card something was written.

    Args:
        source: an adapter's folder, a [`SearchResult`], or a PeftModel with a LAYER_ROPE adapter.
        repo_id: `owner/name`, or `name` for your own.
        private: visibility of a repository that is new; None: the account's default.
        revision: a branch, made from main if there is none. Default: main.
        create_pr: open a pull request instead of writing to the branch.
        commit_message: default: "Upload LAYER_ROPE adapter".
        token: default: that of `hf auth login` or `HF_TOKEN`.
        base_model: the base model's id on the Hub, where it was loaded from a folder; without it an adapter of such a
            model is refused. Paths of this machine are never uploaded: of those in `search.yaml` the last component is.
        license: the adapter's licence, such as `"apache-2.0"`. Default: what the card says; nothing is assumed.

    Returns:
        The commit: `.oid`, `.commit_url`, `.pr_url`.

    Raises:
        HubError: the Hub refuses or cannot be reached; see `hub_errors`.
        LayerRopeError: the adapter is not fit to be shared; the message says why.
    """
    check_repo_id(repo_id)
    if base_model is not None:
        check_repo_id(base_model)
    with TemporaryDirectory(prefix="layerrope-") as scratch:
        staged, published = Path(scratch, "staged"), Path(scratch, "published")
        staged.mkdir()
        with _as_folder(source, Path(scratch, "saved")) as folder:
            stage(folder, staged, base_model=base_model, license=license)
        with hub_errors("push to", repo_id, revision):
            api = _api(token)
            if token is None and get_token() is None:
                raise NotLoggedInError(f"cannot push to {repo_id!r}: you are not logged in; use `hf auth login`.")
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            address_card(staged, repo_id, _published_card(api, repo_id, revision, published))
            return api.create_commit(  # not upload_folder, which may make several
                repo_id,
                [CommitOperationAdd(path.name, path) for path in sorted(staged.iterdir())],
                commit_message=commit_message or "Upload LAYER_ROPE adapter",
                revision=revision,
                create_pr=create_pr,
            )


def pull(
    repo_id: str,
    local_dir: str | Path,
    revision: str | None = None,
    token: str | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Downloads a LAYER_ROPE adapter with its card and reports into a folder, in one step.

    The files are gathered in a hidden folder beside `local_dir`, checked, and moved there when all is well. After an
    interruption `local_dir` is as it was, and the same call goes on with what is still missing.

    Args:
        repo_id: `owner/name`.
        local_dir: new, empty, or an earlier pull of the same repository in which nothing was changed.
        revision: branch, tag or commit. Default: main.
        token: default: that of `hf auth login` or `HF_TOKEN`, if there is one.
        overwrite: replace whatever `local_dir` holds.

    Returns:
        `local_dir`.

    Raises:
        HubError: the Hub refuses or cannot be reached; see `hub_errors`.
        PullTargetError: `local_dir` holds something else.
        LayerRopeError: what was downloaded is no sound LAYER_ROPE adapter.
    """
    check_repo_id(repo_id)
    target = Path(local_dir).expanduser().absolute()
    _check_target(target, repo_id, overwrite)
    with hub_errors("pull", repo_id, revision):
        api = _api(token)
        commit = api.model_info(repo_id, revision=revision).sha
        gathered = _gathering_folder(target, repo_id, commit)
        # the small file first: a repository of something else is found out before its weights come
        api.hf_hub_download(repo_id, CONFIG_NAME, revision=commit, local_dir=gathered)
        _check_kind(gathered, repo_id)
        api.snapshot_download(repo_id, revision=commit, local_dir=gathered, allow_patterns=list(PUBLISHED))
    shutil.rmtree(gathered / ".cache", ignore_errors=True)  # the client's notes on the download
    try:
        check_adapter_folder(gathered)
    except LayerRopeError:
        shutil.rmtree(gathered)  # complete and bad: asking again would find the same
        raise
    record = {"repo_id": repo_id, "commit": commit, "sha256": _digests(gathered)}
    (gathered / PULL_RECORD).write_text(to_json(record, indent=2) + "\n")
    _move_into_place(gathered, target)
    return Path(local_dir)


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="peft_layerrope", library_version=__version__)


@contextmanager
def _as_folder(source: str | Path | SearchResult | PeftModel, scratch: Path) -> Iterator[Path]:
    """The adapter as a folder: its own, or one written for it."""
    if isinstance(source, (str, Path)):
        yield Path(source)
        return
    if isinstance(source, PeftModel):
        name = _adapter_name(source)
        source.save_pretrained(str(scratch), selected_adapters=[name])
        folder = scratch if name == "default" else scratch / name
        (scratch / CARD_NAME).unlink(missing_ok=True)  # PEFT's template
        yield folder
        return
    from ..searcher import SearchResult  # not needed to pull, nor the packages behind it

    if not isinstance(source, SearchResult):
        raise TypeError(f"source must be a folder, a SearchResult or a PeftModel, got {type(source).__name__}.")
    source.save(scratch)
    yield scratch


def _adapter_name(model: PeftModel) -> str:
    """Returns the LAYER_ROPE adapter that is meant: the active one, or the only one."""
    names = [name for name, config in model.peft_config.items() if isinstance(config, LayerRopeConfig)]
    active = [name for name in names if name in model.active_adapters]
    if len(active) == 1:
        return active[0]
    if len(names) == 1:
        return names[0]
    raise LayerRopeError(f"the model has LAYER_ROPE adapters {names}, none of them active: choose with set_adapter.")


def _published_card(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> Path | None:
    """Fetches the card that the repository has; None if it has none."""
    try:
        return Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision, local_dir=folder))
    except LocalEntryNotFoundError:  # of a lost connection
        raise
    except EntryNotFoundError:
        return None


def _check_target(target: Path, repo_id: str, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise PullTargetError(f"{target} exists and is not a folder.")
    if not next(parent for parent in target.parents if parent.exists()).is_dir():
        raise PullTargetError(f"{target} cannot be made: a file stands in the way.")
    if target == Path.cwd():
        raise PullTargetError(f"{target} is the working directory, which cannot be replaced: name a folder in it.")
    if overwrite or not target.is_dir() or not any(target.iterdir()):
        return
    try:
        record = json.loads((target / PULL_RECORD).read_text())
        pulled = record["repo_id"], record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise PullTargetError(
            f"{target} is not empty, and not from a pull; pass --overwrite (overwrite=True) to replace it."
        ) from None
    if pulled[0] != repo_id:
        raise PullTargetError(
            f"{target} was pulled from {pulled[0]!r}; pass --overwrite (overwrite=True) to replace it by {repo_id!r}."
        )
    present = _digests(target)
    changed = sorted(name for name in {*present, *pulled[1]} if present.get(name) != pulled[1].get(name))
    if changed:
        raise PullTargetError(
            f"{target}: {', '.join(changed[:5])} changed since the pull; --overwrite (overwrite=True) loses that."
        )


def _gathering_folder(target: Path, repo_id: str, commit: str) -> Path:
    """Where a download gathers until it is complete: the same at the next try, another for another commit."""
    key = hashlib.sha256(f"{repo_id}@{commit}".encode()).hexdigest()[:12]
    folder = target.with_name(f".{target.name}.{key}.pull")
    for stale in target.parent.glob(f".{escape(target.name)}.*.pull"):
        if stale != folder:
            shutil.rmtree(stale, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_kind(folder: Path, repo_id: str) -> None:
    try:
        kind = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type")
    except (ValueError, AttributeError):
        kind = "unreadable"
    if kind != "LAYER_ROPE":
        shutil.rmtree(folder)
        raise LayerRopeError(f"{repo_id!r} holds no LAYER_ROPE adapter: the peft_type of its {CONFIG_NAME} is {kind}.")


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != PULL_RECORD
    }


def _move_into_place(gathered: Path, target: Path) -> None:
    """Replaces `target` by `gathered`. A crash between the two steps leaves the old folder beside the new one."""
    replaced = gathered.with_name(f"{gathered.name}.replaced")
    if target.exists():
        os.replace(target, replaced)
    os.replace(gathered, target)
    shutil.rmtree(replaced, ignore_errors=True)
