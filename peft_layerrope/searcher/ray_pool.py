"""The Ray workers of one search, as the searching process sees them: who does what, and who has died."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from ..errors import LayerRopeError, SearchError
from ..messages import one_line
from ..scoring.scores import PositionScores
from .chunks import cut_into_chunks
from .evaluator import ModelEvaluator
from .grid import Factors
from .measurement import HeatScores
from .ray_actor import Actor, Reply

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
