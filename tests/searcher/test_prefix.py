"""Sharing leading layers, on layers small enough to be followed by hand."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from peft_layerrope.searcher.evaluator import LayerOutputs, PrefixRunner

SIZE = 64  # bytes of one output below: 16 float32
DEPTH = 5


def output() -> torch.Tensor:
    return torch.zeros(16)


class TestLayerOutputs:
    def test_the_least_recently_used_goes_first(self):
        outputs = LayerOutputs(3 * SIZE)
        for name in "abc":
            assert outputs.keep(("x", name), output(), set())
        outputs.use(("x", "a"))
        outputs.keep(("x", "d"), output(), set())
        assert [("x", name) in outputs for name in "abcd"] == [True, False, True, True]
        assert outputs.num_bytes == 3 * SIZE

    def test_what_is_spared_stays_and_what_does_not_fit_is_left_out(self):
        outputs = LayerOutputs(2 * SIZE)
        kept = {("x", "a"), ("x", "b")}
        for key in sorted(kept):
            outputs.keep(key, output(), set())
        assert not outputs.keep(("x", "c"), output(), kept)
        assert not outputs.keep(("x", "d"), torch.zeros(1000), set())
        assert all(key in outputs for key in kept)
        assert outputs.num_bytes == 2 * SIZE

    def test_a_view_counts_the_memory_that_it_keeps_alive(self):
        outputs = LayerOutputs(10 * SIZE)
        outputs.keep(("x", "a"), (torch.zeros(4, 16)[0], None), set())
        assert outputs.num_bytes == 4 * SIZE

    def test_clear(self):
        outputs = LayerOutputs(SIZE)
        outputs.keep(("x", "a"), output(), set())
        outputs.clear()
        assert outputs.num_bytes == 0
        assert ("x", "a") not in outputs

    def test_the_bytes_are_those_of_the_outputs_held(self):
        rng, outputs = random.Random(0), LayerOutputs(20 * SIZE)
        for n in range(300):
            spared = set(rng.sample(list(outputs._outputs), min(3, len(outputs._outputs))))
            outputs.keep(("x", n), torch.zeros(rng.randrange(1, 64)), spared)
            held = [kept for kept, _ in outputs._outputs.values()]
            assert outputs.num_bytes == sum(t.untyped_storage().nbytes() for t in held) <= outputs.max_bytes
            assert all(key in outputs for key in spared)


class Layer(nn.Module):
    """Notes that it ran, and mixes its factor in so that order and depth matter."""

    def __init__(self, factors: list[float], index: int, ran: list[int]) -> None:
        super().__init__()
        self.factors, self.index, self.ran = factors, index, ran

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.ran.append(self.index)
        return torch.sin(x * self.factors[self.index] + self.index)


class Stack(nn.Module):
    """Layers whose factors are set from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = [1.0] * DEPTH
        self.ran: list[int] = []
        self.layers = nn.ModuleList(Layer(self.factors, i, self.ran) for i in range(DEPTH))

    def run(self, vector: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
        self.factors[:] = vector
        for layer in self.layers:
            x = layer(x)
        return x


X = torch.linspace(0, 1, 16)


def vectors(count: int, seed: int = 0) -> list[tuple[float, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.choice((1.0, 1.5, 2.0)) for _ in range(DEPTH)) for _ in range(count)]


@pytest.mark.parametrize("outputs", [0, 1, 3, 7, 1000])
def test_every_result_is_the_plain_one(outputs):
    stack, plain = Stack(), Stack()
    runner = PrefixRunner(stack.layers, outputs * SIZE)
    for vector in vectors(100):
        for name, x in (("x", X), ("y", 2 * X)):
            found = runner.run(name, vector, lambda v=vector, x=x: stack.run(v, x), num_tokens=16)
            assert torch.equal(found, plain.run(vector, x))
            assert runner.outputs.num_bytes <= outputs * SIZE
    assert runner.layers_asked == 200 * DEPTH * 16
    assert runner.layers_run == len(stack.ran) * 16
    assert (runner.layers_run < runner.layers_asked / 2) == (outputs == 1000)


def test_only_what_differs_runs():
    stack = Stack()
    runner = PrefixRunner(stack.layers, 100 * SIZE)
    for vector, ran in [
        ((1.0, 1.0, 1.0, 1.0, 1.0), [0, 1, 2, 3, 4]),
        ((1.0, 1.0, 1.0, 1.0, 2.0), [4]),
        ((1.0, 1.0, 2.0, 1.0, 1.0), [2, 3, 4]),
        ((2.0, 1.0, 1.0, 1.0, 1.0), [0, 1, 2, 3, 4]),
        ((1.0, 1.0, 2.0, 1.0, 2.0), [4]),
    ]:
        stack.ran.clear()
        runner.run("x", vector, lambda v=vector: stack.run(v, X))
        assert stack.ran == ran


def state_of(stack: Stack) -> list[tuple]:
    return [(layer.__dict__.get("forward"), len(layer._forward_hooks)) for layer in stack.layers]


def test_layers_get_their_own_forward_back():
    stack = Stack()
    own = stack.layers[1].forward
    stack.layers[1].forward = wrapped = lambda x: own(x)  # as accelerate's hooks do
    before = state_of(stack)
    runner = PrefixRunner(stack.layers, 100 * SIZE)
    for vector in vectors(20):
        runner.run("x", vector, lambda v=vector: stack.run(v, X))
        assert state_of(stack) == before
    assert stack.layers[1].forward is wrapped


def test_an_error_inside_leaves_nothing_behind():
    stack = Stack()
    before = state_of(stack)
    runner = PrefixRunner(stack.layers, 100 * SIZE)
    runner.run("x", (1.0,) * DEPTH, lambda: stack.run((1.0,) * DEPTH, X))

    def fail() -> None:
        stack.run((1.0, 1.0, 1.0, 1.0, 2.0), X)
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        runner.run("x", (1.0, 1.0, 1.0, 1.0, 2.0), fail)
    assert state_of(stack) == before


def test_a_model_that_bypasses_its_layers_is_an_error():
    stack = Stack()
    runner = PrefixRunner(stack.layers, 100 * SIZE)
    runner.run("x", (1.0,) * DEPTH, lambda: stack.run((1.0,) * DEPTH, X))
    with pytest.raises(RuntimeError, match="0 of 4 skipped layers were called"):
        runner.run("x", (1.0,) * DEPTH, lambda: X)
