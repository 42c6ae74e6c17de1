"""What of an adapter's folder goes to the Hub: checked, and free of this machine's paths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..cards.card import generated_part, model_card, with_adapter_id, with_base_model
from ..cards.merge import CARD_NAME, has_own_text, merge_data, merged, read_card
from ..demo import DEMO_NAME
from ..errors import AdapterMismatchError, LayerRopeError
from ..files.plain_yaml import parse_yaml
from ..files.strict_json import to_json
from ..loading import load_adapter_config
from ..public_names import is_local_path, is_machine_path, last_component, public_name
from ..tuner.artifacts import check_weights_file
from ..tuner.config import LayerRopeConfig

REPORT_NAME, SPECIFICATION_NAME = "search.json", "search.yaml"
PUBLISHED = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD_NAME, SPECIFICATION_NAME, REPORT_NAME, "*.png")
"""Names and patterns of the files that go to the Hub and come from it."""


class AdapterFolderError(LayerRopeError, ValueError):
    """An adapter's folder is not fit to be shared."""


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
        raise AdapterFolderError(
            f"{CONFIG_NAME} names no base model: pass base_model, its id on the Hub (--base-model)."
        )
    if public_name(name) == DEMO_NAME:
        return DEMO_NAME
    if is_local_path(name):
        raise AdapterFolderError(
            f"base model {name!r} is a folder of this machine, which nobody else can load: pass base_model, its id on "
            "the Hub (--base-model)."
        )
    if "/" not in name and base_model is None:  # what a search writes of a folder; a few old models have such ids
        raise AdapterFolderError(
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
        CardError: the published card cannot be read.
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
        raise AdapterFolderError(f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}.") from error
    if not isinstance(values, dict):
        raise AdapterFolderError(f"{path.name} must hold names and values, got {type(values).__name__}.")
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
