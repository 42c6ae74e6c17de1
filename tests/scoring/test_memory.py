"""What counts as memory that has run out, on devices that are not here: by the words of their allocators."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_cli import run

from peft_layerrope.cli import tools
from peft_layerrope.errors import TaskError
from peft_layerrope.scoring.batching import free_cached_memory, is_out_of_memory, with_halving

OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."),
    "xpu": torch.OutOfMemoryError("XPU out of memory. Tried to allocate 2.00 GiB."),
    "mps": RuntimeError(
        "MPS backend out of memory (MPS allocated: 17.91 GB, other allocations: 1.00 MB, max allowed: 18.13 GB). Tried "
        "to allocate 500.00 MB on private pool."
    ),
    "mps, one tensor": RuntimeError("Invalid buffer size: 24.00 GiB"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 36028797018963968 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "cpu, windows": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:73] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 "
        "bytes."
    ),
    "cuda itself": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "python": MemoryError(),
}
SOMETHING_ELSE = [
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("CUDA error: device-side assert triggered"),
    ValueError("MPS backend out of memory"),
]


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_every_device_that_is_out_of_memory_gets_smaller_batches(name):
    error, tried = OUT_OF_MEMORY[name], []

    def attempt(tokens: int) -> str:
        tried.append(tokens)
        if tokens > 300:
            raise error
        return "done"

    def fail(tokens: int) -> None:
        raise error

    assert with_halving(attempt, 1000) == ("done", 250)
    assert tried == [1000, 500, 250]
    with pytest.raises(TaskError, match="out of memory even with --batch-tokens 64") as caught:
        with_halving(fail, 200)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", SOMETHING_ELSE, ids=str)
def test_no_other_error_is_tried_again(error):
    tried = []

    def attempt(tokens: int) -> None:
        tried.append(tokens)
        raise error

    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught:
        with_halving(attempt, 1000)
    assert caught.value is error
    assert tried == [1000]


def test_what_the_cpu_allocator_says_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_the_cache_of_whatever_device_there_is_gets_emptied(device, monkeypatch):
    emptied = []
    accelerator = SimpleNamespace(is_available=lambda: True, current_accelerator=lambda: torch.device(device))
    monkeypatch.setattr(torch, "accelerator", accelerator)
    monkeypatch.setattr(torch, "get_device_module", lambda of: SimpleNamespace(empty_cache=lambda: emptied.append(of)))
    free_cached_memory()
    assert emptied == [torch.device(device)]


@pytest.mark.parametrize("name", ["cuda", "mps", "python"])
def test_a_command_without_batches_says_it_in_one_line(name, monkeypatch):
    def fail(*arguments: object) -> None:
        raise OUT_OF_MEMORY[name]

    monkeypatch.setattr(tools, "load", fail)
    done = run("verify")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: out of memory: use a smaller model or --dtype")
    assert done.stderr.count("\n") == 1
