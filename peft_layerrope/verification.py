"""Measures each layer's factor from the rotation that the layer receives in a forward pass.

Two passes on a dozen tokens: one with the model's own rotary embeddings put back, in float32, one as the model stands.
Both times the table is read where a layer gets it; angles come from its `cos` and `sin`. What an adapter says is used
only to say what was expected.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from .base_model import keeping_modes
from .errors import LayerRopeError
from .tuner.config import LayerRopeConfig
from .tuner.frequencies import own_frequencies, rope_type_reaches, without_memory
from .tuner.injection import BAKED_CONFIG_KEY, baked_config
from .tuner.model import LayerRopeModel
from .tuner.rotary import LayerRopeLayer
from .tuner.sites import DecoderStack, find_stack, model_type, table_types, text_config
from .tuner.tables import holds_tables, table_parts

OK, MISMATCH, NO_ROTATION = "ok", "mismatch", "no rotation"

_PROMPT_TOKENS = 12
_ARGUMENT = "position_embeddings"  # transformers' name for what a decoder layer is handed
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 2e-2  # relative; half precision keeps sines to 8 or 11 bits
_SMALLEST, _SMALLEST_HALF = 1e-9, 1e-4  # angles that can be told from 0
_ANGLE_TOLERANCE, _HALF_ANGLE_TOLERANCE = 1e-4, 8e-3  # in radians, up to the prompt's last token


@dataclass(frozen=True)
class LayerCheck:
    """One layer: its factor as expected and as measured (the global `factor` times the layer's)."""

    layer: int
    expected: float
    measured: float | None  # None where nothing could be measured; `note` says why
    status: str  # OK, MISMATCH or NO_ROTATION
    note: str = ""


@dataclass(frozen=True)
class Verification:
    """What [`verify`] found, layer by layer."""

    model_type: str
    rope_type: str
    layers: tuple[LayerCheck, ...]

    @property
    def mismatched(self) -> list[int]:
        """The layers whose rotation is not what was expected."""
        return [check.layer for check in self.layers if check.status == MISMATCH]

    @property
    def ok(self) -> bool:
        """Whether every layer that has a rotation has the expected one."""
        return not self.mismatched

    def raise_for_mismatch(self) -> None:
        """Raises `LayerRopeError` that names the layers, unless `ok`."""
        if not self.ok:
            raise LayerRopeError(
                f"{self.model_type}: the rotation of layers {self.mismatched} is not what the adapter says. "
                "`print(peft_layerrope.verify(model))` shows expected and measured factors."
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        lines = [f"{'layer':>5}  {'expected':>8}  {'measured':>8}  status"]
        for check in self.layers:
            measured = "-" if check.measured is None else f"{check.measured:.3f}"
            note = f" ({check.note})" if check.note else ""
            lines.append(f"{check.layer:>5}  {check.expected:>8.3f}  {measured:>8}  {check.status}{note}")
        return "\n".join(lines)


def verify(
    model: nn.Module, config: LayerRopeConfig | None = None, *, inputs: Mapping[str, Any] | None = None
) -> Verification:
    """Checks each layer's rotation against the adapter, from what the layer received in a forward pass.

    Args:
        model: a model with a LAYER_ROPE adapter, a baked one, or any other together with `config`. It is left as it
            was; two forward passes of 12 tokens are run on it, without gradients, in `eval()` mode.
        config: what is expected; default: the model's active LAYER_ROPE adapter, or the baked factors.
        inputs: keyword arguments of the forward pass; default: 12 ordinary tokens, `use_cache=False`.

    Returns:
        One `LayerCheck` for each decoder layer. A layer whose output does not depend on its table (NoPE, linear
        attention) has nothing to scale: its status is "no rotation", which is not a mismatch.

    Raises:
        LayerRopeError: there is no adapter and no `config`.
        AdapterMismatchError: `config` is for another number of layers.
        UnsupportedModelError: the model has no rotary embedding to measure.
    """
    stack = find_stack(model)
    expected = config if config is not None else expected_config(model)
    factors = expected.resolved_layer_factors(len(stack.layers), model_type(model))
    rotation = _Rotation.of(expected, model)
    arguments = dict(inputs) if inputs is not None else probe_inputs(model, rotation.probe_length)
    with keeping_modes(model), torch.no_grad(), without_memory(model):
        model.eval()
        with _own_rotaries(stack, model) as precise:
            base = _record(model, arguments, stack, precise)
        received = _record(model, arguments, stack, {}, base)
    kind, layer_types = text_config(model).model_type, table_types(model, len(factors))
    checks = []
    for layer, (factor, own, scaled) in enumerate(zip(factors, base, received, strict=True)):
        tables = [
            (rotation if rope_type_reaches(kind, name or layer_types[layer]) else _PLAIN_ROTATION, table)
            for name, table in own.tables
        ]
        checks.append(_check(layer, tables, factor, own, scaled))
    return Verification(model_type(model), expected.rope_type, tuple(checks))


def expected_config(model: nn.Module) -> LayerRopeConfig:
    """Returns what the active LAYER_ROPE adapter, or the baked factors, say; raises LayerRopeError of neither."""
    wrappers = [module for module in model.modules() if isinstance(module, LayerRopeLayer)]
    active = {name for wrapper in wrappers for name in wrapper.active_adapters}
    configs: dict[str, LayerRopeConfig] = {}
    for module in model.modules():  # a PeftModel, the tuner in it, the model in that
        held = module.peft_config if isinstance(module, LayerRopeModel) else module.__dict__.get("peft_config")
        if isinstance(held, dict):
            configs |= {name: config for name, config in held.items() if isinstance(config, LayerRopeConfig)}
    if configs:
        return next((config for name, config in configs.items() if name in active), next(iter(configs.values())))
    if getattr(model.config, BAKED_CONFIG_KEY, None) is not None:
        return baked_config(model)
    raise LayerRopeError("this model has no LAYER_ROPE adapter and none baked in: there is nothing to verify.")


def probe_inputs(model: nn.Module, length: int | None) -> dict[str, Any]:
    """Returns keyword arguments for a forward pass on 12 tokens that no model takes for an image or an end. With a
    `length` the last one stands at position `length - 1`, as if the prompt were that long.
    """
    special = set(_special_tokens(model.config.to_dict()))
    candidates = range(min(text_config(model).vocab_size, _PROMPT_TOKENS + 2 * len(special) + 100))
    ordinary = [token for token in candidates if token not in special][-_PROMPT_TOKENS:]
    ids = torch.tensor([ordinary], device=next(model.parameters()).device)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if length is not None:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        positions[0, -1] = length - 1
        inputs["position_ids"] = positions
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if length is not None and "decoder_position_ids" in inspect.signature(base.forward).parameters:
            inputs["decoder_position_ids"] = positions
    return inputs


def _special_tokens(config: dict[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_tokens(value)
        elif "token" in str(name) and isinstance(value, int):
            yield value


@dataclass(frozen=True)
class _Rotation:
    """What an adapter says of a rotation, as plain numbers; the formulas of `scaling` again, in float64 NumPy."""

    rope_type: str
    factor: float
    growth: float  # Dynamic-NTK: length / trained window - 1, at least 0
    probe_length: int | None  # how long a prompt has to seem for the adapter to act

    @classmethod
    def of(cls, config: LayerRopeConfig, model: nn.Module) -> _Rotation:
        if config.rope_type != "dynamic":
            return cls(config.rope_type, config.factor, 0.0, None)
        window = config.original_max_position_embeddings or text_config(model).max_position_embeddings
        length = config.target_length or max(2 * window, _PROMPT_TOKENS)
        probe_length = None if config.target_length else length
        return cls(config.rope_type, config.factor, max(length / window - 1, 0.0), probe_length)

    def expected_ratios(self, factor: float, depths: np.ndarray) -> np.ndarray:
        """By what each frequency is divided; `depths` runs from 0 at the highest frequency to 1 at the lowest."""
        if self.rope_type == "dynamic":
            return (1 + self.factor * factor * self.growth) ** depths
        return np.full_like(depths, self.factor * factor)

    def measured_factor(self, ratios: np.ndarray, depths: np.ndarray) -> float:
        """The global factor times the layer's that explains the measured ratios best (their median)."""
        if self.growth == 0:
            return float(np.median(ratios))
        low = depths >= min(0.5, depths.max())  # the lower frequencies, which grow most
        alpha = np.median(ratios[low] ** (1 / depths[low]))
        return float((alpha - 1) / self.growth)


_PLAIN_ROTATION = _Rotation("default", 1.0, 0.0, None)  # of the tables that a rope type does not reach


@dataclass
class _Received:
    """What one layer got in a forward pass."""

    value: Any = None  # as handed over, for use in place of one that was not opened
    tables: list[tuple[str, Any]] = field(default_factory=list)  # names, of several ones, and (cos, sin) or a complex
    unopened: bool = False
    ran: bool = False
    rotates: bool = False  # whether the layer's output depends on its table


def _record(
    model: nn.Module,
    inputs: dict[str, Any],
    stack: DecoderStack,
    precise: Mapping[int, Any],  # filled while the model runs
    base: list[_Received] | None = None,
) -> list[_Received]:
    """Runs the model and returns what each layer received. `base` is an earlier run's, on the model's own rotary;
    `precise` holds, by the `id` of their first tensor, what is to be noted in the place of tables.
    """
    record = [_Received() for _ in stack.layers]
    trying = False  # while a layer is run again to see whether it minds its table

    def note(layer: int, value: Any, name: str = "") -> None:
        record[layer].tables += [(name, precise.get(id(table_parts(t)[0]), t)) for name, t in _tables_in(value, name)]

    def on_layer(layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        nonlocal trying
        mine = record[layer]
        mine.ran = True
        names = inspect.signature(module.forward).parameters
        value = {**dict(zip(names, args, strict=False)), **kwargs}.get(_ARGUMENT)
        if holds_tables(value):
            mine.unopened = True
            return _with_table(args, kwargs, value, base[layer].value) if base else None
        mine.value = value
        note(layer, value)
        if base is not None and value is not None:
            trying = True
            # tried with the model's own table: one that does not rotate at all is the same turned back
            table = value if base[layer].value is None else base[layer].value
            outputs = []
            for tried in (table, _turned_back(table)):
                own_args, own_kwargs = _with_table(args, kwargs, value, tried)
                output = module.forward(*own_args, **own_kwargs)
                outputs.append(output if isinstance(output, torch.Tensor) else output[0])
            mine.rotates |= not torch.equal(*outputs)
            trying = False
        return None

    def on_rotary(layer: int, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not trying:
            note(layer, output, kwargs.get("layer_type") or "")
            record[layer].rotates = True

    with ExitStack() as hooks:
        for index, layer in enumerate(stack.layers):
            hook = partial(on_layer, index)
            hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
        for site in stack.sites:
            if site.layer_idx is not None:
                hook = partial(on_rotary, site.layer_idx)
                hooks.enter_context(site.rotary.register_forward_hook(hook, with_kwargs=True))
        model(**inputs)
    return record


def _with_table(args: tuple, kwargs: dict, old: Any, new: Any) -> tuple[tuple, dict]:
    if _ARGUMENT in kwargs:
        return args, {**kwargs, _ARGUMENT: new}
    return tuple(new if value is old else value for value in args), kwargs


def _tables_in(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _tables_in(part, str(key))
    elif isinstance(value, (tuple, list, torch.Tensor)):
        yield name, value


def _turned_back(value: Any) -> Any:
    """The same table, rotating the other way."""
    if isinstance(value, dict):
        return {name: _turned_back(part) for name, part in value.items()}
    return value.conj() if isinstance(value, torch.Tensor) else (value[0], -value[1])


def _angles(table: Any) -> np.ndarray:
    """The angles of each row and dimension, `(S, r)`, float64, from -pi to pi."""
    rows = [part.reshape(-1, *part.shape[-2:])[0].cpu() for part in table_parts(table)]
    if len(rows) == 1:
        return rows[0].to(torch.complex128).angle().numpy()
    cos, sin = (part.double().numpy() for part in rows)
    return np.arctan2(sin, cos)


def _wrapped(angles: np.ndarray) -> np.ndarray:
    return np.abs((angles + np.pi) % (2 * np.pi) - np.pi)


def _check(
    layer: int, tables: list[tuple[_Rotation, Any]], factor: float, base: _Received, received: _Received
) -> LayerCheck:
    expected = factor * (tables[0][0].factor if tables else 1.0)

    def result(status: str, measured: float | None = None, note: str = "") -> LayerCheck:
        return LayerCheck(layer, expected, measured, status, note)

    if received.unopened:
        return result(MISMATCH, note="its hook is missing: it was handed the tables of all layers unopened")
    if not tables or not received.rotates:
        return result(NO_ROTATION, note="" if received.ran else "the layer does not run on text alone")
    measured, close = [], []
    for (rotation, own), (_, scaled) in zip(tables, received.tables, strict=True):
        if table_parts(own)[0].shape[-2] < 2:
            continue  # a table of one position says nothing
        own_angles, all_scaled_angles = _angles(own), _angles(scaled)
        angles, scaled_angles = own_angles[1], all_scaled_angles[1]
        distinct, times = np.unique(angles.round(12), return_counts=True)
        distinct, pairs = distinct[::-1], len(angles) // times[-1]  # a part of them may have no rotation at all
        depths = np.searchsorted(-distinct, -angles.round(12)) / max(pairs - 1, 1)
        is_half = table_parts(scaled)[0].element_size() < 4
        expected_angles = angles / rotation.expected_ratios(factor, depths)
        usable = (np.minimum(angles, expected_angles) > (_SMALLEST_HALF if is_half else _SMALLEST)) & (
            (angles < 0.5) | (len(distinct) == 1)
        )
        usable &= expected_angles < 3  # a larger one has gone round
        if not usable.any():
            return result(MISMATCH, note="its rotation is too slow or too fast to be measured")
        # Further on, small differences have grown: in half precision the second row alone would hide them.
        places = np.arange(len(own_angles))[:, None]
        following = (_wrapped(own_angles - places * angles) < _ANGLE_TOLERANCE).all(axis=-1)
        seen = usable | ((angles >= 0) & (angles < 1.001)).all()  # else the second row is not at position 1
        off = _wrapped(all_scaled_angles - places * expected_angles)[following][:, seen]
        with np.errstate(divide="ignore"):  # a layer that does not rotate at all
            ratios, depths = angles[usable] / scaled_angles[usable], depths[usable]
        tolerance = _HALF_TOLERANCE if is_half else _TOLERANCE
        measured.append(rotation.measured_factor(ratios, depths))
        close.append(np.allclose(ratios, rotation.expected_ratios(factor, depths), rtol=tolerance, atol=0))
        close.append(off.max() < (_HALF_ANGLE_TOLERANCE if is_half else _ANGLE_TOLERANCE))
    if not measured:
        return result(NO_ROTATION, note="no table of more than one position")
    return result(OK if all(close) else MISMATCH, measured[0])


@contextmanager
def _own_rotaries(stack: DecoderStack, model: nn.Module) -> Iterator[dict[int, Any]]:
    """The model's own rotary embeddings in their places, for a while, with frequencies that no cast has rounded. Yields
    what they have answered, in float32: by the `id` of the first tensor of each answer.
    """
    precise: dict[int, Any] = {}
    answers = []  # kept, so that no `id` is used twice

    def on_answer(rotary: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        kwargs = {name: value.float() if name == "x" else value for name, value in kwargs.items()}
        args = (args[0].float(), *args[1:]) if args else args
        answers.append(output)
        precise[id(table_parts(output)[0])] = rotary.forward(*args, **kwargs)

    with ExitStack() as afterwards:
        for site in stack.sites:
            own = copy.deepcopy(site.original)
            for name, inv_freq in own_frequencies(site.original, model).items():
                setattr(own, name, inv_freq)
                setattr(own, name.removesuffix("inv_freq") + "original_inv_freq", inv_freq.clone())
            own.register_forward_hook(on_answer, with_kwargs=True)
            afterwards.callback(site.replace, site.rotary)
            site.replace(own)
        yield precise
