"""What the fuzz tests share: a tiny model on which folders are tried as adapters, and how a trial is judged."""

from __future__ import annotations

import json
import re
import signal
import struct
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peft_layerrope import LayerRopeError, verify
from peft_layerrope.loading import load_adapter

FACTORS = [1.5, 0.75]
WINDOW = 64
KEY = "base_model.model.layer_factors"
FIELDS = (
    "rope_type",
    "factor",
    "layer_factors",
    "original_max_position_embeddings",
    "target_length",
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)

# What PEFT raises for an `adapter_config.json` of which it cannot tell whose it is. It reads the file, to look up
# `peft_type`, before it asks any method's code, so nothing of ours can make these clearer: there is no such file
# (ValueError), it is unreadable (OSError), no text, no JSON or has a number of too many digits (ValueError), no mapping
# or a `peft_type` that no mapping can have as a key (TypeError), a `peft_type` that is missing or that PEFT does not
# know (KeyError), nested too deep (RecursionError). `peft_layerrope.loading` looks at the file before PEFT does.
PEFTS_OWN = (ValueError, OSError, TypeError, KeyError, RecursionError)

CONFIG = {
    "auto_mapping": None,
    "base_model_name_or_path": "someone/model",
    "factor": 1.0,
    "inference_mode": True,
    "layer_factors": FACTORS,
    "original_max_position_embeddings": None,
    "peft_type": "LAYER_ROPE",
    "peft_version": "0.21.2",
    "revision": None,
    "rope_type": "default",
    "target_length": None,
    "task_type": "CAUSAL_LM",
}


def tiny_model() -> PreTrainedModel:
    """Two layers, 16 rotary dimensions: a load and a verification take ten milliseconds."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=WINDOW,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def safetensors_bytes(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A file in the format, with whatever header; `length` is what it claims to be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def factors_file(factors: list[float], key: str = KEY) -> bytes:
    """The file as it should be, by the format's description."""
    data = np.asarray(factors, dtype="<f4").tobytes()
    return safetensors_bytes({key: {"dtype": "F32", "shape": [len(factors)], "data_offsets": [0, len(data)]}}, data)


def write_adapter(folder: Path, config: Any = CONFIG, weights: bytes | None = None) -> Path:
    """Writes both files; `config` is JSON's values or the text itself."""
    folder.mkdir(exist_ok=True)
    content = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "adapter_config.json").write_bytes(content)
    (folder / "adapter_model.safetensors").write_bytes(factors_file(FACTORS) if weights is None else weights)
    return folder


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the code under it (main thread, Unix)."""

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Bench:
    """Tries folders as adapters of one model, which has to come out of each trial as it went in.

    `outcomes` counts them: "loaded", "refused", and "peft" for files that PEFT itself does not take for ours.
    """

    def __init__(self, good: Path) -> None:
        self.model = tiny_model()
        self.good = write_adapter(good)
        self.outcomes: Counter[str] = Counter()
        self._ids = torch.arange(20)[None] % 32
        self._before = self._state()

    def try_adapter(self, folder: Path, field: str | None = None) -> str:
        """Loads a folder through PEFT and judges what happened.

        Args:
            folder: may hold anything.
            field: which name the message has to contain if the folder is refused.
        """
        try:
            with deadline(30), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome = self._outcome(folder, field)
                self.check_untouched()
        except BaseException:
            self.model = tiny_model()  # the next trial must not suffer from this one
            self._before = self._state()
            raise
        self.outcomes[outcome] += 1
        if self.outcomes.total() % 25 == 0:
            self.check_usable()
        return outcome

    def _outcome(self, folder: Path, field: str | None) -> str:
        ours = is_ours(folder)
        try:
            loaded = PeftModel.from_pretrained(self.model, folder)
        except LayerRopeError as error:
            outcome = "refused"
            check_message(error, field)
        except PEFTS_OWN:
            if ours:
                raise
            outcome = "peft"
        else:
            assert ours
            check_measured(loaded, json.loads((folder / "adapter_config.json").read_bytes()))
            loaded.unload()
            return "loaded"
        try:
            load_adapter(self.model, str(folder))  # the command line's, which gives no errors but ours
        except LayerRopeError as error:
            check_message(error, field)
        else:
            raise AssertionError(f"{folder} is refused by PEFT and taken by load_adapter")
        return outcome

    def check_usable(self) -> None:
        """A good adapter still loads."""
        loaded = PeftModel.from_pretrained(self.model, self.good)
        check_measured(loaded, CONFIG)
        loaded.unload()
        self.check_untouched()

    def check_untouched(self) -> None:
        """The base model is bit for bit what it was."""
        state = self._state()
        for name, value in self._before.items():
            same = torch.equal(state[name], value) if isinstance(value, torch.Tensor) else state[name] == value
            assert same, f"the base model's {name} changed: {value} to {state[name]}"

    def _state(self) -> dict[str, Any]:
        modules = list(self.model.named_modules())
        with torch.no_grad():
            logits = self.model(self._ids, use_cache=False).logits
        return {
            "logits": logits,
            "modules": [(name, id(module), module.training) for name, module in modules],
            "hooks": [
                name
                for name, module in modules
                for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
                if getattr(module, kind)
            ],
            "frozen": [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad],
            "attributes": sorted(self.model.__dict__),
            "config": self.model.config.to_dict(),
        }


def check_message(error: LayerRopeError, field: str | None = None) -> None:
    """A message is one short printable line that says which file or field it is about."""
    message = str(error)
    assert len(message) < 1000, message[:1000]
    assert message.isprintable(), ascii(message)
    names = [field] if field else ["adapter_config.json", "adapter_model.safetensors", *FIELDS]
    assert any(name in message for name in names), message
    said = r"expected|must|should|has no|no effect|but .* has|disagree|needs the trained window|unknown"
    assert re.search(said, message), message


def check_measured(model: PeftModel, config: dict[str, Any]) -> None:
    """Every layer's measured factor is what the file says, by this test's own reading of the file."""
    verification = verify(model)
    assert [check.status for check in verification.layers] == ["ok", "ok"], str(verification)
    factors, factor = config.get("layer_factors") or [1.0, 1.0], config.get("factor", 1.0)
    for check, layer_factor in zip(verification.layers, factors, strict=True):
        expected, tolerance = factor * layer_factor, 2e-3 * factor * layer_factor
        if config.get("rope_type") == "dynamic":
            window = config.get("original_max_position_embeddings") or WINDOW
            length = config.get("target_length") or max(2 * window, 12)
            growth = max(length / window - 1, 0)
            if growth == 0:  # inside the window nothing is scaled
                expected, tolerance = 1.0, 2e-3
            else:
                tolerance += 2e-3 * (1 + expected * growth) / growth
        assert abs(check.measured - expected) <= tolerance, f"{check} where the file says {expected}"


def is_ours(folder: Path) -> bool:
    """Whether the file says so, by Python's own reading of it."""
    path = folder / "adapter_config.json"
    try:
        if not path.is_file():  # a pipe or a device would be read for ever
            return False
        values = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("peft_type") == "LAYER_ROPE"
