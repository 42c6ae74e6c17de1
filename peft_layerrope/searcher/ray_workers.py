"""Candidates evaluated by Ray's actors, with the result of a single process."""

from __future__ import annotations

import io
import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from ..base_model import ModelSource, load_base
from ..errors import LayerRopeError, SearchError
from ..messages import is_integer, is_number, named, one_line
from ..scoring.scores import PositionScores
from ..tuner.sites import embedding_table, find_stack
from .evaluator import HeatScores, ModelEvaluator, cut_into_chunks
from .space import Factors


@dataclass(frozen=True)
class Reply:
    """What a worker returns of one chunk."""

    values: dict[Factors, Any]
    batch_tokens: int
    layers_run: int
    layers_asked: int


class Actor:
    """Lives in a worker process. `__init__` does nothing, so that what goes wrong comes back as an ordinary error."""

    def __init__(self) -> None:
        self._evaluator: ModelEvaluator | None = None

    def start(self, spec: dict[str, Any], batch_tokens: int, check: bool) -> tuple[str, HeatScores | None]:
        """Loads the model; returns where this is, and with `check` the scores of the unscaled model on heat 0."""
        torch.set_num_threads(spec["threads"])
        if spec["source"] is None:
            model = torch.load(io.BytesIO(spec["model"]), map_location=spec["device"], weights_only=False)
        else:
            model = get_peft_model(_load(spec), spec["adapter"])
        self._model, self._make = model, spec["make"]
        self._evaluator = self._make(model, batch_tokens=batch_tokens)
        scores = self._evaluator.measure([unscaled(model)], 0)[0] if check else None
        return f"process {os.getpid()} on {platform.node()}", scores

    def run(self, method: str, vectors: list[Factors], heat: int, batch_tokens: int) -> Reply:
        """Scores vectors with batches of at most `batch_tokens`; fewer, and the reply says so, if memory runs out."""
        if self._evaluator.batch_tokens != batch_tokens:
            self._evaluator = self._make(self._model, batch_tokens=batch_tokens)
        evaluator = self._evaluator
        before = evaluator.layers_run, evaluator.layers_asked
        if method == "measure":
            values = dict(zip(vectors, evaluator.measure(vectors, heat), strict=True))
        else:
            values = evaluator.score(vectors, heat)
        run, asked = evaluator.layers_run - before[0], evaluator.layers_asked - before[1]
        return Reply(values, evaluator.batch_tokens, run, asked)


def _load(spec: dict[str, Any]) -> nn.Module:
    source = spec["source"]
    if isinstance(source, str):
        source = ModelSource(source, dtype=spec["dtype"])
    if isinstance(source, ModelSource):
        return load_base(source if source.device_map is not None else replace(source, device=spec["device"]))
    return spec["source"]().to(spec["device"])


def unscaled(model: nn.Module) -> Factors:
    """The vector that changes nothing."""
    return (1.0,) * len(find_stack(model.get_base_model()).layers)


CHUNKS_PER_WORKER = 3
"""Pieces a request is cut into, for each worker: a fast one, or one that joins late, takes more of them."""

_POLL = 0.5  # seconds between two looks at the clock while nothing happens
_RESUMABLE = "What was measured is kept where the search has a folder: it can be resumed from there."


@dataclass(frozen=True)
class Limits:
    """When a pool gives up: after so many deaths; without a worker, or without an answer, for so many seconds."""

    max_deaths: int
    start_timeout: float
    chunk_timeout: float


@dataclass(eq=False)
class _Worker:
    """One actor as the searching process sees it.

    Attributes:
        number: 0, 1, ...; a replacement keeps it.
        actor: its Ray handle.
        pending: the reply it owes: to `start`, or of `chunk`.
        since: when that was asked for.
        place: where it runs; None until it has started.
        chunk: what it is working on.
        prefixes: beginnings of the vectors it was given, whose layers it probably has in store.
    """

    number: int
    actor: Any
    pending: Any
    since: float
    place: str | None = None
    chunk: list[Factors] | None = None
    prefixes: set[Factors] = field(default_factory=set)

    def known_depth(self, chunk: Sequence[Factors]) -> int:
        """How many leading layers of a vector of `chunk` this worker has seen."""
        return max(next((depth for depth in range(len(v), 0, -1) if v[:depth] in self.prefixes), 0) for v in chunk)


class WorkerPool:
    """The workers of one search, as an [`Evaluator`].

    Args:
        ray: the module.
        local: this process's evaluator.
        spec: what a worker starts from.
        expected: scores of the unscaled model on heat 0 that each worker must reproduce; None: any.
        num_workers: how many.
        resources: options of their actors.
        limits: deaths and waiting times.
    """

    def __init__(
        self,
        ray: ModuleType,
        local: ModelEvaluator,
        spec: dict[str, Any],
        expected: HeatScores | None,
        num_workers: int,
        resources: dict[str, Any],
        limits: Limits,
    ) -> None:
        self._ray = ray
        self._local = local
        self._expected = expected
        self._resources = resources
        self._limits = limits
        self._batch_tokens = local.batch_tokens
        self._layers_run = self._layers_asked = 0
        self._actor_class = ray.remote(Actor)
        self._spec = ray.put(spec)
        self._last_alive = time.monotonic()
        self._deaths: list[str] = []
        self._workers: list[_Worker] = []
        self._closed = False
        for number in range(num_workers):
            self._workers.append(self._new_worker(number))

    @property
    def deaths(self) -> int:
        """Workers that died so far."""
        return len(self._deaths)

    @property
    def places(self) -> dict[int, str]:
        """Number of each worker that has started, and where it runs."""
        return {worker.number: worker.place for worker in self._workers if worker.place is not None}

    @property
    def layers_run(self) -> int:
        """Decoder layers that really ran, each times its tokens, here and in all workers."""
        return self._local.layers_run + self._layers_run

    @property
    def layers_asked(self) -> int:
        """The same of what evaluating every vector alone would have run."""
        return self._local.layers_asked + self._layers_asked

    @property
    def at_once(self) -> int:
        """How many vectors are worth asking for at once."""
        return len(self._workers)

    def measure(self, vectors: Sequence[Factors], heat: int) -> list[HeatScores]:
        """See [`Evaluator`].

        Raises:
            SearchError: too many workers died, none could be started, or one failed.
            TaskError: a worker's memory does not suffice for a single row.
        """
        scores = self._request("measure", vectors, heat)
        return [scores[vector] for vector in vectors]

    def score(self, vectors: Sequence[Factors], heat: int) -> dict[Factors, PositionScores]:
        """See [`Evaluator`]; raises what `measure` does."""
        return self._request("score", vectors, heat)

    def wait_until_ready(self, count: int | None = None) -> None:
        """Waits until `count` workers, or all, have loaded the model.

        Raises:
            SearchError: they did not within the time for starting, or their scores are not this process's.
            LayerRopeError: the model could not be loaded.
        """
        wanted = len(self._workers) if count is None else count
        deadline = time.monotonic() + self._limits.start_timeout
        with self._closing_on_error():
            while len(self.places) < wanted:
                if time.monotonic() > deadline:
                    raise SearchError(self._too_late())
                self._answers({}, [])

    def close(self) -> None:
        """Ends the workers."""
        if self._closed:
            return
        self._closed = True
        if self._ray.is_initialized():
            for worker in self._workers:
                self._ray.kill(worker.actor)
        self._workers.clear()
        self._spec = None

    def _request(self, method: str, vectors: Sequence[Factors], heat: int) -> dict[Factors, Any]:
        """Has every distinct vector done by somebody."""
        if self._closed:
            raise SearchError("the Ray workers of this search were closed.")
        wanted = sorted(set(vectors))
        found: dict[Factors, Any] = {}
        todo = cut_into_chunks(wanted, CHUNKS_PER_WORKER * len(self._workers))
        with self._closing_on_error():
            while len(found) < len(wanted):
                for worker in self._workers:
                    if todo and worker.pending is None:
                        self._hand_out(worker, todo.pop(self._choice(worker, todo)), method, heat)
                self._answers(found, todo)
        return {vector: found[vector] for vector in wanted}

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        """Ends the workers when a request fails: their answers would belong to nobody."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _new_worker(self, number: int) -> _Worker:
        actor = self._actor_class.options(**self._resources).remote()
        check = self._expected is not None
        return _Worker(number, actor, actor.start.remote(self._spec, self._batch_tokens, check), time.monotonic())

    def _choice(self, worker: _Worker, todo: Sequence[list[Factors]]) -> int:
        """Index of the chunk whose beginnings `worker` knows best, compared with the others."""
        others = [other for other in self._workers if other is not worker]

        def advantage(index: int) -> int:
            theirs = max((other.known_depth(todo[index]) for other in others), default=0)
            return worker.known_depth(todo[index]) - theirs

        return max(range(len(todo)), key=advantage)

    def _hand_out(self, worker: _Worker, chunk: list[Factors], method: str, heat: int) -> None:
        worker.chunk, worker.since = chunk, time.monotonic()
        worker.pending = worker.actor.run.remote(method, chunk, heat, self._batch_tokens)
        worker.prefixes.update(vector[:depth] for vector in chunk for depth in range(1, len(vector)))

    def _answers(self, found: dict[Factors, Any], todo: list[list[Factors]]) -> None:
        """Waits for the next answers and enters them into `found`; what has to be done again goes to `todo`."""
        pending = {worker.pending: worker for worker in self._workers if worker.pending is not None}
        ready, _ = self._ray.wait(list(pending), timeout=_POLL)
        for reference in ready:
            worker = pending[reference]
            try:
                answer = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise _failure(error, worker) from error
            except self._ray.exceptions.RayError as error:
                self._replace(worker, _reason(error), todo)
                continue
            worker.pending, chunk, worker.chunk = None, worker.chunk, None
            self._last_alive = time.monotonic()
            if chunk is None:
                self._enter_start(worker, *answer)
            else:
                self._enter(answer, chunk, found, todo)
        self._look_at_the_clock(todo)

    def _enter_start(self, worker: _Worker, place: str, scores: HeatScores | None) -> None:
        worker.place = place
        if scores != self._expected:
            raise SearchError(
                f"Ray worker {worker.number} ({place}) scores the unscaled model differently from this process: its "
                "weights, dtype, threads, libraries or processor are others. check=False permits that."
            )

    def _enter(self, reply: Reply, chunk: list[Factors], found: dict[Factors, Any], todo: list[list[Factors]]) -> None:
        self._layers_run += reply.layers_run
        self._layers_asked += reply.layers_asked
        if reply.batch_tokens == self._batch_tokens:
            found.update(reply.values)
            return
        # Memory ran out. Other padding rounds differently, so this request is done with one batch size throughout.
        todo.append(chunk)
        if reply.batch_tokens < self._batch_tokens:
            self._batch_tokens = reply.batch_tokens
            if found:
                todo += cut_into_chunks(list(found), CHUNKS_PER_WORKER * len(self._workers))
            found.clear()

    def _replace(self, worker: _Worker, reason: str, todo: list[list[Factors]]) -> None:
        """Puts a new worker in a dead one's place.

        Raises:
            SearchError: that is one too many.
        """
        place = worker.place or "still starting"
        self._deaths.append(f"worker {worker.number} ({place}): {reason}")
        if worker.chunk is not None:
            todo.append(worker.chunk)
        self._ray.kill(worker.actor)  # where it only does not answer
        if len(self._deaths) > self._limits.max_deaths:
            raise SearchError(
                f"Ray workers died {self.deaths} times, more than max_deaths={self._limits.max_deaths}; the last was "
                f"{self._deaths[-1]} {_RESUMABLE}"
            )
        self._workers[self._workers.index(worker)] = self._new_worker(worker.number)

    def _look_at_the_clock(self, todo: list[list[Factors]]) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.chunk is not None and now - worker.since > self._limits.chunk_timeout:
                self._replace(worker, f"no answer within {self._limits.chunk_timeout:g} s.", todo)
        if any(worker.place is not None for worker in self._workers):
            self._last_alive = now
        elif now - self._last_alive > self._limits.start_timeout:
            raise SearchError(self._too_late())

    def _too_late(self) -> str:
        wanted = {name: self._resources[name] for name in ("num_cpus", "num_gpus")}
        has = {name: self._ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
        died = f" {self.deaths} died, the last was {self._deaths[-1]}" if self._deaths else ""
        return (
            f"{len(self.places)} of {len(self._workers)} Ray workers started within {self._limits.start_timeout:g} s. "
            f"Each needs {wanted}, the cluster has {has}; see num_workers, cpus_per_worker, gpus_per_worker and "
            f"start_timeout.{died} {_RESUMABLE}"
        )


def _failure(error: Any, worker: _Worker) -> Exception:
    """The error to raise for one that a worker's code raised: its own where it is one of ours."""
    cause = error.cause
    if isinstance(cause, LayerRopeError):
        return type(cause)(str(cause))
    place = worker.place or "while starting"
    return SearchError(f"Ray worker {worker.number} ({place}) failed: {type(cause).__name__}: {one_line(cause)}")


def _reason(error: Exception) -> str:
    """What Ray says of a death, without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("class_name:", "actor_id:", "pid:", "namespace:", "ip:"))]
    return f"{type(error).__name__}: {' '.join(told[:2])}"[:400]


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
