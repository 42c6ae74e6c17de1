"""A task made of random tokens, the smallest searches, and a model with little memory, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from peft_layerrope import Example, TokenTask
from peft_layerrope.runs import JOURNAL_NAME
from peft_layerrope.searcher.space import FactorGrid, FactorSpace

SMALL_SEARCH = {"steps": 4, "test_groups": 4, "progress": False}
"""Of `search`: every stage, on a task of a few tokens."""
LEAST_SEARCH = {"steps": 1, "test_groups": 2}
"""Of `search`: the shortest there is."""
LEAST_OPTIONS = ("--steps", "1", "--test-groups", "2", "--preflight-groups", "2", "--anyway")
"""Of the command `search`: the shortest there is, whatever the model answers."""

EVENTS = ("plan", "candidate")
"""Entries of a journal that a resumed run has again."""


def journal_of(folder: Path) -> list:
    """Everything in a journal on which a run goes on, in order: its identity, and entries without their times."""
    head, *entries = [json.loads(line) for line in (folder / JOURNAL_NAME).read_text().splitlines()]
    return [head, *([e["kind"], e["key"], e["value"]] for e in entries if e["kind"] not in EVENTS)]


def space_of(
    num_layers: int,
    scaled: Sequence[int] | None = None,
    grid: FactorGrid | None = None,
    sources: Sequence[int] | None = None,
) -> FactorSpace:
    """A space of `num_layers` layers, by default all free on the default grid."""
    return FactorSpace(
        grid or FactorGrid(),
        tuple(range(num_layers) if scaled is None else scaled),
        tuple(range(num_layers) if sources is None else sources),
    )


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


class LimitedMemory:
    """A model whose forward pass fails above `tokens` tokens, with the error that `fail` raises."""

    def __init__(self, model: nn.Module, tokens: int, fail: Callable[[], None] = out_of_memory) -> None:
        self.seen: list[int] = []
        self.tokens, forward = tokens, model.forward

        def limited(input_ids: torch.Tensor, **kwargs: object) -> object:
            self.seen.append(input_ids.numel())
            if input_ids.numel() > tokens:
                fail()
            return forward(input_ids=input_ids, **kwargs)

        model.forward = limited

    @property
    def ran_out(self) -> list[int]:
        """Tokens of the passes that failed."""
        return [count for count in self.seen if count > self.tokens]


def token_task(groups: int = 20, length: int = 24, vocab: int = 99, seed: int = 0) -> TokenTask:
    """Random contexts, of which tokens at the beginning, the middle and the end are asked for."""
    rng = np.random.default_rng(seed)
    examples = []
    for g in range(groups):
        context = tuple(rng.integers(1, vocab, length).tolist())
        for i, at in enumerate((2, length // 2, length - 3)):
            examples.append(Example(context, context[at : at + 1], context[at + 1 : at + 3], i, g))
    return TokenTask(examples)
