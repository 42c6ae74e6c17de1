"""Evaluations on Ray workers: several processes, or nodes of a cluster. Needs the `ray` extra.

A worker loads the model once; after that only factor vectors and heat numbers travel to it. Every vector is scored
on its own, so the result depends neither on how many workers there are nor on which of them does what, dies, or has
its work done again by another.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..base_model import ModelSource
from ..checks import is_integer, is_number
from ..errors import SearchError
from ..messages import named, one_line
from ..tuner.sites import embedding_table
from .evaluator import ModelEvaluator
from .ray_actor import unscaled
from .ray_pool import Limits, WorkerPool


class RayWorkers:
    """Has a search's evaluations done by Ray workers: `search(..., distribute=RayWorkers(2))`.

    A worker that dies, or does not answer in time, is replaced, and its work is done again.

    Args:
        num_workers: how many processes, each with its own copy of the model and its own store of shared layers.
        address: of a Ray cluster, as for `ray.init`; default: the Ray that is running in this process or that
            `RAY_ADDRESS` names, else one of its own on this machine.
        model_source: where each worker loads the model: a Hub id or folder that every node can read, a `ModelSource`,
            or a function that returns the model. Default: this process sends its own copy through Ray's object store.
        device: of the workers' models; default: the kind this process's model is on.
        dtype: a torch dtype's name, for a `model_source` that is a name; default: that of this process's model.
        threads_per_worker: CPU threads of each; default: as many as this process has, because sums are split by
            threads, and only the same number gives the same bits.
        cpus_per_worker: what is asked of Ray; default: the number of threads.
        gpus_per_worker: what is asked of Ray; default: 1 if the workers' device is a GPU.
        max_deaths: how many workers may die during one search.
        start_timeout: seconds without any worker at all after which the search gives up.
        chunk_timeout: seconds after which a worker that has not answered counts as dead.
        check: refuse a worker that scores the unscaled model differently from this process, in any bit: its weights,
            dtype, threads or processor are others. False where the workers have to compute on other hardware; they
            should then all have the same.

    Raises:
        SearchError: Ray is not installed, or a number is out of range.

    Example:
    ```py
    >>> with RayWorkers(2) as workers:
    ...     result = search(model, task, distribute=workers)
    ```
    """

    def __init__(
        self,
        num_workers: int,
        address: str | None = None,
        model_source: str | ModelSource | Callable[[], nn.Module] | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        threads_per_worker: int | None = None,
        cpus_per_worker: float | None = None,
        gpus_per_worker: float | None = None,
        max_deaths: int = 10,
        start_timeout: float = 600,
        chunk_timeout: float = 3600,
        check: bool = True,
    ) -> None:
        counts = {"num_workers": (num_workers, 1), "max_deaths": (max_deaths, 0)}
        if threads_per_worker is not None:
            counts["threads_per_worker"] = threads_per_worker, 1
        for name, (value, minimum) in counts.items():
            if not is_integer(value) or value < minimum:
                raise SearchError(f"{name}={value!r} must be an integer of at least {minimum}.")
        for name, value, allowed in (
            ("cpus_per_worker", cpus_per_worker, cpus_per_worker is None or _at_least_zero(cpus_per_worker)),
            ("gpus_per_worker", gpus_per_worker, gpus_per_worker is None or _at_least_zero(gpus_per_worker)),
            ("start_timeout", start_timeout, _at_least_zero(start_timeout) and start_timeout > 0),
            ("chunk_timeout", chunk_timeout, _at_least_zero(chunk_timeout) and chunk_timeout > 0),
        ):
            if not allowed:
                least = "at least 0" if name.endswith("worker") else "more than 0"
                raise SearchError(f"{name}={named(value)} must be a number of {least}.")
        self._ray = _import_ray()
        self._num_workers = num_workers
        self._address = address
        self._model_source = model_source
        self._device = device
        self._dtype = dtype
        self._threads = threads_per_worker
        self._cpus = cpus_per_worker
        self._gpus = gpus_per_worker
        self._limits = Limits(max_deaths, start_timeout, chunk_timeout)
        self._check = check
        self._started_ray = False
        self._pool: WorkerPool | None = None

    def __call__(self, local: ModelEvaluator) -> WorkerPool:
        """Starts workers for one search, in place of those of an earlier one, and waits for the first of them.

        Args:
            local: this process's evaluator; it says what the workers do, and is what they are compared with.

        Raises:
            SearchError: Ray cannot be reached, the model cannot be sent, or no worker started.
            LayerRopeError: a worker could not load the model.
        """
        if self._pool is not None:
            self._pool.close()
        model = local.model.get_base_model()
        weight = embedding_table(model)
        threads = self._threads or torch.get_num_threads()
        device = self._device or weight.device.type
        on_gpu = device.split(":")[0] not in ("cpu", "meta")
        resources = {
            "num_cpus": threads if self._cpus is None else self._cpus,
            "num_gpus": int(on_gpu) if self._gpus is None else self._gpus,
            "scheduling_strategy": "SPREAD",
            "max_restarts": 0,  # a worker that comes back by itself would have no model
        }
        self._start_ray(resources["num_cpus"])
        spec = {
            "make": local.recipe(),
            "adapter": local.model.peft_config[local.model.active_adapter],
            "source": self._model_source,
            "model": None if self._model_source is not None else self._packed(local.model),
            "device": device,
            "dtype": self._dtype or str(weight.dtype).removeprefix("torch."),
            "threads": threads,
        }
        expected = local.measure([unscaled(local.model)], 0)[0] if self._check else None
        self._pool = WorkerPool(self._ray, local, spec, expected, self._num_workers, resources, self._limits)
        self._pool.wait_until_ready(1)
        return self._pool

    def _start_ray(self, cpus_per_worker: float) -> None:
        ray = self._ray
        if ray.is_initialized():
            return
        address = self._address or os.environ.get("RAY_ADDRESS") or "local"
        options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
        if address == "local":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # an actor that asks for more than there is would wait for ever
            wanted = int(-(-self._num_workers * cpus_per_worker // 1))
            options |= {"num_cpus": max(os.cpu_count() or 1, wanted), "include_dashboard": False}
        try:
            with _keeping_sigterm():  # Ray would end this process with status 15 and without a word
                ray.init(**options)
        except (OSError, RuntimeError, ValueError) as error:
            raise SearchError(f"Ray at {address!r} cannot be used: {one_line(error)}") from error
        self._started_ray = True

    def _packed(self, model: nn.Module) -> bytes:
        buffer = io.BytesIO()
        try:
            # torch's format and not plain pickle: it can be read onto another device, and keeps tied weights tied
            torch.save(model, buffer, pickle_module=self._ray.cloudpickle)
        except Exception as error:  # whatever the model's own classes raise
            raise SearchError(
                f"the model cannot be sent to Ray workers ({one_line(error)}): pass model_source=, a name or a "
                "function from which they load it."
            ) from error
        return buffer.getvalue()

    def close(self) -> None:
        """Ends the workers, and Ray if this object started it."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        if self._started_ray:
            self._ray.shutdown()
            self._started_ray = False

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Puts what happens at SIGTERM back afterwards."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _at_least_zero(value: Any) -> bool:
    return is_number(value) and value >= 0


def _import_ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise SearchError("distributing a search needs Ray: pip install 'peft-layerrope[ray]'") from error
    return ray
