"""What is put onto a model to be compared: nothing, a baseline, factors, or any PEFT adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..base_model import adapted, keeping_modes
from ..errors import TaskError, one_line, shown
from ..files import last_component
from ..loading import adapter_identity, adapter_weights, load_peft_config, put_on
from ..tuner.artifacts import check_weights_file
from ..tuner.config import LayerRopeConfig
from ..tuner.frequencies import frequencies_at, inv_freq_names, own_frequencies, rope_type_reaches
from ..tuner.injection import SCALING_FIELDS
from ..tuner.sites import RotarySite, find_stack, model_type, prove_rotary_scales, text_config, trained_window

_KEPT = ("_modules", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks")


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has the children, the hooks and the mode that it had, every parameter its
    `requires_grad`, and the model its adapter configurations. What was written into weights in place stays written.
    """
    kept = [(getattr(module, name), dict(getattr(module, name))) for module in model.modules() for name in _KEPT]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configs = dict(model.__dict__["peft_config"]) if "peft_config" in model.__dict__ else None
    try:
        with keeping_modes(model):
            yield
    finally:
        for container, content in kept:
            container.clear()
            container.update(content)
        for parameter, required in trainable:
            parameter.requires_grad_(required)
        if configs is not None:
            model.peft_config = configs
        elif "peft_config" in model.__dict__:
            del model.peft_config


_OF_A_SCALING = (
    *("type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    *("mscale", "mscale_all_dim", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "alpha"),
)
"""Entries of `rope_parameters` that belong to a scaling; the others say what is scaled."""


def _scaled_rotaries(model: nn.Module, rope_type: str, factor: float) -> list[tuple[RotarySite, nn.Module]]:
    """Builds the rotary embeddings that the model would have had, had its config asked for a scaling, and says where
    they belong.

    Where a family has a table for its full-attention layers and one for its sliding ones, that is the first one's
    scaling, as in transformers. A scaling that the model has of its own is replaced.
    """
    kind, name = model_type(model), f"{rope_type}:{factor:g}"
    sites = find_stack(model).sites
    own, plain, scaled = (copy.deepcopy(model.config) for _ in range(3))
    try:
        _set_rope_type(plain.get_text_config(decoder=True), "default", factor)
        _set_rope_type(scaled.get_text_config(decoder=True), rope_type, factor)
        with torch.device("meta"):
            models = [type(model)(config) for config in (own, plain, scaled)]
        before, rotaries = ([_built(site.rotary, m) for site in find_stack(m).sites] for m in models[1:])
        far = torch.tensor([2 * (trained_window(model) or 1)])  # where `dynamic` has begun
        same = all(_are_equal(*pair, far) for pair in zip(before, rotaries, strict=True))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise TaskError(f"{name} cannot be put onto {kind}: {one_line(repr(error))}.") from error
    if same and factor != 1:
        raise TaskError(f"{name} does not change the frequencies of {kind} as it should.")
    _check_nothing_else_changes(models[0], models[2], {site.name for site in sites}, name)
    for site, rotary in zip(sites, rotaries, strict=True):
        prove_rotary_scales(rotary, kind)
        rotary.load_state_dict(site.rotary.state_dict())  # a few families keep something of it in checkpoints
        rotary.to(next(site.rotary.buffers()).device).train(site.rotary.training)
    return list(zip(sites, rotaries, strict=True))


def describe_scaling(model: nn.Module, rope_type: str, relation: str) -> str:
    """Says what a rope type (`"default"`: factors alone) does on a model beyond its name: which tables it scales, if
    not all, and its relation to a scaling that the model has of its own, such as `"on top of"`. Empty where there is
    nothing to say.
    """
    text = text_config(model)
    parameters = getattr(text, "rope_parameters", None) or {}
    tables = {table: entries for table, entries in parameters.items() if isinstance(entries, dict)}
    reached = [table for table in tables if rope_type_reaches(text.model_type, table)]
    own = {entries.get("rope_type", "default") for entries in tables.values() or [parameters]}
    own -= {"default", "proportional"}
    said = []
    if rope_type != "default" and len(reached) < len(tables):
        said.append(f"{rope_type} of {', '.join(reached)} layers alone")
    if own:
        said.append(f"{relation} the model's own {', '.join(sorted(own))}")
    return ", ".join(said)


def _set_rope_type(text: PretrainedConfig, rope_type: str, factor: float) -> None:
    """Writes what a checkpoint's author would: into every table of the config that the scaling reaches."""
    parameters = getattr(text, "rope_parameters", None) or {}
    tables = {table: entries for table, entries in parameters.items() if isinstance(entries, dict)}
    for table, entries in (tables or {"": parameters}).items():
        if not rope_type_reaches(text.model_type, table):
            continue
        own = entries.get("rope_type", "default")
        if "rope_theta" not in entries or (own == "proportional" and rope_type not in ("default", "linear")):
            raise ValueError(f"its rope_parameters are {parameters}")
        kept = entries if own == "default" else {k: v for k, v in entries.items() if k not in _OF_A_SCALING}
        changed = {**kept, "rope_type": rope_type if own != "proportional" else own}  # which has a factor of its own
        if rope_type != "default":
            changed["factor"] = factor
        if (text.model_type, rope_type) == ("deepseek_v4", "yarn"):
            changed["attention_factor"] = 1.0  # as its config class has it
        if table:
            parameters[table] = changed
        else:
            text.rope_parameters = changed
    text.standardize_rope_params()


def _built(rotary: nn.Module, model: nn.Module) -> nn.Module:
    """Gives a rotary embedding of a model on the meta device its frequencies, on the CPU, and returns it."""
    frequencies = own_frequencies(rotary, model)
    rotary.to_empty(device="cpu")
    for name, inv_freq in frequencies.items():
        setattr(rotary, name, inv_freq)
        setattr(rotary, name.removesuffix("inv_freq") + "original_inv_freq", inv_freq.clone())
    return rotary


def _are_equal(one: nn.Module, other: nn.Module, position_ids: torch.Tensor) -> bool:
    pair = [
        frequencies_at(rotary, {name: getattr(rotary, name) for name in inv_freq_names(rotary)}, position_ids)
        for rotary in (one, other)
    ]
    return all(torch.equal(inv_freq, pair[1][name]) for name, inv_freq in pair[0].items())


def _check_nothing_else_changes(own: PreTrainedModel, scaled: PreTrainedModel, sites: set[str], label: str) -> None:
    """Raises TaskError where the scaling is more than rotary embeddings: some families scale their attention too."""
    for (name, one), (_, other) in zip(own.named_modules(), scaled.named_modules(), strict=True):
        for key, value in vars(one).items():
            if name not in sites and isinstance(value, (bool, int, float, str)) and vars(other).get(key) != value:
                raise TaskError(
                    f"{label}: in {model_type(own)} it changes more than the rotary embedding ({name}.{key}): compare "
                    "with a model that is loaded with it."
                )


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


@dataclass(frozen=True)
class Candidate:
    """One line of a comparison. Make it with [`parse_baseline`], [`Candidate.of_adapter`] or [`Candidate.of_config`].

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
    def of_adapter(cls, adapter: str | Path, label: str | None = None) -> Candidate:
        """An adapter of any PEFT method; its default label is the last part of its folder's or repository's name."""
        return cls(label or last_component(str(adapter)), "adapter", adapter=str(adapter))

    @classmethod
    def of_config(cls, label: str, config: LayerRopeConfig) -> Candidate:
        """Factors that are not in a file."""
        return cls(label, "config", config=config)

    def layer_rope(self, num_layers: int) -> LayerRopeConfig | None:
        """Returns the scaling of a model's layers, or None where a candidate does something else.

        Raises:
            LayerRopeError: an adapter that cannot be loaded, or whose two files disagree.
        """
        if self.kind in ("uniform", "first_and_rest"):
            return LayerRopeConfig(layer_factors=[*self.numbers, *self.numbers[-1:] * num_layers][:num_layers])
        config = self._loaded
        # a new one: PEFT writes the base model's name into it
        return LayerRopeConfig(**_scaling(config)) if isinstance(config, LayerRopeConfig) else None

    def identity(self) -> dict[str, Any]:
        """Returns what it does as JSON values: a resumed comparison must be of the same. An adapter is known by what
        is in its files and not by its path.

        Raises:
            LayerRopeError: an adapter that cannot be loaded.
        """
        config = self._loaded
        if config is None:
            return {"kind": self.kind, "numbers": list(self.numbers)}
        if isinstance(config, LayerRopeConfig):
            return {"kind": "layer_rope", **_scaling(config)}
        return adapter_identity(self.adapter, config)

    @cached_property
    def _loaded(self) -> PeftConfig | None:
        """The config of what is an adapter, whose files are checked and read once."""
        if self.adapter is None:
            return self.config
        config = load_peft_config(self.adapter)
        if isinstance(config, LayerRopeConfig):
            check_weights_file(adapter_weights(self.adapter, config), config.layer_factors)
        elif config.is_prompt_learning:
            raise TaskError(
                f"{self.adapter!r} is a {config.peft_type.value} adapter: its virtual tokens would shift every "
                "position, so it cannot be compared by position."
            )
        return config


def of_adapters(adapters: Iterable[str]) -> list[Candidate]:
    """Returns adapters of any PEFT method; where two have one last name, the label has the folder above it too."""
    found = [Candidate.of_adapter(adapter) for adapter in adapters]
    labels = [candidate.label for candidate in found]
    for index, candidate in enumerate(found):
        if labels.count(candidate.label) > 1:
            path = Path(candidate.adapter).expanduser().resolve()
            found[index] = replace(candidate, label=f"{path.parent.name}/{path.name}")
    return found


def parse_baseline(text: str) -> Candidate:
    """Reads a baseline, such as `"linear:2"`.

    - `none`: the model as it is.
    - `uniform:S`: every layer's positions divided by S, on top of a scaling that the model has of its own.
    - `first_and_rest:A,B`: layer 0's by A, all others' by B, likewise.
    - `linear:F`, `dynamic:F`, `yarn:F`: transformers' Position Interpolation, Dynamic-NTK or YaRN with factor F, as a
      model has it whose config says so: in place of a scaling of its own, and in families with a table for
      full-attention layers and one for sliding ones on the first only.

    Raises:
        TaskError: it is none of these.
        InvalidConfigError: a factor out of the range that adapters may have.
    """
    kind, _, rest = text.strip().partition(":")
    try:
        numbers = tuple(float(number) for number in rest.split(",")) if rest else ()
    except ValueError:
        numbers = (math.nan,)
    smallest = 1.0 if kind == "yarn" else 0.0
    fit = len(numbers) == _NUMBERS.get(kind, 1) and all(smallest < number < math.inf for number in numbers)
    if kind not in BASELINES or not fit:
        more = " The factor of yarn must be above 1." if kind == "yarn" else ""
        raise TaskError(f"baseline {shown(text)} is unknown, expected one like {', '.join(BASELINES.values())}.{more}")
    if kind in ROPE_TYPES:
        LayerRopeConfig(rope_type="linear", factor=numbers[0])  # for the range of factors
    label = NO_SCALING if kind == "none" else f"{kind}:{','.join(f'{number:g}' for number in numbers)}"
    candidate = Candidate(label, kind, numbers)
    candidate.layer_rope(2)  # likewise
    return candidate


@contextmanager
def candidate_on(model: nn.Module, candidate: Candidate) -> Iterator[nn.Module]:
    """Puts a candidate onto a model without an adapter for as long as it is scored, and leaves the model as it was
    found. Yields the model to score.

    Raises:
        AdapterMismatchError: factors for another number of layers.
        TaskError: a method that cannot be put onto this model.
        LayerRopeError: an adapter that cannot be loaded.
    """
    with _as_found(model):
        if candidate.kind == "none":
            yield model
        elif candidate.kind in ROPE_TYPES:
            for site, rotary in _scaled_rotaries(model, candidate.kind, candidate.numbers[0]):
                site.replace(rotary)
            yield model
        elif (config := candidate.layer_rope(len(find_stack(model).layers))) is None:
            yield put_on(model, candidate.adapter)  # `_as_found` takes it off again
        else:
            with adapted(model, config) as peft_model:
                yield peft_model


def _scaling(config: LayerRopeConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SCALING_FIELDS}
