"""Memory that has run out, on whatever device: how it is told, and how what is cached is given back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import NotEnoughMemoryError
from ..messages import whole_number

MIN_BATCH_TOKENS = 64
"""Memory that does not suffice for this many tokens is not worth halving on."""

T = TypeVar("T")

_MESSAGES = (
    "DefaultCPUAllocator: ",  # it says nothing else; "can't allocate memory", on Windows "not enough memory"
    "MPS backend out of memory",
    "Invalid buffer size: ",  # of MPS, which limits the single tensor too
    "CUDA error: out of memory",  # of CUDA itself, where PyTorch's allocator was not asked
    "HIP error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""How errors begin to speak of it that are plain `RuntimeError`s."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help: the error says that a device, or the machine, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def free_cached_memory() -> None:
    """Has the accelerator's allocator, if there is one, give back what nothing uses any more."""
    if torch.accelerator.is_available():
        empty_cache = getattr(torch.get_device_module(torch.accelerator.current_accelerator()), "empty_cache", None)
        if empty_cache is not None:
            empty_cache()


def with_halving(attempt: Callable[[int], T], batch_tokens: int) -> tuple[T, int]:
    """Calls `attempt(batch_tokens)`, again with half as many tokens whenever memory runs out.

    Returns:
        The result and the number of tokens that worked.

    Raises:
        TaskError: `batch_tokens` is no whole number of at least 1.
        NotEnoughMemoryError: memory does not suffice for a single row.
    """
    whole_number("batch_tokens", batch_tokens, 1)
    while True:
        try:
            return attempt(batch_tokens), batch_tokens
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if batch_tokens <= MIN_BATCH_TOKENS:
                raise NotEnoughMemoryError(
                    f"out of memory even with --batch-tokens {batch_tokens}: use shorter prompts, a smaller dtype "
                    "or a larger device."
                ) from error
        batch_tokens = max(batch_tokens // 2, MIN_BATCH_TOKENS)  # outside `except`: its traceback holds the tensors
        free_cached_memory()


@contextmanager
def recomputing(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which a backward pass runs each layer again instead of keeping its activations (activation
    checkpointing). Both passes have to happen inside.

    Unlike transformers' own it needs no train mode, in which dropout would be on.
    """
    with ExitStack() as stack:
        for layer in layers:
            forward = layer.forward
            layer.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
            stack.callback(_restore, layer, forward)
        yield


def _restore(layer: nn.Module, forward: Callable) -> None:
    if getattr(forward, "__self__", None) is layer:  # the class's own, which the instance had no entry for
        del layer.forward
    else:
        layer.forward = forward
