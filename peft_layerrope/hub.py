"""Adapters on the Hugging Face Hub: what may be pushed, pushing, and pulling."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from . import __version__, cards
from .errors import AdapterMismatchError, HubError, InvalidConfigError, LayerRopeError, named, one_line, shown
from .files import (
    DEMO_NAME,
    MAX_BYTES,
    digest,
    is_local_path,
    is_machine_path,
    last_component,
    parse_yaml,
    public_name,
    read_json_object,
    replacing_files,
    to_json,
    write_atomically,
)
from .loading import load_adapter_config
from .tuner.artifacts import check_no_model, check_weights_file
from .tuner.config import LayerRopeConfig

PUBLISHED = {
    CONFIG_NAME: MAX_BYTES,
    SAFETENSORS_WEIGHTS_NAME: MAX_BYTES,
    cards.CARD_NAME: 2**18,
    cards.SPECIFICATION_NAME: 2**20,
    cards.REPORT_NAME: 2**26,
    cards.ACCURACY_PLOT: 2**24,
    cards.FACTORS_PLOT: 2**24,
    cards.HARM_PLOT: 2**24,
}
"""The files that go to the Hub and come from it, with the most bytes that each may have."""

PULL_RECORD = ".layerrope-pull.json"
"""In a pulled folder: where it is from, and what was in it, so that a later pull knows what it may replace."""

_MODELS = ("model", "tokenizer", "peft", "base_model_name_or_path")  # fields with a name of the Hub, or a path
_FILES, _DATASETS = ("data", "text"), "datasets:"  # fields with a path, relative perhaps, or `datasets:NAME`


def push_to_hub(
    source: str | Path | PeftModel,
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

    `adapter_config.json`, `adapter_model.safetensors`, `README.md`, `search.json`, `search.yaml` and the search's three
    plots go up, and nothing else of a folder. They are checked before anything is sent. The repository is made if there
    is none. What people wrote in the card that it has stays, unless `source` is a folder in whose card something was
    written.

    Args:
        source: an adapter's folder, or a PeftModel with a LAYER_ROPE adapter.
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
        LayerRopeError: the adapter is not fit to be shared, or its card not for the Hub; the message says why.
        HTTPError, OSError: the Hub refuses or cannot be reached: `huggingface_hub.errors`, such as `HfHubHTTPError`.
    """
    check_repo_id("repo_id", repo_id)
    if base_model is not None:
        check_repo_id("base_model", base_model)
    with _as_folder(source) as folder:
        config = load_adapter_config(str(folder))
        names = sorted(PUBLISHED.keys() & {path.name for path in folder.iterdir()})
        files = {name: _read(folder / name, PUBLISHED[name]) for name in names}
        own_card = cards.read_card(folder / cards.CARD_NAME)
        _check_adapter(folder, config)
    base_model = _public_base_model(config, base_model)
    _clean(files, CONFIG_NAME, json.loads, {"base_model_name_or_path": base_model})
    _clean(files, cards.REPORT_NAME, json.loads, {"model": base_model})
    _clean(files, cards.SPECIFICATION_NAME, parse_yaml, {"model": base_model})

    api = _api(token or True)  # which asks for a login before anything is sent
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    card = cards.merged(own_card, cards.model_card(base_model, config, files=files, adapter=repo_id, earlier=own_card))
    licensed = license or card.data.license
    info = api.model_info(repo_id, revision=revision, files_metadata=True)
    published = _fetch(api, info, cards.CARD_NAME)
    if published is not None and not cards.has_own_text(own_card):  # else what was written here is the newer one
        card = cards.merged(cards.read_card(published), card)
    card.data.license = licensed or card.data.license
    files[cards.CARD_NAME] = str(card).encode()
    # what an earlier adapter's search wrote would be taken for this one's
    earlier = PUBLISHED.keys() & {sibling.rfilename for sibling in info.siblings} - files.keys()
    try:
        return api.create_commit(  # not upload_folder, which may make several
            repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *map(CommitOperationDelete, sorted(earlier)),
            ],
            commit_message=commit_message or "Upload LAYER_ROPE adapter",
            revision=revision,
            create_pr=create_pr,
        )
    except ValueError as error:
        reason = one_line(" ".join(str(error).split()))
        raise HubError(f"the Hub refuses what was sent to {repo_id!r}: {reason}") from error


def pull(
    repo_id: str,
    local_dir: str | Path,
    revision: str | None = None,
    token: str | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Downloads a LAYER_ROPE adapter with its card and reports into a folder, in one step.

    The files come by the Hub client's cache, are checked there, and are copied when all is well. After an interruption
    `local_dir` is as it was, and the same call goes on with what is still missing.

    Args:
        repo_id: `owner/name`.
        local_dir: created if missing; of an earlier pull of the same repository what was not changed is replaced, and
            all other files stay.
        revision: branch, tag or commit. Default: main.
        token: default: that of `hf auth login` or `HF_TOKEN`, if there is one.
        overwrite: replace files of these names, whosever they are.

    Returns:
        `local_dir`.

    Raises:
        InvalidConfigError: `local_dir` holds a model, or such files that are not from an earlier pull, or were changed.
        LayerRopeError: the repository holds no sound LAYER_ROPE adapter.
        HTTPError, OSError: the Hub refuses or cannot be reached: `huggingface_hub.errors`, such as `HfHubHTTPError`;
            or a file cannot be written.
    """
    check_repo_id("repo_id", repo_id)
    target = Path(local_dir).expanduser()
    check_no_model(target)
    if not overwrite:
        _check_nothing_is_lost(target, repo_id)
    api = _api(token)
    info = api.model_info(repo_id, revision=revision, files_metadata=True)
    # the small file first: a repository of something else is found out before its weights come
    snapshot = _fetch(api, info, CONFIG_NAME).parent
    config = load_adapter_config(str(snapshot))
    found = [path for name in PUBLISHED if (path := _fetch(api, info, name)) is not None]
    _check_adapter(snapshot, config)
    with replacing_files(target, last=CONFIG_NAME) as staging:
        for path in found:
            shutil.copyfile(path, staging / path.name)
        record = {"repo_id": repo_id, "commit": info.sha, "sha256": {path.name: digest(path) for path in found}}
        # a pull that is killed from here on leaves some of these
        _write_record(target, {**record, "replaced": _pulled(target, repo_id)})
        for name in PUBLISHED.keys() - {path.name for path in found}:
            (target / name).unlink(missing_ok=True)
    _write_record(target, record)
    return target


def check_repo_id(name: str, repo_id: str) -> None:
    """Raises InvalidConfigError unless the argument `name` is `name` or `owner/name` as the Hub allows."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InvalidConfigError(
            f"{name}={shown(repo_id)} is no id of the Hub, such as owner/name: {one_line(error)}"
        ) from error


def _api(token: str | bool | None) -> HfApi:
    return HfApi(token=token, library_name="peft_layerrope", library_version=__version__)


def _fetch(api: HfApi, info: ModelInfo, name: str) -> Path | None:
    """Where a file of a commit lies in the client's cache, downloaded if need be; None where the commit has none."""
    size = {file.rfilename: file.size for file in info.siblings}.get(name)
    if size is None and name not in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        return None
    if size is None or size > PUBLISHED[name]:
        raise HubError(f"{info.id!r} has no {name} of at most {PUBLISHED[name]:,} bytes.")
    return Path(api.hf_hub_download(info.id, name, revision=info.sha))


def _check_adapter(folder: Path, config: LayerRopeConfig) -> None:
    if config.layer_factors is None:
        raise AdapterMismatchError(f"{folder / CONFIG_NAME} has no layer_factors.")
    check_weights_file(folder / SAFETENSORS_WEIGHTS_NAME, config.layer_factors)


# pushing


@contextmanager
def _as_folder(source: str | Path | PeftModel) -> Iterator[Path]:
    """The adapter as a folder: its own, or one written for it."""
    if isinstance(source, (str, Path)):
        yield Path(source)
        return
    if not isinstance(source, PeftModel):
        raise LayerRopeError(
            f"source={named(source)} must be an adapter's folder or a PeftModel; what search returns has a push_to_hub "
            "of its own."
        )
    with TemporaryDirectory(prefix="layerrope-") as scratch:
        folder = Path(scratch)
        name = _adapter_name(source)
        source.save_pretrained(scratch, selected_adapters=[name])
        (folder / cards.CARD_NAME).unlink(missing_ok=True)  # PEFT's template
        yield folder if name == "default" else folder / name


def _adapter_name(model: PeftModel) -> str:
    """The LAYER_ROPE adapter that is meant: the active one, or the only one."""
    names = [name for name, config in model.peft_config.items() if isinstance(config, LayerRopeConfig)]
    active = [name for name in names if name in model.active_adapters] or names
    if len(active) != 1:
        raise LayerRopeError(f"the model has LAYER_ROPE adapters {names}: choose one with set_adapter.")
    return active[0]


def _read(path: Path, limit: int) -> bytes:
    """The content of a file that may be published. A link may lead to what is private."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > limit:
        raise InvalidConfigError(f"{path} must be a file of at most {limit:,} bytes, and no link to one.")
    return path.read_bytes()


def _public_base_model(config: LayerRopeConfig, base_model: str | None) -> str:
    """The name under which others can load the base model.

    Without an owner it may be what a search writes of a folder; a few old models have such ids, which have to be meant.
    """
    name = base_model or config.base_model_name_or_path or ""
    if public_name(name) == DEMO_NAME:
        return DEMO_NAME
    if base_model is None and (is_local_path(name) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII)):
        raise InvalidConfigError(
            f"base model {shown(name)} of {CONFIG_NAME} is no id owner/name of the Hub, by which others could load it: "
            "pass base_model (--base-model), its id."
        )
    return name


def _clean(files: dict[str, bytes], name: str, parse: Any, facts: dict[str, str]) -> None:
    """Leaves of the paths in a file their last components: they mean something on this machine only."""
    if name not in files:
        return
    try:
        text = files[name].decode("utf-8")
        values = parse(text)
        known = {key: value for key, value in facts.items() if values.get(key) is not None or name == CONFIG_NAME}
        clean = _without_paths({**values, **known})
        if clean == values:
            return
        if parse is json.loads:
            text = to_json(clean, indent=2) + "\n"
        else:
            head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
            text = head + yaml.safe_dump(clean, sort_keys=False, allow_unicode=True)
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        reason = one_line(" ".join(str(error).split())).rstrip(".")
        raise InvalidConfigError(f"{name} cannot be read as names and values: {reason}.") from error
    files[name] = text.encode("utf-8")


def _without_paths(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _without_paths(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner, key) for inner in value]
    if not isinstance(value, str) or key == "system_prompt":  # which may begin with `/no_think`
        return value
    if key in _MODELS:
        return public_name(value)
    if value.startswith(_DATASETS):
        return _DATASETS + _without_paths(value.removeprefix(_DATASETS))
    return last_component(value) if key in _FILES or is_machine_path(value) else value


# pulling


def _check_nothing_is_lost(target: Path, repo_id: str) -> None:
    """Refuses to replace what a pull of this repository could not bring back."""
    known = _pulled(target, repo_id)
    there = [name for name in PUBLISHED if (target / name).exists()]
    changed = [name for name in there if digest(target / name) not in known.get(name, ())]
    if changed:
        raise InvalidConfigError(
            f"{target}: {', '.join(changed)} not from a pull of {repo_id!r}, or changed since; overwrite replaces them."
        )


def _pulled(target: Path, repo_id: str) -> dict[str, list[str]]:
    """By name, the digests that files from this repository may have: several where a pull did not end."""
    try:
        record = read_json_object(target / PULL_RECORD)
    except ValueError:
        return {}
    if record.get("repo_id") != repo_id:
        return {}
    parts = record.get("sha256"), record.get("replaced")
    known, replaced = (part if isinstance(part, dict) else {} for part in parts)
    before = {name: digests for name, digests in replaced.items() if isinstance(digests, list)}
    return {name: [known.get(name), *before.get(name, ())] for name in PUBLISHED}


def _write_record(target: Path, record: dict[str, Any]) -> None:
    write_atomically(target / PULL_RECORD, to_json(record, indent=2) + "\n")
