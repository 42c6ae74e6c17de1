"""What a thread or asynchronous task has chosen for itself, apart from how the model is switched for everyone."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

import torch

_REASON = "a context variable cannot be read in a graph: with fullgraph=True, use set_adapter, not use_adapter"

NO_CHOICE = object()
"""Answer of [`chosen`] where the model's own switch decides."""

_choices: ContextVar[Mapping[Hashable, str | None]] = ContextVar("layer_rope_choices", default=MappingProxyType({}))

# How many choices are in force in the whole process, and whether there are any. Compiled code cannot read a context
# variable and would keep the answer it was traced with. It does check a flag, and has another form for when it is up.
_lock = threading.Lock()
_in_force = 0
_any_in_force = False


@contextmanager
def choice(owners: Sequence[Hashable], name: str | None) -> Iterator[None]:
    """Has [`chosen`] answer `name` for each of `owners`, in this thread or task only."""
    _count(1)
    token = _choices.set({**_choices.get(), **dict.fromkeys(owners, name)})
    try:
        yield
    finally:
        _choices.reset(token)
        _count(-1)


def chosen(owner: Hashable) -> str | object | None:
    """Returns what was chosen for `owner` here: a name, None, or [`NO_CHOICE`]."""
    return _look_up(owner) if _any_in_force else NO_CHOICE


@torch.compiler.disable(reason=_REASON)
def _look_up(owner: Hashable) -> str | object | None:
    return _choices.get().get(owner, NO_CHOICE)


def _count(change: int) -> None:
    global _in_force, _any_in_force
    with _lock:
        _in_force += change
        _any_in_force = _in_force > 0
