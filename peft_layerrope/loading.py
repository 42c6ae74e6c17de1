"""Loads adapters that may come from anybody, with errors a person can act on."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from transformers import PreTrainedModel

from .errors import LayerRopeError, one_line, shown_names
from .files import MAX_BYTES, AdapterFiles, digest, is_machine_path, read_json_object
from .tuner.config import LAYER_ROPE, LayerRopeConfig
from .tuner.injection import other_tuner_layers


def check_present(kind: str, name: str) -> None:
    """Raises LayerRopeError of a path without a folder, for which the Hub would only say its rules for ids."""
    path = Path(name)
    is_path = is_machine_path(name) or name.endswith(".gguf") or len(path.parts) > 2
    if path.is_file() or (is_path and not path.is_dir()):
        missing = f"there is no such folder{' or file' * (kind == 'model')}"
        reason = "it is a file, expected a folder or a Hub id" if path.is_file() else missing
        raise LayerRopeError(f"cannot load {kind} {name!r}: {reason}.")


def why_not_loaded(name: str, error: Exception) -> str:
    """Returns in one line, without its full stop, what a library said of a model or an adapter; what it says of a name
    that no folder has is of the Hub.
    """
    here = "" if Path(name).exists() else "there is no such folder here, and of the Hub: "
    return here + one_line(error).removesuffix(".")


def load_adapter(
    model: PreTrainedModel, adapter: str | Path, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """Loads an adapter that may come from anybody: `PeftModel.from_pretrained`, which it calls, but it looks first.

    Before PEFT reads anything, the size and the form of `adapter_config.json` are checked, and that the weights are
    safetensors, so a file that is no adapter gives the same clear error as one with a wrong value. For any PEFT
    method; what is checked of a LAYER_ROPE adapter's values is the same as with `PeftModel.from_pretrained`.

    Args:
        model: as for `PeftModel.from_pretrained`.
        adapter: Hub id or folder.
        adapter_name: what it is called in the model.
        **kwargs: further arguments of `PeftModel.from_pretrained`, such as `revision`, `subfolder` or `token`.

    Returns:
        The model with the adapter; in `eval()` mode unless `is_trainable`.

    Raises:
        LayerRopeError: it cannot be loaded; the message gives the reason in one line.
    """
    download, _, _ = PeftConfig._split_kwargs(kwargs)
    files = AdapterFiles(str(adapter), download.pop("subfolder", None), download)
    with _adapter_errors(files):
        if _look(files)[0] is not LAYER_ROPE:
            files.find(SAFETENSORS_WEIGHTS_NAME, limit=None)  # PEFT would fall back to a pickle
        return PeftModel.from_pretrained(model, adapter, adapter_name, **kwargs)


def put_on(model: PreTrainedModel, adapter: str) -> PeftModel:
    """Does what [`load_adapter`] does, and raises LayerRopeError of weights that are not this model's layers'."""
    if other_tuner_layers(model):
        raise LayerRopeError(
            f"cannot load adapter {adapter!r}: it would take the place of the fine-tune that this model has beside its "
            "quantised weights."
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            peft_model = load_adapter(model, adapter)
            found = peft_model.load_adapter(adapter, "default")  # once more: this one tells what fits nowhere
            if found.missing_keys or found.unexpected_keys:
                raise RuntimeError(shown_names([*found.missing_keys, *found.unexpected_keys], 1))
        except (RuntimeError, KeyError) as error:  # of PEFT: tensors of other shapes
            raise LayerRopeError(
                f"cannot load adapter {adapter!r}: its weights do not fit this model's layers, it is of another model: "
                f"{one_line(error).removesuffix('.')}."
            ) from error
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return peft_model


def adapter_identity(adapter: str, config: PeftConfig) -> dict[str, str]:
    """Returns what an adapter does as JSON values: its kind, and a SHA-256 of its settings and of its weights."""
    values = {k: v for k, v in config.to_dict().items() if k not in ("base_model_name_or_path", "inference_mode")}

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, (set, frozenset)) else str(value)

    settings = hashlib.sha256(json.dumps(values, sort_keys=True, default=plain).encode()).hexdigest()
    return {"kind": config.peft_type.value, "config": settings, "weights": digest(adapter_weights(adapter, config))}


def load_peft_config(adapter: str) -> PeftConfig:
    """Loads the configuration of any PEFT adapter from the Hub or a folder; raises LayerRopeError, in one line."""
    files = AdapterFiles(adapter)
    with _adapter_errors(files):
        kind, values = _look(files)
        if kind is LAYER_ROPE:
            return LayerRopeConfig.from_values(values, files)
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(adapter)


def adapter_weights(adapter: str, config: PeftConfig) -> Path:
    """Returns where the weights lie of an adapter with this config, fetched from the Hub if need be; raises
    LayerRopeError if it has none.
    """
    files = AdapterFiles(adapter)
    with _adapter_errors(files):
        return files.find(SAFETENSORS_WEIGHTS_NAME, MAX_BYTES if isinstance(config, LayerRopeConfig) else None)


def load_adapter_config(adapter: str) -> LayerRopeConfig:
    """Does what [`load_peft_config`] does, and raises LayerRopeError of another method's."""
    config = load_peft_config(adapter)
    if not isinstance(config, LayerRopeConfig):
        raise LayerRopeError(f"{adapter!r} is a {config.peft_type.value} adapter, expected LAYER_ROPE.")
    return config


# What PEFT's code for any method raises when a file is not what it expects.
_PEFT_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError)


@contextmanager
def _adapter_errors(files: AdapterFiles) -> Iterator[None]:
    check_present("adapter", files.location)
    try:
        yield
    except LayerRopeError:
        raise
    except _PEFT_ERRORS as error:
        reason = why_not_loaded(files.location, error)
        raise LayerRopeError(f"cannot load adapter {files.location!r}: {reason}.") from error


def _look(files: AdapterFiles) -> tuple[PeftType, dict[str, Any]]:
    """The adapter's kind, and what its `adapter_config.json` holds, before PEFT reads it whatever it is."""
    path = files.find(CONFIG_NAME)
    try:
        values = read_json_object(path)
        return PeftType(values.get("peft_type")), values
    except ValueError as error:
        raise LayerRopeError(
            f"cannot load adapter {files.location!r}: its {CONFIG_NAME} must hold a JSON object with a peft_type that "
            f"PEFT knows: {one_line(error)}."
        ) from error
