"""Tries the tuner on one model and says what came out: scaled right, refused with a reason, or wrong.

Three checks, none of which looks at the tuner's own tables:

a. all factors 1: the logits are bit-equal to the base model's;
b. all factors 2: bit-equal to the same model with its own `inv_freq` halved;
c. one layer's factor 2: hidden states up to that layer's input are bit-equal to the base's, and the layer's output
   differs. A layer whose output does not change has no rotation (NoPE, or no attention) and is listed as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from ..config import LayerRopeConfig
from ..errors import LayerRopeError, UnsupportedModelError
from ..rotary import inv_freq_names
from ..sites import DecoderStack, find_stack
from .shrink import FamilyNotBuilt, build_tiny, tiny_inputs

SUPPORTED, REFUSED, NOT_BUILT, WRONG = "supported", "refused", "not built", "wrong"


@dataclass(frozen=True)
class Trial:
    """What became of one family."""

    model_type: str
    status: str  # SUPPORTED, REFUSED, NOT_BUILT or WRONG
    reason: str = ""
    unrotated_layers: list[int] = field(default_factory=list)  # of a supported one: layers without a rotation


class _WrongError(LayerRopeError):
    """A check failed: the scaling does not do what it claims."""


def try_family(model_type: str) -> Trial:
    """Builds the family's tiny model and runs the three checks on it. Never raises for a family's sake."""
    try:
        model = build_tiny(model_type)
        inputs = tiny_inputs(model)
    except FamilyNotBuilt as error:
        return Trial(model_type, NOT_BUILT, str(error))
    return try_model(model, inputs, model_type)


def try_model(model: nn.Module, inputs: Mapping[str, Any], model_type: str) -> Trial:
    """Runs the three checks on `model`, which is left as it was.

    Args:
        model: a small model in `eval()` mode on the CPU.
        inputs: keyword arguments of a forward pass that returns `logits`.
        model_type: named in the result.
    """
    try:
        stack = find_stack(model)
        try:
            base = _run(model, inputs, stack.layers)
        except Exception as error:  # whatever a family's code raises, nothing is known of it without a forward pass
            return Trial(model_type, NOT_BUILT, f"no forward pass on text alone: {type(error).__name__}: {error}")
        peft_model = get_peft_model(model, LayerRopeConfig())
        try:
            unrotated = _checks(peft_model, inputs, stack, base)
        finally:
            peft_model.unload()
    except UnsupportedModelError as error:
        return Trial(model_type, REFUSED, str(error).split(": ", 1)[-1])
    except _WrongError as error:
        return Trial(model_type, WRONG, str(error))
    return Trial(model_type, SUPPORTED, unrotated_layers=unrotated)


def _checks(peft_model: nn.Module, inputs: Mapping[str, Any], stack: DecoderStack, base: _Run) -> list[int]:
    """Checks a, b and c; returns the layers without a rotation."""
    model, num_layers = peft_model.get_base_model(), len(stack.layers)

    def scaled(factors: list[float]) -> _Run:
        peft_model.base_model.set_layer_factors(factors)
        return _run(model, inputs, stack.layers)

    if not torch.equal(scaled([1.0] * num_layers).logits, base.logits):
        raise _WrongError("a: with all factors 1 the logits are not the base model's")
    with peft_model.disable_adapter(), _halved(stack):
        halved = _run(model, inputs, stack.layers).logits
    if torch.equal(halved, base.logits):
        raise _WrongError("b: halving the model's own inv_freq does not change its logits, so nothing can be shown")
    if not torch.equal(scaled([2.0] * num_layers).logits, halved):
        raise _WrongError("b: with all factors 2 the logits are not those of the model with its inv_freq halved")
    unrotated = []
    for layer in range(num_layers):
        run = scaled([2.0 if i == layer else 1.0 for i in range(num_layers)])
        early = [i for i in base.layer_inputs if i <= layer and _differ(run.layer_inputs, base.layer_inputs, i)]
        early += [i for i in base.layer_outputs if i < layer and _differ(run.layer_outputs, base.layer_outputs, i)]
        if early:
            raise _WrongError(f"c: the factor of layer {layer} changes hidden states of layers {sorted(set(early))}")
        if layer not in base.layer_outputs or not _differ(run.layer_outputs, base.layer_outputs, layer):
            unrotated.append(layer)
            if not torch.equal(run.logits, base.logits):
                raise _WrongError(f"c: the factor of layer {layer} changes the logits but not the layer's output")
    if len(unrotated) == num_layers:
        raise _WrongError("c: no layer's output follows its factor")
    return unrotated


@contextmanager
def _halved(stack: DecoderStack) -> Iterator[None]:
    """The model's own frequencies, halved in place (exact in floating point)."""
    buffers = [
        buffer
        for wrapper in stack.wrappers()
        for name in inv_freq_names(wrapper.base_layer)
        for buffer in (getattr(wrapper.base_layer, name), getattr(wrapper.base_layer, f"original_{name}", None))
        if buffer is not None
    ]
    for buffer in buffers:
        buffer.mul_(0.5)
    try:
        yield
    finally:
        for buffer in buffers:
            buffer.mul_(2.0)


@dataclass
class _Run:
    """One forward pass: the logits, and each layer's hidden states in and out."""

    logits: torch.Tensor
    layer_inputs: dict[int, torch.Tensor]  # without layers that text alone does not reach (mllama's)
    layer_outputs: dict[int, torch.Tensor]


def _differ(some: dict[int, torch.Tensor], others: dict[int, torch.Tensor], layer: int) -> bool:
    return not torch.equal(some[layer], others[layer])


def _run(model: nn.Module, inputs: Mapping[str, Any], layers: nn.ModuleList) -> _Run:
    run = _Run(torch.empty(0), {}, {})
    handles = []
    for index, layer in enumerate(layers):

        def record(_: nn.Module, args: tuple, kwargs: dict, output: Any, index: int = index) -> None:
            run.layer_inputs[index] = args[0] if args else kwargs["hidden_states"]
            run.layer_outputs[index] = output if isinstance(output, torch.Tensor) else output[0]

        handles.append(layer.register_forward_hook(record, with_kwargs=True))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)  # a family that draws random numbers in its forward pass draws the same ones
            run.logits = model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    return run
