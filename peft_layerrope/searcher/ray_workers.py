"""Factor vectors scored by Ray's actors, with the result of a single process."""

from __future__ import annotations

import io
import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import field, replace
from functools import cache, partial
from importlib.util import find_spec
from typing import Annotated, Any

import torch
from peft import PeftConfig, get_peft_model
from pydantic import Field
from torch import nn

from ..base_model import ModelSource, load_base
from ..declaration import declared
from ..errors import LayerRopeError, SearchError, one_line
from ..scoring.scorer import Scorer
from ..scoring.scores import PositionScores
from ..tasks.base import Split
from ..tuner.sites import embedding_table, find_stack
from .evaluator import ModelEvaluator
from .space import Factors

with suppress(ImportError):  # RayWorkers says that it is missing
    import ray


class Worker:
    """A process with its own copy of the model. Where it dies, Ray makes it anew from the same `recipe`: references
    to what loads the model, and the number of threads.
    """

    def __init__(self, recipe: list[Any]) -> None:
        load, threads = ray.get(recipe)
        torch.set_num_threads(threads)
        self._evaluator = ModelEvaluator(Scorer(load()))

    def score(self, vector: Factors, split: Split, batch_tokens: int) -> tuple[PositionScores, int]:
        """Scores a vector with batches of at most `batch_tokens`; returns how many fit."""
        scorer = self._evaluator.scorer
        scorer.batch_tokens = batch_tokens
        (scores,) = self._evaluator.scores([vector], split)
        return scores, scorer.batch_tokens


def _load(source: Any, adapter: PeftConfig, device: str, dtype: str) -> nn.Module:
    """Loads the model in a worker, and gives it the adapter whose factors are searched."""
    if isinstance(source, str):
        source = ModelSource(source, dtype=dtype)
    if not isinstance(source, ModelSource):
        return get_peft_model(source().to(device), adapter)
    return get_peft_model(load_base(source if source.device_map else replace(source, device=device)), adapter)


def _sent(model: nn.Module, device: str) -> Callable[[], nn.Module]:
    """Returns what makes a copy of this process's model in another one."""
    buffer = io.BytesIO()
    try:
        # torch's format and not plain pickle: it can be read onto another device, and keeps tied weights tied
        torch.save(model, buffer, pickle_module=ray.cloudpickle)
    except Exception as error:  # whatever the model's own classes raise
        raise SearchError(
            f"the model cannot be sent to Ray workers ({one_line(error)}): pass model_source=."
        ) from error
    buffer.seek(0)
    return partial(torch.load, buffer, map_location=device, weights_only=False)


class WorkerPool:
    """The workers of one search, as an [`Evaluator`]. Answers are written in this process. A worker has to score the
    probe as this process does, before it is asked for anything else.
    """

    def __init__(
        self, local: ModelEvaluator, probe: Split, settings: RayWorkers, options: dict[str, Any], *recipe: Any
    ) -> None:
        self._local, self._probe, self._settings, self._options = local, probe, settings, options
        self._unscaled = (1.0,) * len(find_stack(local.scorer.model.get_base_model()).layers)
        self._expected = cache(self._unscaled_scores)
        self._batch_tokens = local.scorer.batch_tokens
        self._sent_probe = ray.put(_sendable(probe))
        self._recipe = [ray.put(part) for part in recipe]  # kept, for workers that are made anew
        actor = ray.remote(Worker).options(**options)
        self.at_once = settings.num_workers
        self._workers = [actor.remote(self._recipe) for _ in range(settings.num_workers)]
        self._idle: list[Any] = []
        self._pending: dict[Any, tuple[Any, int | None]] = {}  # of every call its worker, and its vector's number
        for worker in self._workers:
            self._check(worker)

    def scores(self, vectors: Sequence[Factors], split: Split, written: bool = False) -> list[PositionScores]:
        """See [`Evaluator`].

        Raises:
            SearchError: a worker failed, died too often, or computes something else than this process; or none started.
            TaskError: a worker's memory does not suffice for a single row.
        """
        if written:
            return self._local.scores(vectors, split, written)
        sent = ray.put(_sendable(split))
        while True:
            todo: list[int] = list(range(len(vectors)))
            found: dict[int, tuple[PositionScores, int]] = {}
            while len(found) < len(vectors):
                while todo and self._idle:
                    worker, number = self._idle.pop(), todo.pop(0)
                    call = worker.score.remote(vectors[number], sent, self._batch_tokens)
                    self._pending[call] = worker, number
                self._take_answer(todo, found)
            self._batch_tokens = min([self._batch_tokens, *(tokens for _, tokens in found.values())])
            # Other padding rounds differently: where memory ran out, all is done again with batches that fit everywhere
            if all(tokens == self._batch_tokens for _, tokens in found.values()):
                return [found[number][0] for number in range(len(vectors))]

    def wait_for(self, count: int) -> None:
        """Waits until so many workers have loaded the model and passed the check; raises what `scores` does."""
        while len(self._idle) < count:
            self._take_answer([], {})

    def close(self) -> None:
        """Ends the workers."""
        if ray.is_initialized():
            for worker in self._workers:
                ray.kill(worker)

    def _unscaled_scores(self, batch_tokens: int) -> list[Any]:
        """What this process finds of the unscaled model."""
        scorer = Scorer(self._local.scorer.model, batch_tokens=batch_tokens)
        return ModelEvaluator(scorer).scores([self._unscaled], self._probe)[0].to_plain()

    def _check(self, worker: Any) -> None:
        """Has a worker that is being made, also anew, score the unscaled model; Ray repeats that if it dies again."""
        call = worker.score.options(max_task_retries=-1)
        self._pending[call.remote(self._unscaled, self._sent_probe, self._batch_tokens)] = worker, None

    def _take_answer(self, todo: list[int], found: dict[int, tuple[PositionScores, int]]) -> None:
        """Waits for a worker, and adds its answer to `found`; where it died, its vector goes back to `todo`."""
        limits = self._settings
        at_work = any(number is not None for _, number in self._pending.values())
        ready, _ = ray.wait(list(self._pending), timeout=None if at_work else limits.start_timeout)
        if not ready:
            raise SearchError(
                f"no Ray worker started within {limits.start_timeout:g} s: see cpus_per_worker, gpus_per_worker and "
                f"start_timeout. Each is to have {self._options}; the cluster has {ray.cluster_resources()}."
            )
        worker, number = self._pending.pop(ready[0])
        try:
            scores, batch_tokens = ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LayerRopeError):
                raise error.cause from error
            raise SearchError(f"a Ray worker failed: {type(error.cause).__name__}: {one_line(error.cause)}") from error
        except ray.exceptions.RayError as error:
            if number is None:
                raise SearchError(
                    f"a Ray worker could not load the model, or died more than max_restarts={limits.max_restarts} "
                    f"times; a search that has a folder can be resumed. {one_line(str(error).strip().splitlines()[-1])}"
                ) from error
            todo.append(number)
            self._check(worker)
            return
        self._idle.append(worker)
        if number is not None:
            found[number] = scores, batch_tokens
            return
        self._batch_tokens = min(self._batch_tokens, batch_tokens)
        if limits.check and scores.to_plain() != self._expected(batch_tokens):
            raise SearchError(
                "a Ray worker scores the unscaled model differently from this process: its weights, dtype, threads, "
                "libraries or processor are others. check=False permits that."
            )


def _sendable(split: Split) -> Split:
    """The split without what judges written answers, which may be any function."""
    return replace(split, judge=None)


@declared(SearchError)
class RayWorkers:
    """Has a search's vectors scored by Ray workers: `search(..., distribute=RayWorkers(2))`.

    Ray replaces a worker that dies, and its work is done again.

    Args:
        num_workers: how many processes, each with its own copy of the model.
        address: of a Ray cluster; default: this process's Ray, that of `RAY_ADDRESS`, or one of its own.
        model_source: a Hub id or folder that every node can read, a `ModelSource`, or a function that returns the
            model; default: this process sends its own.
        device: of the workers' models; default: the kind this process's model is on.
        dtype: a torch dtype's name, for a `model_source` that is a name; default: that of this process's model.
        threads_per_worker: default: as many as this process has; sums are split by threads, so others give other bits.
        cpus_per_worker: what is asked of Ray; default: the number of threads.
        gpus_per_worker: what is asked of Ray; default: 1 if the workers' device is a GPU.
        max_restarts: how often Ray replaces each worker.
        start_timeout: seconds without any worker at all after which the search gives up.
        check: refuse a worker that scores the unscaled model differently from this process, in any bit. False where
            the workers have to compute on other hardware; they should then all have the same.

    Example:
    ```py
    >>> with RayWorkers(2) as workers:
    ...     result = search(model, task, distribute=workers)
    ```
    """

    num_workers: Annotated[int, Field(ge=1)]
    address: str | None = None
    model_source: Any = None
    device: str | None = None
    dtype: str | None = None
    threads_per_worker: Annotated[int, Field(ge=1)] | None = None
    cpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    max_restarts: Annotated[int, Field(ge=0)] = 10
    start_timeout: Annotated[float, Field(gt=0)] = 600
    check: bool = True
    _to_close: Any = field(init=False, repr=False, default_factory=ExitStack)

    def __post_init__(self) -> None:
        if find_spec("ray") is None:
            raise SearchError("distributing a search needs Ray: pip install 'peft-layerrope[ray]'")

    def __call__(self, local: ModelEvaluator, probe: Split) -> WorkerPool:
        """Starts workers for one search, in place of those of an earlier one, and waits for the first of them.

        Raises:
            SearchError: Ray cannot be reached, the model cannot be sent or loaded, or no worker started.
        """
        self.close()
        model = local.scorer.model
        weight = embedding_table(model.get_base_model())
        threads = self.threads_per_worker or torch.get_num_threads()
        device, dtype = self.device or weight.device.type, self.dtype or str(weight.dtype).removeprefix("torch.")
        options = {
            "num_cpus": threads if self.cpus_per_worker is None else self.cpus_per_worker,
            "num_gpus": int(not device.startswith("cpu")) if self.gpus_per_worker is None else self.gpus_per_worker,
            "scheduling_strategy": "SPREAD",
            "max_restarts": self.max_restarts,
        }
        self._start_ray(options["num_cpus"])
        adapter = model.peft_config[model.active_adapter]
        load = partial(_load, self.model_source, adapter, device, dtype) if self.model_source else _sent(model, device)
        pool = WorkerPool(local, probe, self, options, load, threads)
        self._to_close.callback(pool.close)
        pool.wait_for(1)
        return pool

    def _start_ray(self, cpus_per_worker: float) -> None:
        if ray.is_initialized():
            return
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
        if address == "local":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # an actor that asks for more than there is would wait for ever
            wanted = int(-(-self.num_workers * cpus_per_worker // 1))
            options |= {"num_cpus": max(os.cpu_count() or 1, wanted), "include_dashboard": False}
        at_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**options)
        except (OSError, RuntimeError, ValueError) as error:
            raise SearchError(f"Ray at {address!r} cannot be used: {one_line(error)}") from error
        finally:  # Ray's own handler would end this process with status 15 and without a word
            if at_sigterm is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, at_sigterm)
        self._to_close.callback(ray.shutdown)

    def close(self) -> None:
        """Ends the workers, and Ray if this object started it."""
        self._to_close.close()

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
