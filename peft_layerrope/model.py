"""`LayerRopeModel`: the PEFT tuner. Injects, saves and loads, bakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from .config import LayerRopeConfig
from .errors import AdapterMismatchError, LayerRopeError
from .registration import PREFIX
from .proof import prove_rotary_scales, tables_can_be_stacked
from .rotary import BakedLayerRope, LayerRopeLayer, is_length_dependent
from .sites import DecoderStack, find_stack, model_type, text_config
from .tables import LayerScaling, LayerTableHook

FACTORS_KEY = "base_model.model.layer_factors"
"""The one tensor of `adapter_model.safetensors`: float32, shape `(num_hidden_layers,)`."""

BAKED_CONFIG_KEY = "layer_rope"
"""Entry of a baked model's `config.json` that remembers what was baked in."""


class LayerRopeModel(BaseTuner):
    """Scales the rotary embedding of every decoder layer by that layer's factor (arXiv 2503.04355).

    The method adds no trainable weight and touches no existing one. Use it as any PEFT tuner: through
    `get_peft_model` or `PeftModel.from_pretrained`.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to be adapted, changed in place.
        config ([`LayerRopeConfig`]): The factors.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.

    Raises:
        UnsupportedModelError: the model's rotation cannot be scaled per layer; the message says why.
        AdapterMismatchError: the number of factors is not the model's number of layers.

    Example:
    ```py
    >>> from transformers import AutoModelForCausalLM
    >>> from peft import get_peft_model
    >>> from peft_layerrope import LayerRopeConfig, demo_model_path

    >>> base = AutoModelForCausalLM.from_pretrained(demo_model_path())
    >>> model = get_peft_model(base, LayerRopeConfig(layer_factors=[1.1] * base.config.num_hidden_layers))
    >>> model.print_trainable_parameters()
    ```
    """

    prefix = PREFIX
    tuner_layer_cls = LayerRopeLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Wraps the rotary embeddings (first adapter) or adds the adapter to the wrappers (later ones).

        Everything is checked before the model is changed. `state_dict`, `low_cpu_mem_usage` and
        `autocast_adapter_dtype` are accepted for PEFT's sake: there are no weights to place or cast.
        """
        config: LayerRopeConfig = self.peft_config[adapter_name]
        stack = find_stack(model)
        scaling = _scaling_for(config, model, stack)
        if stack.is_baked:
            raise LayerRopeError(
                "this model has LAYER_ROPE factors baked in already; load the plain base model to add an adapter."
            )
        if not stack.wrappers():
            if getattr(model.config, BAKED_CONFIG_KEY, None) is not None:
                raise LayerRopeError(
                    f"this model was saved after merge_and_unload(): its config.json holds `{BAKED_CONFIG_KEY}`, whose "
                    "factors are not applied yet. Call peft_layerrope.restore_baked(model) to apply them, or delete "
                    "the entry to start from the plain base model."
                )
            _wrap(stack, model)
        for wrapper in stack.wrappers():
            wrapper.set_scaling(adapter_name, scaling)
        config.layer_factors = list(scaling.layer_factors)
        for site in stack.sites:
            if site.name not in self.targeted_module_names:
                self.targeted_module_names.append(site.name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("inject_adapter replaces PEFT's walk over target modules.")

    def _wrappers(self) -> list[LayerRopeLayer]:
        wrappers = find_stack(self.model).wrappers()
        if not wrappers:
            raise LayerRopeError("the adapter is no longer in this model: it was unloaded or merged.")
        return wrappers

    def set_layer_factors(self, layer_factors: Sequence[float], adapter_name: str = "default") -> None:
        """Replaces an adapter's factors in place, validated as on construction.

        Args:
            layer_factors: one positive factor per layer.
            adapter_name: an adapter of this model.

        Raises:
            InvalidConfigError: a factor is not a positive finite number.
            AdapterMismatchError: wrong number of factors.
        """
        config: LayerRopeConfig = self.peft_config[adapter_name]
        changed = LayerRopeConfig(**{**config.to_dict(), "layer_factors": list(layer_factors)})
        scaling = _scaling_for(changed, self.model, find_stack(self.model))
        for wrapper in self._wrappers():
            wrapper.set_scaling(adapter_name, scaling)
        config.layer_factors = changed.layer_factors

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for wrapper in self._wrappers():  # and not a LoRA that shares the model
            wrapper.enable_adapters(enabled)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        stack, wrappers = find_stack(self.model), self._wrappers()
        if merge:
            names = adapter_names if adapter_names is not None else wrappers[0].active_adapters
            _check_mergeable(names, wrappers[0])
            _bake(self.model, stack, wrappers[0].scalings[names[0]])
        else:
            for site in stack.sites:
                site.replace(site.rotary.release())
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing to cast: there are no weights."""

    # Saving and loading. PEFT calls these as class methods; `model` is the PeftModel (or an injected base model).

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LayerRopeConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        return _FactorsOnly({FACTORS_KEY: torch.tensor(config.layer_factors, dtype=torch.float32)})

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LayerRopeConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Checks the file against the config, which is the source of truth; there is nothing to load."""
        check_factors_tensor(state_dict, config)
        return {}


class _FactorsOnly(dict):
    """The adapter's tensors, closed to additions: PEFT adds the embeddings of a base model with a resized
    vocabulary afterwards, by `update`, and this adapter never owns those.
    """

    def update(self, *args: Any, **kwargs: Any) -> None:
        pass


def check_factors_tensor(state_dict: dict[str, torch.Tensor], config: LayerRopeConfig) -> None:
    """Checks the content of `adapter_model.safetensors` against `adapter_config.json`.

    Raises:
        AdapterMismatchError: the file holds anything but one float32 tensor of the config's factors.
    """
    keys = sorted(state_dict)
    if keys != [FACTORS_KEY]:
        shown = ", ".join(keys[:5]) or "nothing"
        raise AdapterMismatchError(f"adapter_model.safetensors holds {shown}; expected the one tensor {FACTORS_KEY}.")
    tensor = state_dict[FACTORS_KEY]
    expected = torch.tensor(config.layer_factors, dtype=torch.float32)
    if tensor.dtype != torch.float32 or tensor.shape != expected.shape:
        raise AdapterMismatchError(
            f"adapter_model.safetensors: {FACTORS_KEY} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected "
            f"torch.float32 of shape {tuple(expected.shape)} as in adapter_config.json."
        )
    different = (tensor.cpu() != expected).nonzero().flatten().tolist()
    if different:
        first = different[0]
        raise AdapterMismatchError(
            f"adapter_model.safetensors and adapter_config.json disagree on {len(different)} of {len(expected)} "
            f"layer_factors, first at layer {first}: {tensor[first].item()} and {expected[first].item()}."
        )


def restore_baked(model: nn.Module) -> nn.Module:
    """Re-applies the factors of a model that was saved with `save_pretrained` after `merge_and_unload()`.

    Such a checkpoint holds plain weights; its `config.json` remembers the factors.

    Args:
        model: a model loaded with `from_pretrained`; changed in place.

    Returns:
        The same model, scaled.

    Raises:
        LayerRopeError: the config holds no baked factors, or they are applied already.
    """
    baked = getattr(model.config, BAKED_CONFIG_KEY, None)
    if not isinstance(baked, dict):
        raise LayerRopeError(f"config.{BAKED_CONFIG_KEY} is {baked!r}: this model was not saved from a baked one.")
    stack = find_stack(model)
    if stack.is_baked or stack.wrappers():
        raise LayerRopeError("the factors are applied to this model already.")
    config = LayerRopeConfig(**{name: baked.get(name) for name in _SCALING_FIELDS})
    scaling = _scaling_for(config, model, stack)
    _prove(stack, model)
    _bake(model, stack, scaling)
    return model


_SCALING_FIELDS = ("rope_type", "factor", "layer_factors", "original_max_position_embeddings", "target_length")


def _scaling_for(config: LayerRopeConfig, model: nn.Module, stack: DecoderStack) -> LayerScaling:
    num_layers = len(stack.layers)
    factors = config.resolved_layer_factors(num_layers)
    if len(factors) != num_layers:
        raise AdapterMismatchError(
            f"layer_factors has {len(factors)} entries, but {model_type(model)} has {num_layers} decoder layers."
        )
    if config.rope_type == "dynamic" and any(is_length_dependent(site.rotary) for site in stack.sites):
        raise AdapterMismatchError(
            "rope_type='dynamic' on a model whose own rope_type is 'dynamic' or 'longrope': both depend on the length. "
            "Use rope_type='default', or set the model's own rope_parameters to 'default'."
        )
    window = config.original_max_position_embeddings or getattr(text_config(model), "max_position_embeddings", None)
    if window is None and config.rope_type == "dynamic":
        raise AdapterMismatchError(
            f"rope_type='dynamic' needs the trained window, and {model_type(model)}'s config has no "
            "max_position_embeddings: set original_max_position_embeddings."
        )
    return LayerScaling(config.rope_type, config.factor, tuple(factors), window, config.target_length)


def _wrap(stack: DecoderStack, model: nn.Module) -> None:
    """Proves that every rotary can be scaled, then puts the wrappers and the layers' hooks in place."""
    _prove(stack, model)
    other_tuner = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    for site in stack.sites:
        site.replace(LayerRopeLayer(site.rotary, site.layer_idx, tables_can_be_stacked(site.rotary)))
    keeper = stack.wrappers()[0]
    keeper.hook_handles = _register_hooks(stack)
    # As every PEFT tuner, freeze the base model; but not the weights of a LoRA that is already there.
    keeper.frozen_by_injection = [] if other_tuner else [p for p in model.parameters() if p.requires_grad]
    for parameter in keeper.frozen_by_injection:
        parameter.requires_grad_(False)


def _prove(stack: DecoderStack, model: nn.Module) -> None:
    for site in stack.sites:
        prove_rotary_scales(site.rotary, model_type(model))


def _register_hooks(stack: DecoderStack) -> list[Any]:
    if not stack.has_shared:
        return []
    return [
        layer.register_forward_pre_hook(LayerTableHook(index), with_kwargs=True)
        for index, layer in enumerate(stack.layers)
    ]


def _check_mergeable(names: Sequence[str], layer: LayerRopeLayer) -> None:
    unknown = [name for name in names if name not in layer.scalings]
    if unknown:
        raise ValueError(f"adapters {unknown} do not exist; this model has {sorted(layer.scalings)}.")
    if len(names) != 1:
        raise ValueError(f"merge_and_unload() bakes one LAYER_ROPE adapter, got {list(names)}.")


def _bake(model: nn.Module, stack: DecoderStack, scaling: LayerScaling) -> None:
    """Puts `BakedLayerRope`s in place and records them in `model.config`, which `save_pretrained` writes."""
    wrappers = stack.wrappers()
    if not wrappers:
        _register_hooks(stack)
    for site in stack.sites:
        if wrappers:
            original, stackable = site.rotary.base_layer, site.rotary.stackable
        else:
            original, stackable = site.rotary, tables_can_be_stacked(site.rotary)
        site.replace(BakedLayerRope(original, site.layer_idx, stackable, scaling))
    for wrapper in wrappers:
        wrapper.thaw()  # the layers' hooks stay: they serve the baked modules too
    values = {name: getattr(scaling, name) for name in _SCALING_FIELDS}
    setattr(model.config, BAKED_CONFIG_KEY, {**values, "layer_factors": list(scaling.layer_factors)})
