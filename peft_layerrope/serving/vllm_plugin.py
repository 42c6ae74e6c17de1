"""vLLM serves the scaled model: each attention layer gets a rotary table of its own, made from scaled frequencies.

vLLM calls [`register`] in every process, through the entry point. Which factors is said by
`--additional-config '{"layer_rope": "FOLDER_OR_HUB_ID"}'`, or by the record in a baked checkpoint's `config.json`.

vLLM and what reads adapters are imported when a model is loaded: vLLM only logs an error of importing this module, and
would go on unscaled.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Iterator
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from ..errors import AdapterMismatchError, LayerRopeError, UnsupportedModelError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

    from ..tuner.config import LayerRopeConfig

KEY = "layer_rope"
"""Of vLLM's `additional_config`: an adapter's folder or Hub id."""

_logger = logging.getLogger("vllm.layer_rope")  # below vLLM's own, whose settings say what is printed
_TABLE = "cos_sin_cache"  # vLLM's name, shape (positions, r): cosines, then sines
_PROBE_POSITIONS = 512  # far enough for factors that differ little, near enough for angles in float32


@cache
def register() -> None:
    """Has every model that vLLM loads from now on scaled, if factors are given. May be called again."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    made = BaseModelLoader.__init__

    @wraps(made)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.load_model = _then_scaled(self.load_model)  # of whatever subclass: several have one of their own

    BaseModelLoader.__init__ = init


def _then_scaled(load: Any) -> Any:
    @wraps(load)
    def load_model(vllm_config: VllmConfig, model_config: ModelConfig, *args: Any, **kwargs: Any) -> nn.Module:
        model = load(vllm_config, model_config, *args, **kwargs)
        if model_config.runner_type != "draft":  # its guesses are checked by the scaled model
            scale_model(model, vllm_config, model_config)
        return model

    return load_model


def scale_model(model: nn.Module, vllm_config: VllmConfig, model_config: ModelConfig) -> None:
    """Scales a loaded model, or the part of it that this process has, in place, if factors are given; proves of each
    layer that it now rotates by its own. Raises LayerRopeError, which names a layer that cannot be scaled.
    """
    settings = vllm_config.additional_config
    adapter = settings.get(KEY) if isinstance(settings, dict) else None
    is_baked = getattr(model_config.hf_config, KEY, None) is not None
    if adapter is None and not is_baked:
        return
    from transformers import PreTrainedModel
    from vllm.config import set_current_vllm_config

    from ..base_model import empty_model
    from ..tuner.injection import bake, baked_config, layer_frequencies, scaling_for
    from ..tuner.sites import find_stack

    if adapter is not None and is_baked:
        raise LayerRopeError(f"{KEY}={adapter!r}: this checkpoint has factors baked in already.")
    if vllm_config.kv_transfer_config is not None:
        raise LayerRopeError(
            "kv_transfer_config: a store of keys beyond this process does not know by which factors they were rotated, "
            "and would mix them with those of other adapters."
        )
    empty = empty_model(model_config.hf_config)
    config = baked_config(empty) if is_baked else _adapter_config(str(adapter), model_config)
    frequencies = layer_frequencies(config, empty)
    # by which vLLM tells compiled graphs apart
    vllm_config.additional_config = {**settings, f"{KEY}_factors": config.to_dict()}
    with set_current_vllm_config(vllm_config), torch.no_grad():
        if isinstance(getattr(model, "model", None), PreTrainedModel):
            stack = find_stack(model.model)
            bake(model.model, stack, scaling_for(config, model.model, stack))
            _logger.info("layer_rope: %d layers scaled, in transformers' own code", len(stack.layers))
            return
        tables = scale_layers(model, frequencies, model_config, vllm_config.parallel_config)
    size = sum(table.numel() * table.element_size() for table in tables)
    _logger.info(
        "layer_rope: %d layers scaled, their %d tables take %.1f MB", len(frequencies), len(tables), size / 1e6
    )


def _adapter_config(adapter: str, model_config: ModelConfig) -> LayerRopeConfig:
    from ..loading import adapter_weights, load_adapter_config
    from ..tuner.artifacts import check_weights_file

    config = load_adapter_config(adapter)
    check_weights_file(adapter_weights(adapter, config), config.layer_factors)
    overrides = model_config.hf_overrides if isinstance(model_config.hf_overrides, dict) else {}
    needs_window = config.rope_type == "dynamic" and config.original_max_position_embeddings is None
    if needs_window and "max_position_embeddings" in overrides:
        raise AdapterMismatchError(
            f"{KEY}={adapter!r}: rope_type='dynamic' needs the trained window, which --hf-overrides has replaced: set "
            "original_max_position_embeddings in the adapter's config."
        )
    return config


def scale_layers(
    model: nn.Module,
    frequencies: list[tuple[torch.Tensor, torch.Tensor]],
    model_config: ModelConfig,
    parallel_config: ParallelConfig,
) -> list[torch.Tensor]:
    """Gives the layers that this process has rotary modules of their own, and proves that they rotate by them; raises
    UnsupportedModelError, which names the layer.

    Returns:
        The tables in use, `(positions, r)` each, without repetitions: layers that rotate alike share one.
    """
    model = model.get_language_model() if hasattr(model, "get_language_model") else model
    made: dict[Any, nn.Module] = {}  # layers that rotate alike share a module, as in vLLM
    sites = {layer: list(_rotaries(model, layer)) for layer in range(len(frequencies))}
    for layer in range(*model_config.get_layers_start_end_indices(parallel_config)):
        own, scaled = frequencies[layer]
        if not sites[layer] and not torch.equal(own, scaled):
            _refuse(layer, "no rotary module of vLLM's get_rope was found; if it does not rotate, its factor must be 1")
        for owner, attribute in sites[layer]:
            rotary = getattr(owner, attribute)
            key = (id(rotary), tuple(scaled.tolist()))
            if key not in made:
                made[key] = _scaled(rotary, own, scaled, model_config.max_model_len, layer)
            setattr(owner, attribute, made[key])
        for owner, attribute in sites[layer][:1]:
            _prove(layer, owner, getattr(owner, attribute), scaled, model_config)
    return list({id(table): table for table in (getattr(module, _TABLE) for module in made.values())}.values())


def _refuse(layer: int, reason: str) -> NoReturn:
    raise UnsupportedModelError(f"layer_rope: layer {layer}: {reason}.")


def _rotaries(model: nn.Module, layer: int) -> Iterator[tuple[nn.Module, str]]:
    """Where a layer's rotary modules sit: the modules that hold them, and the attributes."""
    for name, owner in model.named_modules():
        if re.match(rf"(\D*\.)?{layer}(\.|$)", name):
            for attribute, child in owner._modules.items():  # `named_children` would give a module once
                if isinstance(getattr(child, _TABLE, None), torch.Tensor):
                    yield owner, attribute


def _scaled(rotary: nn.Module, own: torch.Tensor, scaled: torch.Tensor, length: int, layer: int) -> nn.Module:
    """Returns a copy of a rotary module, for layers share it, with the table of other frequencies, or the module itself
    if it has them. Its table must have been made by `own`, the layer's frequencies as transformers has them. The new
    one has at least this length: with pictures positions go beyond the prompt's.
    """
    from ..tuner.scaling import rotation_table

    table = getattr(rotary, _TABLE)
    own, scaled = own.to(table.device), scaled.to(table.device)
    probe = rotation_table(own, min(len(table), _PROBE_POSITIONS)) * table[0, 0]  # YaRN's tables are longer vectors
    tolerance = max(1e-3, 2 * torch.finfo(table.dtype).eps)
    if table.shape[1] != probe.shape[1] or not torch.allclose(
        table[: len(probe)].float(), probe, rtol=0, atol=tolerance
    ):
        _refuse(layer, f"vLLM's {type(rotary).__name__} has other frequencies than transformers has for this model")
    if hasattr(rotary, "mrope_section"):
        length = max(length, len(table))
    if torch.equal(own, scaled) and len(table) >= length:
        return rotary
    new = (rotation_table(scaled, length) * table[0, 0]).to(table.dtype)
    # A deep copy, and not a shallow one: the module keeps its own bound method, which would rotate by the old table.
    made = copy.deepcopy(rotary, {id(table): new})
    if getattr(made, f"{_TABLE}_bf16", None) is not None:
        setattr(made, f"{_TABLE}_bf16", new.bfloat16())
    return made


def _prove(layer: int, owner: nn.Module, rotary: nn.Module, scaled: torch.Tensor, model_config: ModelConfig) -> None:
    """Runs the layer's attention up to its rotation, and compares that with one by angles in float64."""
    from ..tuner.scaling import rotation_table

    count = min(_PROBE_POSITIONS, model_config.max_model_len)
    device, seen = getattr(rotary, _TABLE).device, {}
    hidden = torch.arange(model_config.get_hidden_size(), device=device).sin().to(model_config.dtype).repeat(count, 1)
    positions = torch.arange(count, device=device)
    given = {"hidden_states": hidden, "x": hidden, "positions": positions, "position_ids": positions}
    names = inspect.signature(owner.forward).parameters
    arguments = {name: value for name, value in given.items() if name in names}

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        values = inspect.signature(module.forward_native).bind(*args, **kwargs).arguments
        seen.update({name: values[name].clone() for name in ("query", "key") if values.get(name) is not None})

    def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> NoReturn:
        seen["rotated"] = output
        raise LayerRopeError("the rotation is known: what follows would need an engine that runs")

    before_hook = rotary.register_forward_pre_hook(before, with_kwargs=True)
    reason = "does not call its rotary module"
    with before_hook, rotary.register_forward_hook(after, with_kwargs=True):
        try:
            owner(**arguments)
        except (LayerRopeError, TypeError, ValueError, RuntimeError) as error:
            reason = f"cannot be run for a proof that it rotates by its factor ({error})"
    if "rotated" not in seen:
        _refuse(layer, f"{type(owner).__name__} {reason}")
    table = getattr(rotary, _TABLE)
    exact = rotation_table(scaled.double().to(device), count) * table[0, 0]

    def rotated_by(rows: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        reference = copy.deepcopy(rotary, {id(table): rows.to(model_config.dtype)})
        return reference.forward_native(positions, *(seen[name].clone() for name in ("query", "key") if name in seen))

    expected = rotated_by(exact)
    is_wrong = torch.equal(expected[0], rotated_by(exact.flip(0))[0])  # whatever its table says
    tolerance = max(1e-3, 4 * torch.finfo(model_config.dtype).eps)
    for got, wanted in zip(seen["rotated"], expected, strict=True):
        is_wrong |= got is not None and not (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    if is_wrong:
        _refuse(layer, f"{type(rotary).__name__} does not rotate by the scaled frequencies")
