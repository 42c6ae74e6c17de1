"""What is put onto a model to be compared: nothing, a baseline, factors, or any PEFT adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn

from ..adapted import adapted
from ..errors import InvalidConfigError, TaskError
from ..loading import adapter_identity, adapter_weights, load_peft_config, put_on
from ..messages import named
from ..public_names import last_component
from ..tuner.artifacts import check_weights_file
from ..tuner.config import LayerRopeConfig
from ..tuner.sites import find_stack
from .as_found import as_found
from .rope_scaling import scaled_rotaries

NO_SCALING = "no scaling"
BASELINES = {
    "none": "none",
    "uniform": "uniform:1.5",
    "first_and_rest": "first_and_rest:1.5,2",
    "linear": "linear:2",
    "dynamic": "dynamic:2",
    "yarn": "yarn:2",
}
"""What [`parse_baseline`] knows, each with an example."""

_NUMBERS = {"none": 0, "first_and_rest": 2}  # all others take one
ROPE_TYPES = ("linear", "dynamic", "yarn")
"""Baselines that are transformers' own scalings."""
_SCALING_FIELDS = ("rope_type", "factor", "layer_factors", "original_max_position_embeddings", "target_length")


@dataclass(frozen=True)
class Contender:
    """One line of a comparison. Make it with [`parse_baseline`], [`Contender.of_adapter`] or [`Contender.of_config`].

    Attributes:
        label: its name in tables, unique within a comparison.
        kind: a key of `BASELINES`, or `"adapter"` or `"config"`.
        numbers: the numbers of a baseline.
        adapter: Hub id or folder of an adapter.
        config: factors without a file.
    """

    label: str
    kind: str = "none"
    numbers: tuple[float, ...] = ()
    adapter: str | None = None
    config: LayerRopeConfig | None = field(default=None, hash=False)

    @classmethod
    def of_adapter(cls, adapter: str | Path, label: str | None = None) -> Contender:
        """An adapter of any PEFT method; its default label is the last part of its folder's or repository's name."""
        if not isinstance(adapter, (str, Path)):
            raise TaskError(f"adapter={named(adapter)} must be a folder or a Hub id.")
        adapter = str(adapter)
        return cls(label or last_component(adapter), "adapter", adapter=adapter)

    @classmethod
    def of_config(cls, label: str, config: LayerRopeConfig) -> Contender:
        """Factors that are not in a file."""
        return cls(label, "config", config=config)

    def layer_rope(self, num_layers: int) -> LayerRopeConfig | None:
        """Returns the scaling of a model's layers, or None where a contender does something else.

        Raises:
            LayerRopeError: an adapter that cannot be loaded, or whose two files disagree.
        """
        config = self.config
        if self.kind == "uniform":
            config = LayerRopeConfig(layer_factors=[self.numbers[0]] * num_layers)
        elif self.kind == "first_and_rest":
            first, rest = self.numbers
            config = LayerRopeConfig(layer_factors=[first] + [rest] * (num_layers - 1))
        elif self.kind == "adapter":
            config = _checked_adapter(self.adapter)
        # a new one: PEFT writes the base model's name into it
        return LayerRopeConfig(**_scaling(config)) if isinstance(config, LayerRopeConfig) else None

    def identity(self) -> dict[str, Any]:
        """Returns what it does as JSON values: a resumed comparison must be of the same. An adapter is known by what
        is in its files and not by its path.

        Raises:
            LayerRopeError: an adapter that cannot be loaded.
        """
        if self.config is not None:
            return {"kind": "layer_rope", **_scaling(self.config)}
        if self.kind != "adapter":
            return {"kind": self.kind, "numbers": list(self.numbers)}
        config = _checked_adapter(self.adapter)
        if isinstance(config, LayerRopeConfig):
            return {"kind": "layer_rope", **_scaling(config)}
        return adapter_identity(self.adapter, config)


def parse_baseline(text: str) -> Contender:
    """Reads a baseline, such as `"linear:2"`.

    - `none`: the model as it is.
    - `uniform:S`: every layer's positions divided by S, on top of a scaling that the model has of its own.
    - `first_and_rest:A,B`: layer 0's by A, all others' by B, likewise.
    - `linear:F`, `dynamic:F`, `yarn:F`: transformers' Position Interpolation, Dynamic-NTK or YaRN with factor F, as a
      model has it whose config says so: in place of a scaling of its own, and in families with a table for
      full-attention layers and one for sliding ones on the first only.

    Raises:
        TaskError: it is none of these.
    """
    if not isinstance(text, str):
        raise TypeError(f"a baseline is text such as 'linear:2', got {type(text).__name__}.")
    kind, _, rest = text.strip().partition(":")
    try:
        numbers = tuple(float(number) for number in rest.split(",")) if rest else ()
    except ValueError:
        numbers = (0.0,)
    count = _NUMBERS.get(kind, 1)
    smallest = 1.0 if kind == "yarn" else 0.0
    if kind not in BASELINES or len(numbers) != count or not all(smallest < n < float("inf") for n in numbers):
        more = " The factor of yarn must be above 1." if kind == "yarn" else ""
        raise TaskError(f"baseline {text!r} is unknown, expected one like {', '.join(BASELINES.values())}.{more}")
    label = NO_SCALING if kind == "none" else f"{kind}:{','.join(f'{number:g}' for number in numbers)}"
    contender = Contender(label, kind, numbers)
    try:
        if kind in ROPE_TYPES:
            LayerRopeConfig(rope_type="linear", factor=numbers[0])  # for the range of factors
        contender.layer_rope(2)
    except InvalidConfigError as error:
        raise TaskError(f"baseline {text!r}: {error}") from error
    return contender


@contextmanager
def contending(model: nn.Module, contender: Contender) -> Iterator[nn.Module]:
    """Puts a contender onto a model for as long as it is scored, and leaves the model as it was found.

    Args:
        model: a transformers model without an adapter.
        contender: what to put on.

    Yields:
        The model to score.

    Raises:
        AdapterMismatchError: factors for another number of layers.
        TaskError: a method that cannot be put onto this model.
        LayerRopeError: an adapter that cannot be loaded.
    """
    with as_found(model):
        if contender.kind == "none":
            yield model
            return
        if contender.kind in ROPE_TYPES:
            for site, rotary in scaled_rotaries(model, contender.kind, contender.numbers[0]):
                site.replace(rotary)
            yield model
            return
        config = contender.layer_rope(len(find_stack(model).layers))
        if config is None:
            yield put_on(model, contender.adapter)  # `as_found` takes it off again
            return
        with adapted(model, config) as peft_model:
            yield peft_model


def _checked_adapter(adapter: str) -> PeftConfig:
    config = load_peft_config(adapter)
    if isinstance(config, LayerRopeConfig):
        check_weights_file(adapter_weights(adapter), config.layer_factors)
    elif config.is_prompt_learning:
        raise TaskError(
            f"{adapter!r} is a {config.peft_type.value} adapter: its virtual tokens would shift every position, so it "
            "cannot be compared by position."
        )
    return config


def _scaling(config: LayerRopeConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _SCALING_FIELDS}
