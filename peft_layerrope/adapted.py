"""A model with an adapter for as long as something needs it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel, get_peft_model
from torch import nn

from .tuner.config import LayerRopeConfig


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
            peft_model = get_peft_model(model, config)
        try:
            yield peft_model
        finally:
            peft_model.unload()
