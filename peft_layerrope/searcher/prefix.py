"""Shares the leading layers of factor vectors that begin alike.

The output of layer l depends on the input and on the factors up to l, so a vector whose first factors were seen
before can start from the stored output of the last common layer. The model's own forward runs every time; the
layers that are already known answer from the store.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from .grid import Factors

T = TypeVar("T")
Key = tuple[Any, Factors]


class LayerOutputs:
    """Outputs of decoder layers, the least recently used dropped first, in a fixed number of bytes.

    Args:
        max_bytes: memory of all outputs together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._outputs: OrderedDict[Key, tuple[Any, int]] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._outputs

    def use(self, key: Key) -> Any:
        """Returns an output and marks it as used."""
        self._outputs.move_to_end(key)
        return self._outputs[key][0]

    def keep(self, key: Key, output: Any, spared: set[Key]) -> bool:
        """Stores an output if there is room once older ones, except `spared`, are dropped; says whether it did."""
        size = _num_bytes(output)
        droppable = sum(entry[1] for old, entry in self._outputs.items() if old not in spared)
        if self.num_bytes - droppable + size > self.max_bytes:
            return False
        for old in [old for old in self._outputs if old not in spared]:
            if self.num_bytes + size <= self.max_bytes:
                break
            self.num_bytes -= self._outputs.pop(old)[1]
        self._outputs[key] = output, size
        self.num_bytes += size
        return True

    def shrink(self) -> None:
        """Drops everything, and keeps to half the memory from now on."""
        self.clear()
        self.max_bytes //= 2

    def clear(self) -> None:
        """Drops everything."""
        self._outputs.clear()
        self.num_bytes = 0


class PrefixRunner:
    """Runs a model's forward for one factor vector, from the deepest stored output of its leading layers.

    Args:
        layers: the decoder layers, in order.
        max_bytes: memory for stored outputs; 0 shares nothing.

    Attributes:
        layers_run: decoder layers really run, each times the tokens of its batch.
        layers_asked: the same of what would have run without sharing.
    """

    def __init__(self, layers: Sequence[nn.Module], max_bytes: int) -> None:
        self._layers = list(layers)
        self.outputs = LayerOutputs(max_bytes)
        self.layers_run = 0
        self.layers_asked = 0

    def run(
        self, batch: Any, vector: Factors, forward: Callable[[], T], num_tokens: int = 1, only: int | None = None
    ) -> T:
        """Returns `forward()`, which must run the model once, on `batch` and with the factors `vector`.

        Args:
            batch: hashable name of the model's input.
            vector: the factors in force, one per layer.
            forward: runs the model.
            num_tokens: size of the batch, for the counts.
            only: store only the output after so many layers; default: all.
        """
        depth = self._known_depth(batch, vector)
        with self._answering(batch, vector, depth), self._storing(batch, vector, depth, only):
            result = forward()
        self.layers_run += (len(self._layers) - depth) * num_tokens
        self.layers_asked += len(self._layers) * num_tokens
        return result

    def _known_depth(self, batch: Any, vector: Factors) -> int:
        """How many leading layers need not run."""
        for depth in range(len(self._layers) - 1, 0, -1):
            if (batch, vector[:depth]) in self.outputs:
                return depth
        return 0

    @contextmanager
    def _answering(self, batch: Any, vector: Factors, depth: int) -> Iterator[None]:
        """Lets the first `depth` layers answer with the stored output of the last of them."""
        if not depth:
            yield
            return
        stored = self.outputs.use((batch, vector[:depth]))
        for shorter in range(depth - 1, 0, -1):  # the shallow ones, which most vectors share, are marked last
            if (batch, vector[:shorter]) in self.outputs:
                self.outputs.use((batch, vector[:shorter]))
        calls = []

        def answer(*args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            return stored

        with ExitStack() as stack:
            for layer in self._layers[:depth]:
                stack.callback(_restore_forward, layer, layer.__dict__.get("forward"))
                layer.forward = answer
            yield
        if len(calls) != depth:
            raise RuntimeError(f"{len(calls)} of {depth} skipped layers were called: the model bypasses its layers.")

    @contextmanager
    def _storing(self, batch: Any, vector: Factors, depth: int, only: int | None) -> Iterator[None]:
        """Stores the outputs of the layers from `depth` on, except the last, shallow ones first."""
        spared = {(batch, vector[:shorter]) for shorter in range(1, len(self._layers))}
        handles = []

        def hook(number: int) -> Callable:
            def store(module: nn.Module, args: Any, output: Any) -> None:
                self.outputs.keep((batch, vector[:number]), output, spared)

            return store

        if self.outputs.max_bytes:
            for index in range(depth, len(self._layers) - 1):
                if only in (None, index + 1):
                    handles.append(self._layers[index].register_forward_hook(hook(index + 1)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _restore_forward(layer: nn.Module, forward: Callable | None) -> None:
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward


def _num_bytes(output: Any) -> int:
    tensors = [output] if isinstance(output, torch.Tensor) else [t for t in output if isinstance(t, torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
