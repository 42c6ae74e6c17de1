"""A model on loan: whatever is put onto it is gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..adapted import keeping_modes

_KEPT = ("_modules", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks")


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has the children, the hooks and the mode that it had, every parameter its
    `requires_grad`, and the model its adapter configurations; also when an error is raised halfway through a change.

    What was written into weights in place stays written.
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
