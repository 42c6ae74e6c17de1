"""Which adapter a request uses, where one model serves several requests at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import LayerRopeError
from ..messages import named
from .adapter_choice import choice
from .rotary import LayerRopeLayer


@contextmanager
def use_adapter(model: nn.Module, adapter_name: str | None) -> Iterator[None]:
    """Runs a model with one of its LAYER_ROPE adapters, in the current thread or asynchronous task only.

    The model is not changed, so threads may use different adapters of one model at the same time, where
    `set_adapter` and `disable_adapter()` would switch all of them. Contexts nest; the innermost one decides, also over
    `set_adapter` and `disable_adapter()`. A LoRA beside it stays as it is switched.

    It concerns forward passes (`generate()` included); saving, merging and `active_adapters` go by the model's own
    switch. Adding, changing or deleting adapters while requests run still needs a lock of the caller's.

    Enter it in the thread that runs the model: one that is started inside (`nn.DataParallel`, a streamer's) does not
    inherit the choice, unless it is given the context, as by `asyncio.to_thread` or `contextvars.copy_context().run`.

    While any context is open, a model under `torch.compile` is compiled again with graph breaks, and raises with
    `fullgraph=True`. Layers compiled one by one are not concerned.

    Args:
        model: a model with LAYER_ROPE adapters, or one that contains it.
        adapter_name: one of them; None for the base model's own rotation.

    Raises:
        LayerRopeError: the model has no LAYER_ROPE adapter.
        ValueError: no such adapter.

    Example:
    ```py
    >>> with use_adapter(model, "long"):
    ...     answer = model.generate(**request)
    ```
    """
    if not isinstance(model, nn.Module):
        raise LayerRopeError(f"use_adapter: model={named(model)} must be a model with a LAYER_ROPE adapter.")
    layers = [module for module in model.modules() if isinstance(module, LayerRopeLayer)]
    if not layers:
        raise LayerRopeError("use_adapter: this model has no LAYER_ROPE adapter, or it was merged or unloaded.")
    if adapter_name is not None and adapter_name not in layers[0].scalings:
        raise ValueError(f"adapter {adapter_name!r} does not exist; this model has {sorted(layers[0].scalings)}.")
    with choice(layers, adapter_name):
        yield
