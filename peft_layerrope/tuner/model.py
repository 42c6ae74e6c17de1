"""`LayerRopeModel`: the PEFT tuner. Injects, saves and loads, bakes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from ..errors import AdapterMismatchError, LayerRopeError
from .artifacts import FACTORS_KEY, KEY_PREFIX, check_factors, check_weights_file
from .config import PREFIX, LayerRopeConfig
from .injection import BAKED_CONFIG_KEY, bake, other_tuner_layers, scaling_for, wrap
from .rotary import LayerRopeLayer
from .sites import DecoderStack, find_stack


class LayerRopeModel(BaseTuner):
    """Scales the rotary embedding of every decoder layer by that layer's factor (arXiv 2503.04355).

    The method adds no trainable weight and touches no existing one. Use it as any PEFT tuner: through
    `get_peft_model` or `PeftModel.from_pretrained`.

    Beside a LoRA on the same model it concerns itself with its own adapters only: it neither switches, freezes nor
    deletes anything of the LoRA's, and keeps its configurations apart.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to be adapted, changed in place.
        config ([`LayerRopeConfig`]): The factors.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.

    Raises:
        LayerRopeError: the model, or the adapter's name, is taken; the message says by what.
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

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig | dict[str, PeftConfig], adapter_name: str, **kwargs: Any
    ) -> None:
        if isinstance(getattr(model, "base_model", None), LayerRopeModel):
            raise LayerRopeError(
                "this is a LAYER_ROPE PeftModel already: add another adapter with model.add_adapter(name, config) or "
                "model.load_adapter(folder, adapter_name=name), and choose with model.set_adapter(name)."
            )
        configs = getattr(model, "peft_config", None) or {}
        holds_other_tuner = isinstance(model, (PeftModel, BaseTuner))
        if adapter_name in configs and not holds_other_tuner:
            taken_by = configs[adapter_name].peft_type.value
            raise LayerRopeError(
                f"adapter name {adapter_name!r} is taken by a {taken_by} adapter of this model: pass another "
                "adapter_name, such as 'layer_rope'."
            )
        super().__init__(model, peft_config, adapter_name, **kwargs)
        # PEFT has just put our adapters in the place of those that the model had.
        model.peft_config = configs if holds_other_tuner else {**configs, **self.peft_config}
        wrappers = self._stack().wrappers()
        # Where the first adapter was read from, whose weights file PEFT has not opened yet.
        self._unread = {adapter_name: self.peft_config[adapter_name].origin}
        if isinstance(peft_config, dict):  # called by a PeftModel
            for wrapper in wrappers:
                wrapper.has_peft_model = True
        else:  # called by inject_adapter_in_model, for which the model itself stands
            wrappers[0].start_recording()

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.peft_config = _AdapterConfigs(self.peft_config)

    def __getattr__(self, name: str) -> Any:
        if name == "peft_config":  # PEFT asks before it is set; a LoRA's inside `self.model` must not answer
            raise AttributeError(name)
        return super().__getattr__(name)

    def inject_adapter(self, model: nn.Module, adapter_name: str, **_: Any) -> None:
        """Wraps the rotary embeddings (first adapter) or adds the adapter to the wrappers (later ones).

        Everything is checked before the model is changed. What else PEFT passes is about weights, of which there are
        none to place or cast.
        """
        config: LayerRopeConfig = self.peft_config[adapter_name]
        stack = find_stack(model)
        scaling = scaling_for(config, model, stack)
        _check_files(config, stack)  # PEFT reads the weights file only after injection, which a bad one would outlive
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
            wrap(stack, model)
        elif adapter_name in stack.wrappers()[0].scalings:
            raise LayerRopeError(
                f"adapter {adapter_name!r} is in this model already: pass another adapter_name, or change its factors "
                "with set_layer_factors."
            )
        for wrapper in stack.wrappers():
            wrapper.set_scaling(adapter_name, scaling)
        config.layer_factors = list(scaling.layer_factors)
        self.targeted_module_names = [site.name for site in stack.sites]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._add_config_to_model(adapter_name, config)

    def _without_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: there are no weights to cast, and `inject_adapter` replaces PEFT's walk."""

    _create_and_replace = _cast_adapter_dtype = _without_weights

    def _stack(self) -> DecoderStack:
        stack = find_stack(self.model)
        if not stack.wrappers():
            raise LayerRopeError("the adapter is no longer in this model: it was unloaded or merged.")
        return stack

    def set_layer_factors(self, layer_factors: Sequence[float], adapter_name: str = "default") -> None:
        """Replaces an adapter's factors in place, validated as on construction.

        Args:
            layer_factors: one positive factor per layer.
            adapter_name: an adapter of this model.

        Raises:
            ValueError: no such adapter.
            InvalidConfigError: a factor is not a positive finite number.
            AdapterMismatchError: wrong number of factors.
        """
        stack = self._stack()
        wrappers = stack.wrappers()
        wrappers[0].check_known([adapter_name])
        config: LayerRopeConfig = self.peft_config[adapter_name]
        changed = LayerRopeConfig(**{**config.to_dict(), "layer_factors": list(layer_factors)})
        scaling = scaling_for(changed, self.model, stack)
        for wrapper in wrappers:
            wrapper.set_scaling(adapter_name, scaling)
        config.layer_factors = changed.layer_factors

    def train(self, mode: bool = True) -> LayerRopeModel:
        """Sets training or evaluation mode, as for any module.

        Raises:
            LayerRopeError: a LoRA inside would be trained, of which this model's checkpoints hold nothing.
        """
        if mode:
            _refuse_lost_training(self)
        return super().train(mode)

    def reload_adapter(self, adapter_name: str, config: LayerRopeConfig) -> None:
        """Puts what was read from a folder in an adapter's place, validated as on construction; raises
        AdapterMismatchError if the factors do not fit the model or the folder's other file, or the adapter was made in
        Python and rotates otherwise.
        """
        present, stack = self.peft_config[adapter_name], self._stack()
        wrappers, scaling = stack.wrappers(), scaling_for(config, self.model, stack)
        config.layer_factors = list(scaling.layer_factors)
        if scaling.to_plain() == wrappers[0].scalings[adapter_name].to_plain():
            return
        if present.origin is None:
            raise AdapterMismatchError(
                f"adapter {adapter_name!r} was made from a configuration that rotates otherwise than {config.origin!r} "
                "says: load that under another adapter_name, or delete this one first."
            )
        _check_files(config, stack)
        for wrapper in wrappers:
            wrapper.set_scaling(adapter_name, scaling)
        config.inference_mode = present.inference_mode
        self.peft_config[adapter_name] = config
        self._add_config_to_model(adapter_name, config)

    # PEFT's versions of these walk over every method's layers and over the modules that a LoRA trains in full
    # (`modules_to_save`), where our adapter's name, often "default" as well, would select the LoRA's.

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activates an adapter of this tuner, an empty list none; raises ValueError of several and of others."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        wrappers = self._stack().wrappers()
        wrappers[0].check_known(names)
        for wrapper in wrappers:
            wrapper.set_adapter(names, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter of this tuner. If it was active, another one is, with a warning."""
        wrappers = self._stack().wrappers()
        wrappers[0].check_known([adapter_name])
        for wrapper in wrappers:
            wrapper.delete_adapter(adapter_name)
        self.active_adapter = wrappers[0].active_adapters
        self.peft_config.pop(adapter_name, None)
        self._unread.pop(adapter_name, None)
        self._drop_configs_of_model([adapter_name])

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Nothing to do: there are no weights."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Leaves the output as it is, which is all that an in-place merge promises: there are no weights."""
        active = self._stack().wrappers()[0].active_adapters
        if adapter_names is not None and list(adapter_names) != list(active):
            raise ValueError(f"only the active adapter {active} can be merged, got {adapter_names}: set_adapter first.")

    def unmerge_adapter(self) -> None:
        """Counterpart of [`merge_adapter`]."""

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for wrapper in self._stack().wrappers():
            wrapper.switch(enabled)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """PEFT's way of telling which adapter each row of the batch wants. A LoRA inside may know; we do not."""
        inner = getattr(self.model, "_enable_peft_forward_hooks", None)
        if inner is not None:
            return inner(*args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            raise LayerRopeError(
                f"adapter_names={kwargs['adapter_names']!r}: LAYER_ROPE cannot use a different adapter for each row, "
                "since a batch shares one rotation. Use model.set_adapter(name) for a batch of one adapter."
            )
        return nullcontext()

    def _unload_and_optionally_merge(
        self, merge: bool = True, *, adapter_names: list[str] | None = None, **_: Any
    ) -> nn.Module:
        stack = self._stack()
        wrappers = stack.wrappers()
        if other_tuner_layers(self.model):  # the LoRA wants the base model as frozen as it is
            wrappers[0].frozen_by_injection.clear()
        if merge:
            names = adapter_names if adapter_names is not None else wrappers[0].active_adapters
            wrappers[0].check_known(names)
            if len(names) != 1:
                raise ValueError(f"merge_and_unload() bakes one LAYER_ROPE adapter, got {list(names)}.")
            bake(self.model, stack, wrappers[0].scalings[names[0]])
        else:
            for site in stack.sites:
                site.replace(site.rotary.release())
        self._drop_configs_of_model(wrappers[0].scalings)
        return self.model

    def _add_config_to_model(self, adapter_name: str, config: LayerRopeConfig) -> None:
        """Lists an adapter where transformers looks for a model's; a LoRA's by that name, found there, stays."""
        configs = self.model.__dict__.get("peft_config")
        if configs is not None and isinstance(configs.get(adapter_name, config), LayerRopeConfig):
            self.model.peft_config = {**configs, adapter_name: config}

    def _drop_configs_of_model(self, names: Iterable[str]) -> None:
        configs = self.model.__dict__.get("peft_config")  # a LoRA's PeftModel has none there, and keeps its own
        for name in names if configs is not None else ():
            if isinstance(configs.get(name), LayerRopeConfig):
                del configs[name]
        if configs is not None and not configs:
            del self.model.peft_config

    # Saving and loading. PEFT calls these as class methods; `model` is the PeftModel (or an injected base model).

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: LayerRopeConfig, **_: Any) -> dict[str, torch.Tensor]:
        if isinstance(model, PeftModel) and model.base_model.training:  # a refused train() has set the PeftModel's own
            _refuse_lost_training(model)
        # As for any method, the keys have the PeftModel's prefix only if there is one; transformers adds it on saving.
        key = FACTORS_KEY if isinstance(model, PeftModel) else FACTORS_KEY.removeprefix(KEY_PREFIX)
        return _FactorsOnly({key: torch.tensor(config.layer_factors, dtype=torch.float32)})

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, config: LayerRopeConfig, state_dict: dict[str, torch.Tensor], **_: Any
    ) -> dict[str, torch.Tensor]:
        """Checks the file against the config, which is the source of truth; there is nothing to load."""
        check_factors(state_dict, config.layer_factors)
        return {}


def replace_on_load() -> None:
    """Has `PeftModel.load_adapter` put a folder's adapter in the place of one whose name it is given.

    Of a name in use PEFT reads the weights alone, which it replaces; what an adapter of ours does is in the
    configuration as well, and PEFT has no hook there.
    """
    load_adapter = PeftModel.load_adapter

    @wraps(load_adapter)
    def replacing(self: PeftModel, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        tuner = self.base_model
        if isinstance(tuner, LayerRopeModel) and adapter_name in tuner.peft_config:
            if tuner._unread.get(adapter_name) != str(model_id):  # else it is `from_pretrained`, which has just read it
                download, _ = self._split_kwargs(kwargs)
                tuner.reload_adapter(adapter_name, LayerRopeConfig.from_pretrained(model_id, **download))
            tuner._unread.pop(adapter_name, None)
        return load_adapter(self, model_id, adapter_name, *args, **kwargs)

    PeftModel.load_adapter = replacing


class _AdapterConfigs(dict):
    """The tuner's adapters. PEFT hands this dictionary to a tuner that is laid over a LAYER_ROPE PeftModel and lets it
    add its own adapters, before it changes the model. That is the place to stop it.
    """

    def __setitem__(self, name: str, config: PeftConfig) -> None:
        if not isinstance(config, LayerRopeConfig):
            kind = config.peft_type.value
            raise LayerRopeError(
                f"a {kind} adapter over a LAYER_ROPE PeftModel would have `base_model.model.` twice in its keys, which "
                f"fit no plain base model and no published {kind}. To train one, bake the factors in first: base = "
                "model.merge_and_unload(), then get_peft_model(base, config). To use a trained one, load it first, and "
                "LAYER_ROPE onto that PeftModel with PeftModel.from_pretrained. To train and switch both, put it onto "
                "model.get_base_model()."
            )
        super().__setitem__(name, config)

    def update(self, configs: Mapping[str, PeftConfig]) -> None:  # dict's own would not pass through __setitem__
        for name, config in configs.items():
            self[name] = config


class _FactorsOnly(dict):
    """The adapter's tensors, closed to additions: PEFT adds the embeddings of a base model with a resized
    vocabulary afterwards, by `update`, and this adapter never owns those.
    """

    def update(self, *args: Any, **kwargs: Any) -> None:
        pass


def _check_files(config: LayerRopeConfig, stack: DecoderStack) -> None:
    """Checks the weights file beside a config that was read, once."""
    if config.files is not None:
        weights = config.files.find(SAFETENSORS_WEIGHTS_NAME)
        check_weights_file(weights, config.files.layer_factors or [1.0] * len(stack.layers))
        config.files = None


def _refuse_lost_training(model: nn.Module) -> None:
    """Raises LayerRopeError if a LoRA inside a LAYER_ROPE PeftModel is to be trained: it would be saved nowhere."""
    trained = sum(parameter.requires_grad for layer in other_tuner_layers(model) for parameter in layer.parameters())
    if trained:
        raise LayerRopeError(
            f"{trained} tensors of another adapter inside this LAYER_ROPE PeftModel are to be trained, and what it "
            "saves holds the factors alone. Train and save that adapter's own PeftModel, which is scaled as well; or "
            "freeze it, or call eval()."
        )
