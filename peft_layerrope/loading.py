"""Loads models, tokenizers and adapters for the command line, with errors a person can act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .baked_record import BAKED_CONFIG_KEY
from .baking import restore_baked
from .config import LayerRopeConfig
from .errors import LayerRopeError

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
        revision: branch, tag or commit on the Hub.

    Raises:
        LayerRopeError: it cannot be loaded; the message gives the reason in one line.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _model_errors(name_or_path):
        config = AutoConfig.from_pretrained(name_or_path, revision=revision)
        auto_class = next((c for c in _AUTO_CLASSES if type(config) in c._model_mapping), AutoModelForCausalLM)
        model = auto_class.from_pretrained(name_or_path, revision=revision, dtype=dtype, use_safetensors=True)
    if getattr(model.config, BAKED_CONFIG_KEY, None) is not None:
        restore_baked(model)  # saved after merge_and_unload(): its weights alone know nothing of the factors
    return model.to(device).eval()


def load_tokenizer(name_or_path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer from the Hub or a folder.

    Raises:
        LayerRopeError: it cannot be loaded; the message gives the reason in one line.
    """
    with _model_errors(name_or_path):
        return AutoTokenizer.from_pretrained(name_or_path, revision=revision)


@contextmanager
def _model_errors(name_or_path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise LayerRopeError(f"cannot load model {name_or_path!r}: {_first_line(error)}") from error


def load_adapter(model: PreTrainedModel, adapter: str) -> PeftModel:
    """Loads a LAYER_ROPE adapter (or any PEFT adapter) from the Hub or a folder onto `model`.

    Raises:
        LayerRopeError: it cannot be loaded; the message gives the reason in one line.
    """
    with _adapter_errors(adapter):
        return PeftModel.from_pretrained(model, adapter).eval()


def load_adapter_config(adapter: str) -> LayerRopeConfig:
    """Loads the configuration of a LAYER_ROPE adapter from the Hub or a folder.

    Raises:
        LayerRopeError: it cannot be loaded, or belongs to another method.
    """
    with _adapter_errors(adapter):
        config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, LayerRopeConfig):
        raise LayerRopeError(f"{adapter!r} is a {config.peft_type.value} adapter, expected LAYER_ROPE.")
    return config


@contextmanager
def _adapter_errors(adapter: str) -> Iterator[None]:
    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
        raise LayerRopeError(f"{adapter!r} is not an adapter folder: it has no adapter_config.json.")
    try:
        yield
    except LayerRopeError:
        raise
    except (OSError, ValueError) as error:
        raise LayerRopeError(f"cannot load adapter {adapter!r}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
