"""Memory that has run out, on whatever device: how it is told, and how what is cached is given back."""

from __future__ import annotations

import torch

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
