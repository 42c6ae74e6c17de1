"""The base model: where it lies, how it is loaded, and the fine-tune that is put onto it before anything else."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import peft
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from pydantic import Field
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import quantization_config as quantizations

from . import __version__
from .declaration import declared, option
from .errors import InvalidConfigError, LayerRopeError, one_line, shown
from .files import demo_model_path, is_machine_path, public_name
from .loading import adapter_identity, adapter_weights, check_present, load_peft_config, put_on, why_not_loaded
from .tuner.config import LayerRopeConfig
from .tuner.frequencies import inv_freq_names, is_length_dependent
from .tuner.injection import BAKED_CONFIG_KEY, restore_baked
from .tuner.sites import embedding_table

_AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM)
_VOCABULARIES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "spiece*")
_RECORD = "_layerrope_loading"
_GGUF_MAGIC = b"GGUF"
_SAID_ELSEWHERE = ("model", "dtype", "device", "device_map", "peft")  # of a report, or not what a model depends on

_model = partial(option, panel="Model")


@declared(InvalidConfigError)
class ModelSource:
    """Which model, and how it is loaded. What is no option of its own is a key of `--model-args`."""

    model: Annotated[str | None, Field(description="Hub id, folder or GGUF file. Default: the demo model.")] = None
    device: Annotated[str | None, _model("cpu, cuda ... Default: a GPU if there is one.")] = None
    dtype: Annotated[str, _model("auto, float32, bfloat16 ...")] = "auto"
    tokenizer: Annotated[str | None, _model("Hub id or folder of the tokenizer. Default: the model's own.")] = None
    gguf_file: Annotated[
        str | None, _model("A GGUF file in the model's folder or repository; its weights are unpacked.")
    ] = None
    revision: Annotated[str | None, Field(description="Branch, tag or commit on the Hub.")] = None
    subfolder: Annotated[str | None, Field(description="Of the model's folder or repository.")] = None
    attn_implementation: Annotated[str | None, Field(description="eager, sdpa, flash_attention_2 ...")] = None
    device_map: Annotated[str | None, Field(description="auto, cpu, cuda:1 ..., instead of device.")] = None
    load_in_4bit: Annotated[bool, Field(description="Quantise by bitsandbytes.")] = False
    load_in_8bit: Annotated[bool, Field(description="Quantise by bitsandbytes.")] = False
    bnb_4bit_quant_type: Annotated[Literal["fp4", "nf4"] | None, Field(description="Default: fp4.")] = None
    bnb_4bit_compute_dtype: Annotated[str | None, Field(description="Default: float32.")] = None
    trust_remote_code: Annotated[bool, Field(description="Run code from the model's repository.")] = False
    peft: Annotated[
        str | None, Field(description="Hub id or folder of a LoRA, or another adapter, that belongs to the base.")
    ] = None

    def __post_init__(self) -> None:
        is_file, in_folder = str(self.model).endswith(".gguf"), self.gguf_file is not None
        needs_4bit = bool(self.bnb_4bit_quant_type or self.bnb_4bit_compute_dtype)
        for holds, text in (
            (self.load_in_4bit and self.load_in_8bit, "load_in_4bit and load_in_8bit contradict each other"),
            (self.is_quantized and (is_file or in_folder), "load_in_4bit, load_in_8bit: GGUF is quantised already"),
            (self.device and self.device_map, "device and device_map both say where the model goes"),
            (needs_4bit and not self.load_in_4bit, "bnb_4bit_quant_type, bnb_4bit_compute_dtype need load_in_4bit"),
            (in_folder and (is_file or not self.model), "gguf_file is a file in the folder or repository of the model"),
        ):
            if holds:
                raise InvalidConfigError(f"{text}, got {format_model_args(self)}.")

    @property
    def is_quantized(self) -> bool:
        """Whether bitsandbytes is to quantise the weights."""
        return self.load_in_4bit or self.load_in_8bit


def load_model(model: str | None = None, **model_args: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a language model, or the language model's half of a vision-language one, with its tokenizer.

    Reads safetensors and GGUF files only. Factors that were baked into the model are applied.

    Args:
        model: Hub id, folder, or a GGUF file. Default: the demo model.
        **model_args: the other fields of `ModelSource`, by the names that lm-eval gives them: `device` or `device_map`,
            `dtype`, `tokenizer`, `gguf_file`, `revision`, `subfolder`, `attn_implementation`, `load_in_4bit` or
            `load_in_8bit`, `bnb_4bit_quant_type`, `bnb_4bit_compute_dtype`, `trust_remote_code`, and `peft`: your own
            LoRA, or another adapter but LAYER_ROPE, which is merged into the weights, or stays beside them, active,
            where those are quantised.

    Returns:
        The model, in `eval()` mode, and its tokenizer.

    Raises:
        InvalidConfigError: an unknown name, a value that cannot work, or two that contradict each other.
        LayerRopeError: something cannot be loaded; the message gives the reason in one line.

    Example:
    ```py
    >>> model, tokenizer = load_model("Qwen/Qwen3-8B", dtype="bfloat16", peft="my-lora")
    ```
    """
    source = ModelSource(model, **model_args)
    check_source(source)
    tokenizer = load_tokenizer(source)
    return load_base(source), tokenizer


def parse_model_args(text: str) -> dict[str, Any]:
    """Reads `key=value,key=value`, as lm-eval spells arguments: fields of [`ModelSource`], not checked yet."""
    values: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, value = part.partition("=")
        name = "model" if name == "pretrained" else name  # as lm-eval calls it
        if not value or name in values:
            problem = "is given twice" if value else "has no value, expected key=value,key=value"
            raise InvalidConfigError(f"model_args: {shown(part)} {problem}.")
        values[name] = {"true": True, "false": False}.get(value.lower(), value)
    return values


def format_model_args(source: ModelSource) -> str | None:
    """Returns how a model is loaded as [`parse_model_args`] reads it, without its name, its device, and the folders of
    this machine; None where all is as usual.
    """
    parts = []
    for field in fields(ModelSource):
        value = getattr(source, field.name)
        if field.name not in ("model", "device") and value != field.default:
            text = str(value).lower() if value is True else str(value)
            parts.append(f"{field.name}={public_name(text) if is_machine_path(text) else text}")
    return ",".join(parts) or None


def check_source(source: ModelSource) -> None:
    """Looks whether a model can be loaded, as far as that is known without loading it; raises LayerRopeError, in one
    line, also of a fine-tune that cannot be put under a LAYER_ROPE adapter.
    """
    _checked_device(source)
    for name, dtype in (("dtype", source.dtype), ("bnb_4bit_compute_dtype", source.bnb_4bit_compute_dtype or "auto")):
        known = getattr(torch, dtype, None)
        if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
            raise InvalidConfigError(f"{name}={dtype!r} is unknown, expected auto, float32, bfloat16 or float16.")
    if source.is_quantized and find_spec("bitsandbytes") is None:
        raise InvalidConfigError("load_in_4bit, load_in_8bit need bitsandbytes: pip install bitsandbytes.")
    _place(source)
    if source.tokenizer is not None:
        check_present("tokenizer", source.tokenizer)
    if source.peft is not None:
        config = load_peft_config(source.peft)
        if isinstance(config, LayerRopeConfig) or config.is_prompt_learning:
            raise InvalidConfigError(
                f"peft={source.peft!r} is a {config.peft_type.value} adapter, expected a fine-tune of the weights: "
                "factors are passed as an adapter, and virtual tokens would shift every position."
            )
        adapter_weights(source.peft, config)


def load_config(source: ModelSource) -> PretrainedConfig:
    """Loads a model's config, from its `config.json` or its GGUF file; raises LayerRopeError, in one line."""
    with _loading(source) as (name, where):
        return AutoConfig.from_pretrained(name, **where, trust_remote_code=source.trust_remote_code)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer; raises LayerRopeError, in one line."""
    with _loading(source) as (name, where):
        if source.tokenizer is not None:
            name, where = source.tokenizer, {}
        folder = Path(name, where.get("subfolder") or "")
        if folder.is_dir() and "gguf_file" not in where and not any(any(folder.glob(kind)) for kind in _VOCABULARIES):
            raise LayerRopeError(
                f"cannot load tokenizer {name!r}: the folder has no tokenizer files, such as tokenizer.json; pass a "
                "tokenizer, the folder or Hub id of one that has them."
            )
        return AutoTokenizer.from_pretrained(name, **where, trust_remote_code=source.trust_remote_code)


def _auto_class(config: PretrainedConfig) -> type:
    return next((c for c in _AUTO_CLASSES if type(config) in c._model_mapping), AutoModelForCausalLM)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Returns the model of a config, which is copied, without memory for weights: all is on the `meta` device."""
    with torch.device("meta"):
        return _auto_class(config).from_config(copy.deepcopy(config))


def load_base(source: ModelSource) -> PreTrainedModel:
    """Loads a model with its fine-tune, in `eval()` mode; raises LayerRopeError, in one line."""
    device, config = _checked_device(source), load_config(source)
    with _loading(source) as (name, where):
        arguments: dict[str, Any] = {"dtype": source.dtype, "trust_remote_code": source.trust_remote_code, **where}
        if source.attn_implementation is not None:
            arguments["attn_implementation"] = source.attn_implementation
        if source.is_quantized:
            names = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype")
            given = {name: getattr(source, name) for name in names if getattr(source, name)}
            arguments["quantization_config"] = BitsAndBytesConfig(**given)
        if "gguf_file" not in where:
            # the revision by its name: only then does transformers look for the safetensors that the Hub made of others
            arguments |= {"use_safetensors": True, "revision": source.revision or "main"}
        elif hasattr(quantizations, "GgufConfig"):  # newer transformers may leave weights packed, older ones never do
            arguments["quantization_config"] = quantizations.GgufConfig(dequantize=True)
        if source.device_map is not None or source.is_quantized:  # quantised weights cannot be moved afterwards
            arguments["device_map"] = source.device_map or {"": device}
        model = _auto_class(config).from_pretrained(name, **arguments)
    if getattr(model.config, BAKED_CONFIG_KEY, None) is not None:
        restore_baked(model)  # saved after merge_and_unload(): its weights alone know nothing of the factors
    if "device_map" not in arguments:
        model = model.to(device)
    record = _given(source)
    if source.peft is not None:
        model, record["peft"] = _fine_tuned(model, source.peft, merge=not source.is_quantized)
    setattr(model, _RECORD, record)
    return model.eval()


def describe_loading(model: nn.Module) -> dict[str, Any]:
    """Returns how a model was loaded, without this machine's paths: its dtype, and what `load_model` was asked for."""
    dtype = str(embedding_table(model).dtype).removeprefix("torch.")
    return {"dtype": dtype, **getattr(model, _RECORD, {})}


def is_emulated(model: nn.Module) -> bool:
    """Whether a model of 16-bit numbers is on a CPU without instructions for them, where its matrix products take many
    times as long as in float32: PyTorch's kernels for bfloat16 begin with AVX-512.
    """
    table = embedding_table(model)
    is_short = table.dtype in (torch.bfloat16, torch.float16)
    return is_short and table.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def model_name(model: nn.Module) -> str:
    """Returns the model's Hub id, or a name without the path for one loaded from a folder."""
    return public_name(model.config._name_or_path or type(model).__name__)


def _given(source: ModelSource) -> dict[str, Any]:
    """What a model depends on, where it is not the default; not the device."""
    gguf = _place(source)[1].get("gguf_file")
    known = {field.name: getattr(source, field.name) for field in fields(ModelSource)}  # a source may have more
    known["gguf_file"] = Path(gguf).name if gguf else None
    known["tokenizer"] = public_name(source.tokenizer) if source.tokenizer else None
    return {name: value for name, value in known.items() if value and name not in _SAID_ELSEWHERE}


def _fine_tuned(model: PreTrainedModel, adapter: str, merge: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with the adapter in its weights, or beside them; and what the adapter is."""
    config: PeftConfig = load_peft_config(adapter)
    trained_on = config.base_model_name_or_path
    tuned = put_on(model, adapter)
    if merge:
        try:
            model = tuned.merge_and_unload(safe_merge=True)
        except (AttributeError, NotImplementedError, ValueError) as error:  # a method that cannot; weights of NaN
            raise LayerRopeError(f"peft={adapter!r} cannot be merged into the model: {one_line(error)}") from error
    else:  # merging would quantise once more
        model = tuned.get_base_model()
    vars(model).pop("peft_config", None)  # else PEFT takes it for a model that has had no adapter of ours
    return model, {
        "name": public_name(adapter),
        "trained_on": public_name(trained_on) if trained_on else None,
        "merged": merge,
        **adapter_identity(adapter, config),
    }


def _place(source: ModelSource) -> tuple[str, dict[str, Any]]:
    """The name for `from_pretrained`, and the arguments that say where the files lie."""
    name, gguf = source.model or demo_model_path(), source.gguf_file
    if name.endswith(".gguf") and Path(name).is_file():
        name, gguf = str(Path(name).parent), Path(name).name
    else:
        check_present("model", name)
    problem = _why_no_model(Path(name, source.subfolder or ""), gguf) if Path(name).is_dir() else ""
    if problem:
        raise LayerRopeError(f"cannot load model {source.model or name!r}: {problem}.")
    where = {"revision": source.revision, "subfolder": source.subfolder, "gguf_file": gguf}
    return name, {key: value for key, value in where.items() if value is not None}


def _why_no_model(folder: Path, gguf: str | None) -> str:
    """What a folder lacks that a model needs, or a GGUF file in it."""
    if not folder.is_dir():
        return f"it has no subfolder {folder.name!r}"
    if gguf is not None:
        try:
            with (folder / gguf).open("rb") as file:
                start = file.read(len(_GGUF_MAGIC))
        except OSError as error:
            return f"{gguf}: {error.strerror}"
        return "" if start == _GGUF_MAGIC else f"{gguf} is no GGUF file, it begins with {shown(start)}"
    if (folder / "config.json").is_file():
        return ""
    if (folder / CONFIG_NAME).is_file():
        return (
            "it is the folder of an adapter: name its base model as the model, and pass this as an adapter, or as peft "
            "if it is a fine-tune to be worked on"
        )
    there = min(folder.glob("*.gguf"), default=None)
    hint = f"; for {there.name} in it, name that file as the model" if there is not None else ""
    return f"the folder has no config.json{hint}"


def _checked_device(source: ModelSource) -> torch.device:
    name = source.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch: unknown, absent, not compiled in
        raise InvalidConfigError(f"device={name!r} cannot be used: {one_line(error)}") from error
    return torch.device(name)


# ImportError: a tokenizer wants a package. RuntimeError: tensors of other shapes, or bitsandbytes on this device.
_EXPECTED = (OSError, ValueError, ImportError, SafetensorError, RuntimeError)


@contextmanager
def _loading(source: ModelSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields what [`_place`] returns, and makes of what transformers raises a LayerRopeError of one line."""
    name, where = _place(source)
    is_gguf = "gguf_file" in where
    try:
        yield name, where
    except LayerRopeError:
        raise
    except Exception as error:  # of a damaged GGUF the reader raises what it likes
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or not (is_gguf or isinstance(error, _EXPECTED)):
            raise
        reason = why_not_loaded(name, error) + " (damaged, or a kind of GGUF that transformers does not read)" * is_gguf
        raise LayerRopeError(f"cannot load model {source.model or name!r}: {reason}.") from error


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Gives each module its train or eval mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def adapted(model: nn.Module, config: LayerRopeConfig) -> Iterator[PeftModel]:
    """Injects an adapter; afterwards the model is as it was found, each module's train or eval mode included."""
    with keeping_modes(model):
        with warnings.catch_warnings():  # a fine-tune may stay beside quantised weights
            warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
            # PEFT writes the model's name into what it is given, and warns where another stands there
            peft_model = get_peft_model(model, replace(config, base_model_name_or_path=None))
        try:
            yield peft_model
        finally:
            peft_model.unload()


_CHUNK = 2**16  # words of 32 bits, which stay in a processor's cache
_ODD = -0x61C8864680B583EB  # as a signed word, the usual multiplier of 64-bit hashing: 2**64 over the golden ratio


def model_fingerprint(model: nn.Module) -> str:
    """Returns a hash of the model's configuration, its attention implementation, and all of its weights and buffers.

    Each weight and buffer counts by the sum of its 32-bit words, each times an odd number of its place, modulo 2**64.
    So any change within one word is seen for certain, and changes in several words cancel hardly ever by chance;
    somebody who looks for such changes finds them. Not seen is what is neither weight nor buffer, such as bitsandbytes'
    quantization constants; what is on the `meta` device; and frequencies that transformers rewrites by the length of
    the last prompt.
    """
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    attention = sorted({str(getattr(config, "_attn_implementation", None)) for config in configs})
    digest.update(json.dumps([config, attention], sort_keys=True, default=str).encode())
    passing = {
        id(getattr(module, name))
        for module in model.modules()
        if is_length_dependent(module)
        for name in inv_freq_names(module)
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        number = None if tensor.is_meta or id(tensor) in passing else _checksum(tensor)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {number}\n".encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _checksum(tensor: torch.Tensor) -> int:
    """A number, modulo 2**64, that each bit of a tensor of any dtype and shape changes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 4 or flat.numel() % 4:
        flat = nn.functional.pad(flat, (0, -flat.numel() % 4)).clone()
    words = flat.view(torch.int32)
    places = torch.arange(min(_CHUNK, words.numel()), device=words.device) * _ODD | 1
    wide, total = torch.empty_like(places), 0
    for chunk in words.split(_CHUNK):
        # in 64 bits, or little would be left of a word's upper bits; a GPU has no such `torch.dot`
        pair = wide[: chunk.numel()].copy_(chunk), places[: chunk.numel()]
        total = (total * _ODD + int(torch.dot(*pair) if words.is_cpu else torch.mul(*pair).sum())) % 2**64
    return total


def library_versions() -> dict[str, str]:
    """Returns the versions of what computes the figures."""
    others = {library.__name__: library.__version__ for library in (torch, transformers, peft)}
    return {"peft_layerrope": __version__, **others}
