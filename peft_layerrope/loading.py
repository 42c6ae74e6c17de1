"""Loads models, tokenizers and adapters, with errors a person can act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import InvalidConfigError, LayerRopeError
from .files.adapter_files import AdapterFiles
from .files.untrusted import MAX_BYTES, UntrustedFileError, read_json_object
from .messages import named, one_line, shown
from .tuner.baked_record import BAKED_CONFIG_KEY
from .tuner.baking import restore_baked
from .tuner.config import LayerRopeConfig
from .tuner.registration import LAYER_ROPE

_AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM)


def load_model(
    name_or_path: str, *, device: str | None = None, dtype: str = "auto", revision: str | None = None
) -> PreTrainedModel:
    """Loads a language model, or a vision-language one, from the Hub or a folder, in `eval()` mode.

    Never runs code from the repository (`trust_remote_code` stays off) and reads safetensors only. Factors baked
    into it are applied.

    Args:
        name_or_path: Hub id or folder.
        device: `"cpu"`, `"cuda"`, ...; default: a GPU when there is one.
        dtype: `"auto"` or a torch dtype's name.
        revision: branch, tag or commit on the Hub; default: `main`.

    Raises:
        InvalidConfigError: there is no such device or dtype.
        LayerRopeError: it cannot be loaded; the message gives the reason in one line.
    """
    device = _checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _check_dtype(dtype)
    with model_errors(name_or_path):
        config = AutoConfig.from_pretrained(name_or_path, revision=revision)
        auto_class = next((c for c in _AUTO_CLASSES if type(config) in c._model_mapping), AutoModelForCausalLM)
        # by its name: only then does transformers look for the safetensors that the Hub made of other formats
        model = auto_class.from_pretrained(name_or_path, revision=revision or "main", dtype=dtype, use_safetensors=True)
    if getattr(model.config, BAKED_CONFIG_KEY, None) is not None:
        restore_baked(model)  # saved after merge_and_unload(): its weights alone know nothing of the factors
    return model.to(device).eval()


def load_tokenizer(name_or_path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer from the Hub or a folder.

    Raises:
        LayerRopeError: it cannot be loaded; the message gives the reason in one line.
    """
    with model_errors(name_or_path):
        return AutoTokenizer.from_pretrained(name_or_path, revision=revision)


def _checked_device(name: str) -> torch.device:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch: unknown, absent, not compiled in
        raise InvalidConfigError(f"device={name!r} cannot be used: {one_line(error)}") from error
    return torch.device(name)


def _check_dtype(name: str) -> None:
    dtype = getattr(torch, name, None)
    if name != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InvalidConfigError(f"dtype={name!r} is unknown, expected auto, float32, bfloat16 or float16.")


def _check_present(kind: str, name: str) -> None:
    """Of a path that cannot be a Hub id, the Hub's rules for ids would be said otherwise."""
    path = Path(name)
    if (path.is_absolute() or path.parts[:1] in ((".",), ("..",)) or len(path.parts) > 2) and not path.is_dir():
        raise LayerRopeError(f"cannot load {kind} {name!r}: there is no such folder.")


@contextmanager
def model_errors(name_or_path: str) -> Iterator[None]:
    """Turns what loading a model, its config or its tokenizer raises into a LayerRopeError of one line."""
    _check_present("model", name_or_path)
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # ImportError: a tokenizer wants a package
        raise LayerRopeError(f"cannot load model {name_or_path!r}: {one_line(error)}") from error


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
        **kwargs: further arguments of `PeftModel.from_pretrained`, such as `revision`, `subfolder` or `token`; not
            `config`, which would be from elsewhere.

    Returns:
        The model with the adapter; in `eval()` mode unless `is_trainable`.

    Raises:
        LayerRopeError: it cannot be loaded; the message gives the reason in one line.
    """
    if not isinstance(adapter, (str, Path)):
        raise InvalidConfigError(f"adapter={named(adapter)} must be a folder or a Hub id.")
    if not isinstance(model, nn.Module):
        raise InvalidConfigError(f"model={named(model)} must be a model to load the adapter onto.")
    if kwargs.get("config") is not None:
        raise InvalidConfigError("config= is not taken here: the adapter's own is read and checked.")
    download, _, _ = PeftConfig._split_kwargs(kwargs)
    files = AdapterFiles(str(adapter), download.pop("subfolder", None), download)
    with _adapter_errors(files) as kind:
        if kind is not LAYER_ROPE:
            _find_weights(files, kind)  # PEFT would fall back to a pickle
        return PeftModel.from_pretrained(model, adapter, adapter_name, **kwargs)


def load_peft_config(adapter: str) -> PeftConfig:
    """Loads the configuration of any PEFT adapter from the Hub or a folder.

    Raises:
        LayerRopeError: it cannot be loaded; the message gives the reason in one line.
    """
    with _adapter_errors(AdapterFiles(adapter)) as kind:
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(adapter)


def adapter_weights(adapter: str) -> Path:
    """Returns where an adapter's `adapter_model.safetensors` lies, fetched from the Hub if need be.

    Raises:
        LayerRopeError: there is none.
    """
    files = AdapterFiles(adapter)
    with _adapter_errors(files) as kind:
        return _find_weights(files, kind)


def load_adapter_config(adapter: str) -> LayerRopeConfig:
    """Loads the configuration of a LAYER_ROPE adapter from the Hub or a folder.

    Raises:
        LayerRopeError: it cannot be loaded, or belongs to another method.
    """
    config = load_peft_config(adapter)
    if not isinstance(config, LayerRopeConfig):
        raise LayerRopeError(f"{adapter!r} is a {config.peft_type.value} adapter, expected LAYER_ROPE.")
    return config


# What PEFT's code for any method raises when a file is not what it expects.
_PEFT_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError)


def _find_weights(files: AdapterFiles, kind: PeftType) -> Path:
    return files.find(SAFETENSORS_WEIGHTS_NAME, MAX_BYTES if kind is LAYER_ROPE else None)


@contextmanager
def _adapter_errors(files: AdapterFiles) -> Iterator[PeftType]:
    """Yields the adapter's kind, from a look at its `adapter_config.json` before PEFT reads it whatever it is."""
    adapter = files.location
    _check_present("adapter", adapter)
    if files.folder.is_dir() and not (files.folder / CONFIG_NAME).is_file():
        raise LayerRopeError(f"{str(files.folder)!r} is not an adapter folder: it has no {CONFIG_NAME}.")
    try:
        yield _peft_type(files.find(CONFIG_NAME))
    except LayerRopeError:
        raise
    except UntrustedFileError as error:
        reason = f"its {CONFIG_NAME} {error}; expected a JSON object"
        raise LayerRopeError(f"cannot load adapter {adapter!r}: {reason}.") from error
    except _PEFT_ERRORS as error:
        raise LayerRopeError(f"cannot load adapter {adapter!r}: {one_line(error)}") from error


def _peft_type(path: Path) -> PeftType:
    name = read_json_object(path).get("peft_type")
    if not isinstance(name, str) or name not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UntrustedFileError(f"has peft_type={shown(name)}, which PEFT does not know")
    return PeftType(name)
