"""Tries the tuner on one model and says what came out: scaled right, refused with a reason, or wrong.

Four checks, none of which looks at the tuner's own tables:

a. all factors 1: the logits are bit-equal to the base model's;
b. all factors 2: bit-equal to the same model with its own `inv_freq` halved;
c. one layer's factor 2: hidden states up to that layer's input are bit-equal to the base's, and the layer's output
   differs. A layer whose output does not change has no rotation (NoPE, or no attention) and is listed as such;
d. a different factor for each layer: shifting all positions by a constant leaves the logits as they are, as with the
   base model. It would not if some layer's queries met keys that were rotated with another layer's factor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from ..errors import LayerRopeError, UnsupportedModelError
from ..tuner.config import LayerRopeConfig
from ..tuner.frequencies import inv_freq_names
from ..tuner.sites import DecoderStack, find_stack
from .shrink import FamilyNotBuilt, build_tiny, tiny_inputs

_SHIFT_TOLERANCE = 1e-3  # of the largest logit; rounding moves them by 1e-6, a wrong rotation by 0.1

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
    """Builds the family's tiny model and runs the four checks on it. Never raises for a family's sake."""
    try:
        model = build_tiny(model_type)
        inputs = tiny_inputs(model)
    except FamilyNotBuilt as error:
        return Trial(model_type, NOT_BUILT, str(error))
    return try_model(model, inputs, model_type)


def try_model(model: nn.Module, inputs: Mapping[str, Any], model_type: str) -> Trial:
    """Runs the four checks on `model`, which is left as it was.

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
            unrotated = _Checks(peft_model, inputs, stack, base).all()
        finally:
            peft_model.unload()
    except UnsupportedModelError as error:
        return Trial(model_type, REFUSED, str(error).split(": ", 1)[-1])
    except _WrongError as error:
        return Trial(model_type, WRONG, str(error))
    if len(unrotated) == len(stack.layers):
        return Trial(model_type, WRONG, "c: no layer's output follows its factor")
    return Trial(model_type, SUPPORTED, unrotated_layers=unrotated)


class _Checks:
    """The four checks on one model with an adapter on it."""

    def __init__(self, peft_model: nn.Module, inputs: Mapping[str, Any], stack: DecoderStack, base: _Run) -> None:
        self.peft_model = peft_model
        self.inputs = inputs
        self.stack = stack
        self.base = base

    def all(self) -> list[int]:
        """Runs them; returns the layers without a rotation."""
        self.ones_change_nothing()
        self.twos_halve_the_frequencies()
        self.only_differences_of_positions_count()
        return [layer for layer in range(len(self.stack.layers)) if not self.layer_responds(layer)]

    def run(self, factors: list[float] | None = None, **inputs: Any) -> _Run:
        """One forward pass, with the factors if given."""
        if factors is not None:
            self.peft_model.base_model.set_layer_factors(factors)
        return _run(self.peft_model.get_base_model(), {**self.inputs, **inputs}, self.stack.layers)

    def factors(self, of_layer: Callable[[int], float]) -> list[float]:
        """A factor for each layer; layers that attend to another's keys get that layer's."""
        return [of_layer(source) for source in self.stack.key_sources]

    def ones_change_nothing(self) -> None:
        """Check a."""
        if not torch.equal(self.run(self.factors(lambda _: 1.0)).logits, self.base.logits):
            raise _WrongError("a: with all factors 1 the logits are not the base model's")

    def twos_halve_the_frequencies(self) -> None:
        """Check b."""
        with self.peft_model.disable_adapter(), _halved(self.stack):
            halved = self.run().logits
        if torch.equal(halved, self.base.logits):
            raise _WrongError("b: halving the model's own inv_freq does not change its logits: nothing can be shown")
        if not torch.equal(self.run(self.factors(lambda _: 2.0)).logits, halved):
            raise _WrongError("b: with all factors 2 the logits are not those of the model with its inv_freq halved")

    def layer_responds(self, layer: int) -> bool:
        """Check c for one layer: whether its output follows its factor (a sharing layer's: that of its source)."""
        base = self.base
        source = self.stack.key_sources[layer]
        run = self.run(self.factors(lambda i: 2.0 if i == source else 1.0))
        early = [i for i in base.layer_inputs if i <= source and _differ(run.layer_inputs, base.layer_inputs, i)]
        early += [i for i in base.layer_outputs if i < source and _differ(run.layer_outputs, base.layer_outputs, i)]
        if early:
            raise _WrongError(f"c: the factor of layer {source} changes hidden states of layers {sorted(set(early))}")
        if layer in base.layer_outputs and _differ(run.layer_outputs, base.layer_outputs, layer):
            return True
        if not torch.equal(run.logits, base.logits):
            raise _WrongError(f"c: the factor of layer {layer} changes the logits but not the layer's output")
        return False

    def only_differences_of_positions_count(self) -> None:
        """Check d, for families whose base model passes it and that take positions."""
        parameters = inspect.signature(self.peft_model.get_base_model().forward).parameters
        name = next((n for n in ("decoder_position_ids", "position_ids") if n in parameters), None)
        if name is None:
            return
        length = self.inputs.get("decoder_input_ids", self.inputs["input_ids"]).shape[1]

        def change_by_shift(factors: list[float]) -> float:
            here, there = (self.run(factors, **{name: torch.arange(length)[None] + shift}).logits for shift in (0, 5))
            return float((here - there).abs().max() / here.abs().max())

        if change_by_shift(self.factors(lambda _: 1.0)) < _SHIFT_TOLERANCE:
            change = change_by_shift(self.factors(lambda i: 1.0 + 0.5 * i))
            if change >= _SHIFT_TOLERANCE:
                raise _WrongError(f"d: with different factors, shifting all positions moves the logits by {change:.0%}")


@contextmanager
def _halved(stack: DecoderStack) -> Iterator[None]:
    """The model's own frequencies, halved in place (exact in floating point)."""
    buffers = {
        id(buffer): buffer  # once each: in some families the original is the same tensor
        for wrapper in stack.wrappers()
        for name in inv_freq_names(wrapper.base_layer)
        for buffer in (getattr(wrapper.base_layer, name), getattr(wrapper.base_layer, f"original_{name}", None))
        if buffer is not None
    }.values()
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
