"""Adapters on the Hugging Face Hub: what may be pushed, pushing and pulling, and errors in plain words."""

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
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that this version of the client has
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_token, validate_repo_id
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from . import __version__
from .cards import (
    CARD_NAME,
    REPORT_NAME,
    SPECIFICATION_NAME,
    generated_part,
    has_own_text,
    merge_data,
    merged,
    model_card,
    read_card,
    with_adapter_id,
    with_base_model,
)
from .errors import AdapterMismatchError, HubError, InvalidConfigError, LayerRopeError
from .files import parse_yaml, to_json
from .loading import load_adapter_config
from .messages import DEMO_NAME, is_local_path, is_machine_path, last_component, public_name
from .tuner.artifacts import check_weights_file
from .tuner.config import LayerRopeConfig

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def check_repo_id(repo_id: str) -> None:
    """Raises InvalidConfigError unless `repo_id` is `name` or `owner/name` as the Hub allows."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InvalidConfigError(
            f"repo_id={repo_id!r} is no id of the Hub, such as owner/name: {_line(error)}"
        ) from error


@contextmanager
def hub_errors(action: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turns the Hub client's errors into ours.

    Args:
        action: what is being done, for messages: "pull", "push to".
        repo_id: the repository.
        revision: of it; None: main.
    """
    what = f"cannot {action} {repo_id!r}"
    try:
        yield
    except LayerRopeError:  # says what is wrong already
        raise
    except GatedRepoError as error:
        raise HubError(f"{what}: it is gated; ask for access on its page, and {_LOG_IN}.") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{what}: there is no such repository, or it is private: {_LOG_IN}.") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{what}: it has no revision {revision or 'main'!r}.") from error
    except LocalTokenNotFoundError as error:
        raise HubError(f"{what}: you are not logged in; {_LOG_IN}.") from error
    except OfflineModeIsEnabled as error:
        raise _unreachable(what, error) from error
    except LocalEntryNotFoundError as error:  # "not in the cache", because of what happened before
        raise _unreachable(what, error.__cause__ or error) from error
    except EntryNotFoundError as error:
        raise HubError(f"{what}: it has no {str(error.response.url).rsplit('/', 1)[-1]}.") from error
    except HfHubHTTPError as error:
        raise _of_status(what, error) from error
    except HTTPError as error:
        raise _unreachable(what, error) from error
    except (OSError, ValueError) as error:  # a full disk, a card that the Hub refuses
        raise HubError(f"{what}: {_line(error)}") from error


def _unreachable(what: str, error: BaseException) -> HubError:
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(f"{what}: HF_HUB_OFFLINE is set; unset it to go online.")
    if isinstance(error, HfHubHTTPError):
        return _of_status(what, error)
    return HubError(f"{what}: no connection to the Hub ({_line(error)}).")


def _of_status(what: str, error: HfHubHTTPError) -> HubError:
    status, said = error.response.status_code, error.server_message
    reason = " ".join(str(said).split())[:200] if said else _line(error)
    if status == 401:
        return HubError(
            f"{what}: there is no such repository, it is private, or the Hub does not accept your login: {_LOG_IN}."
        )
    if status == 403:
        return HubError(f"{what}: your token may not do this ({reason}); use one that can write there.")
    if status >= 500 or status in (408, 429):
        return HubError(f"{what}: the Hub answered {status}, also when asked again; try later ({reason}).")
    return HubError(f"{what}: the Hub answered {status}: {reason}")


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


PUBLISHED = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD_NAME, SPECIFICATION_NAME, REPORT_NAME, "*.png")
"""Names and patterns of the files that go to the Hub and come from it."""


def check_adapter_folder(folder: Path) -> LayerRopeConfig:
    """Returns the configuration of the LAYER_ROPE adapter in a folder, after a check of both its files.

    Raises:
        LayerRopeError: a file is missing or unreadable, of another method, or the two disagree.
    """
    config = load_adapter_config(str(folder))
    if config.layer_factors is None:
        raise AdapterMismatchError(f"{folder / CONFIG_NAME} has no layer_factors.")
    check_weights_file(folder / SAFETENSORS_WEIGHTS_NAME, config.layer_factors)
    return config


def stage(folder: Path, target: Path, *, base_model: str | None = None, license: str | None = None) -> None:
    """Copies what may be published of `folder` into `target`, an empty folder; `folder` stays as it is.

    The card gets the metadata that the adapter's files know, or is made where there is none.

    Args:
        folder: an adapter.
        target: an empty folder.
        base_model: the base model's id on the Hub; None: what `adapter_config.json` says.
        license: the adapter's licence, such as `"apache-2.0"`; None: what the card says.

    Raises:
        LayerRopeError: the adapter is unfit, its base model is known by a local path only, or a file is unreadable.
    """
    config = check_adapter_folder(folder)
    for pattern in PUBLISHED:
        for path in folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
    name = _public_base_model(config, base_model)
    _rewrite_json(target / CONFIG_NAME, {"base_model_name_or_path": name})
    _clean_report(target / REPORT_NAME, base_model)
    _clean_specification(target / SPECIFICATION_NAME, base_model)
    _complete_card(target, config, name, license)


def _public_base_model(config: LayerRopeConfig, base_model: str | None) -> str:
    name = base_model or config.base_model_name_or_path
    if not name:
        raise InvalidConfigError(
            f"{CONFIG_NAME} names no base model: pass base_model, its id on the Hub (--base-model)."
        )
    if public_name(name) == DEMO_NAME:
        return DEMO_NAME
    if is_local_path(name):
        raise InvalidConfigError(
            f"base model {name!r} is a folder of this machine, which nobody else can load: pass base_model, its id on "
            "the Hub (--base-model)."
        )
    if "/" not in name and base_model is None:  # what a search writes of a folder; a few old models have such ids
        raise InvalidConfigError(
            f"base model {name!r} has no owner, so it may be a folder's name: pass base_model, its id on the Hub "
            "(--base-model)."
        )
    return name


def _complete_card(target: Path, config: LayerRopeConfig, base_model: str, license: str | None) -> None:
    files = {path.name for path in target.iterdir()}
    generated = model_card(base_model, config, files=files)
    card = read_card(target / CARD_NAME)
    if card is None:
        card = generated
    elif generated_part().search(card.text):  # written by the search, which knew more than the files say
        merge_data(card.data, generated.data)
        card.text = with_base_model(card.text, base_model)
    else:
        card = merged(card, generated)
    if license is not None:
        card.data.license = license
    card.save(target / CARD_NAME)


def address_card(target: Path, repo_id: str, published: Path | None) -> None:
    """Puts the repository's id into the snippets of a staged card, and the staged card into the published one.

    Args:
        target: folder of the staged card.
        repo_id: where it goes.
        published: the card that the repository has. What its owner wrote there, on the Hub perhaps, stays, unless
            something was written in the staged card: then that is the newer one.

    Raises:
        InvalidConfigError: the published card cannot be read.
    """
    card = read_card(target / CARD_NAME)
    existing = read_card(published) if published is not None else None
    if existing is not None and not has_own_text(card):
        licensed = card.data.license
        card = merged(existing, card)
        card.data.license = licensed or card.data.license
    ModelCard(with_adapter_id(card.content, repo_id)).save(target / CARD_NAME)


def _clean_report(path: Path, base_model: str | None) -> None:
    if path.is_file():
        _rewrite_json(path, {"model": base_model} if base_model else {})


def _clean_specification(path: Path, base_model: str | None) -> None:
    """Paths in `search.yaml` repeat the search on this machine only; their last component says what they were."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    values = _parsed(path, parse_yaml, text)
    named = base_model and values.get("model") is not None
    clean = _without_paths({**values, "model": base_model} if named else values)
    if clean != values:
        head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        path.write_text(head + yaml.safe_dump(clean, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _rewrite_json(path: Path, changes: dict[str, Any]) -> None:
    values = _parsed(path, json.loads, path.read_text(encoding="utf-8"))
    clean = _without_paths({**values, **changes})
    if clean != values:
        path.write_text(to_json(clean, indent=2) + "\n", encoding="utf-8")


def _parsed(path: Path, parse: Any, text: str) -> dict[str, Any]:
    try:
        values = parse(text)
    except (ValueError, yaml.YAMLError) as error:
        raise InvalidConfigError(f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}.") from error
    if not isinstance(values, dict):
        raise InvalidConfigError(f"{path.name} must hold names and values, got {type(values).__name__}.")
    return values


def _without_paths(value: Any, key: str | None = None) -> Any:
    """Returns a copy in which each path has become its last component, and the model's its public name."""
    if isinstance(value, dict):
        return {name: _without_paths(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if key in ("model", "tokenizer", "peft"):
        return public_name(value)
    return last_component(value) if is_machine_path(value) else value


if TYPE_CHECKING:
    from .searcher import SearchResult

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
                raise HubError(f"cannot push to {repo_id!r}: you are not logged in; use `hf auth login`.")
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
        InvalidConfigError: `local_dir` holds something else.
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
    from .searcher import SearchResult

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
        raise InvalidConfigError(f"{target} exists and is not a folder.")
    if not next(parent for parent in target.parents if parent.exists()).is_dir():
        raise InvalidConfigError(f"{target} cannot be made: a file stands in the way.")
    if target == Path.cwd():
        raise InvalidConfigError(f"{target} is the working directory, which cannot be replaced: name a folder in it.")
    if overwrite or not target.is_dir() or not any(target.iterdir()):
        return
    try:
        record = json.loads((target / PULL_RECORD).read_text())
        pulled = record["repo_id"], record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InvalidConfigError(
            f"{target} is not empty, and not from a pull; pass --overwrite (overwrite=True) to replace it."
        ) from None
    if pulled[0] != repo_id:
        raise InvalidConfigError(
            f"{target} was pulled from {pulled[0]!r}; pass --overwrite (overwrite=True) to replace it by {repo_id!r}."
        )
    present = _digests(target)
    changed = sorted(name for name in {*present, *pulled[1]} if present.get(name) != pulled[1].get(name))
    if changed:
        raise InvalidConfigError(
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
