"""Searches on Ray workers: the single process's result, whoever does the work and whoever dies."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import VOCAB, build_model
from peft import PeftModel, get_peft_model
from test_contenders import trained_lora
from transformers import AutoModelForCausalLM

from peft_layerrope import Example, SearchError, SearchSettings, TaskError, TokenTask, search
from peft_layerrope.base_model import ModelSource
from peft_layerrope.searcher.evaluator import ModelEvaluator, cut_into_chunks, shared_depth
from peft_layerrope.searcher.ray_workers import Limits, RayWorkers, WorkerPool

ray = pytest.importorskip("ray")

SMALL = {
    "algorithm": "genetic",
    "population": 6,
    "generations": 2,
    "gradient_steps": 2,
    "refine_evaluations": 4,
    "controls": False,
    "search_groups": 16,
    "validation_groups": 4,
    "test_groups": 4,
    "batch_tokens": 128,
    "progress": False,
    "seed": 1,
}
"""Of many batches, so that a worker is in the middle of its chunk when it is killed."""


def token_task() -> TokenTask:
    rng = np.random.default_rng(0)
    examples = []
    for group in range(40):
        context = tuple(rng.integers(1, VOCAB, 40).tolist())
        for number, at in enumerate((2, 20, 37)):
            examples.append(Example(context, context[at : at + 1], context[at + 1 : at + 3], number, group))
    return TokenTask(examples)


def run(distribute=None, **overrides):
    return search(build_model("llama"), token_task(), **{**SMALL, **overrides}, distribute=distribute)


@pytest.fixture(scope="module")
def alone():
    return run()


@pytest.fixture(scope="module")
def cluster():
    """Two nodes on this machine, each a raylet of its own; this process is on the first."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 2**27}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def second_node(cluster):
    return cluster.add_node(num_cpus=2, object_store_memory=2**27)


def pid(place: str) -> int:
    return int(place.split()[1])


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:  # it has just been killed
        return 0


class Saboteur:
    """Does `harm` once to the first worker that `fits`, right after it was handed a chunk, the fifth of all or later.

    Attributes:
        done: whether it did.
    """

    def __init__(self, monkeypatch, harm, fits=lambda worker: True):
        self.seen, self.done = 0, False
        hand_out = WorkerPool._hand_out

        def hooked(pool, worker, *args):
            hand_out(pool, worker, *args)
            self.seen += 1
            if not self.done and self.seen >= 5 and fits(worker):
                self.done = True
                harm(worker)

        monkeypatch.setattr(WorkerPool, "_hand_out", hooked)


def kill_process(worker) -> None:
    os.kill(pid(worker.place), signal.SIGKILL)


def stop_process(worker) -> None:
    """As hardware that hangs: it neither answers nor goes away, and Ray cannot ask it to."""
    os.kill(pid(worker.place), signal.SIGSTOP)


# --- without Ray running


def random_vectors(count: int, layers: int = 8) -> list[tuple[float, ...]]:
    rng = np.random.default_rng(0)
    return [tuple((1 + rng.integers(0, 3, layers) / 10).tolist()) for _ in range(count)]


@pytest.mark.parametrize("num_chunks", [1, 2, 6, 100])
def test_chunks_hold_every_vector_once_and_in_order(num_chunks):
    vectors = random_vectors(30)
    chunks = cut_into_chunks(vectors * 2, num_chunks)
    assert [vector for chunk in chunks for vector in chunk] == sorted(set(vectors))
    assert len(chunks) == min(num_chunks, 30)
    assert cut_into_chunks([], 3) == []


def test_vectors_that_begin_alike_stay_together():
    vectors = [(1.0, a, b, c) for a in (1.0, 1.5) for b in (1.0, 1.2) for c in (1.0, 1.1)]
    assert [len(chunk) for chunk in cut_into_chunks(vectors, 2)] == [4, 4]
    for before, after in pairwise(cut_into_chunks(vectors, 4)):
        assert shared_depth(before[-1], after[0]) <= 2


def test_without_ray_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SearchError, match=r"pip install 'peft-layerrope\[ray\]'"):
        RayWorkers(2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_workers": 0},
        {"num_workers": 1.5},
        {"max_deaths": -1},
        {"threads_per_worker": 0},
        {"cpus_per_worker": -1},
        {"cpus_per_worker": "2"},
        {"start_timeout": 0},
        {"chunk_timeout": None},
    ],
)
def test_numbers_out_of_range_are_named(wrong):
    with pytest.raises(SearchError, match=next(iter(wrong))):
        RayWorkers(**{"num_workers": 1, **wrong})


# --- one request, with a Ray that does everything in this process


class FakeRay:
    """As much of Ray as the pool uses. A call runs when its answer is fetched; `harm` may answer in its place.

    Args:
        harm: given the number of the call to `run` and a function that makes it; returns the reply or raises.
        silent: numbers of the calls to `run` that are never answered.
    """

    exceptions = ray.exceptions

    def __init__(self, harm=None, silent=()):
        self.harm = harm if harm is not None else lambda number, call: call()
        self.silent = silent
        self.runs = self.killed = 0

    def put(self, value):
        return value

    def remote(self, kind):
        def method(call, counted):
            def submit(*args):
                number = self.runs
                self.runs += counted
                return (lambda: self.harm(number, lambda: call(*args)), number in self.silent and counted)

            return SimpleNamespace(remote=submit)

        def create():
            actor = kind()
            return SimpleNamespace(
                start=SimpleNamespace(remote=lambda *args: (lambda: actor.start(*args), False)),
                run=method(actor.run, True),
            )

        return SimpleNamespace(options=lambda **resources: SimpleNamespace(remote=create))

    def wait(self, references, timeout):
        answered = [reference for reference in references if not reference[1]]
        if not answered:
            time.sleep(0.05)
        return answered[:1], []

    def get(self, reference):
        try:
            return reference[0]()
        except ray.exceptions.RayError:
            raise
        except Exception as error:
            raise ray.exceptions.RayTaskError("run", "", error) from error

    def kill(self, actor):
        self.killed += 1

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 1.0}


@pytest.fixture
def local():
    settings = SearchSettings()
    model = get_peft_model(build_model("llama"), settings.adapter_config([1.0] * 4))
    heats = [token_task().split("search", 2)]
    return ModelEvaluator(
        model, heats, objective="log_prob", weights=settings.weights, batch_tokens=512, share_bytes=2**20
    )


def pool_of(local, fake, num_workers=2, max_deaths=3, chunk_timeout=60.0):
    spec = {
        "make": local.recipe(),
        "adapter": local.model.peft_config["default"],
        "source": lambda: build_model("llama"),
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }
    resources = {"num_cpus": 1, "num_gpus": 0}
    limits = Limits(max_deaths, 1.0, chunk_timeout)
    expected = local.measure([(1.0,) * 4], 0)[0]
    return WorkerPool(fake, local, spec, expected, num_workers, resources, limits)


VECTORS = random_vectors(7, layers=4)


def test_answers_come_in_the_order_of_the_request_and_layers_are_counted(local):
    pool = pool_of(local, FakeRay())
    assert pool.measure(VECTORS + VECTORS[:2], 0) == local.measure(VECTORS + VECTORS[:2], 0)
    scores = pool.score(VECTORS, 0)
    assert set(scores) == set(VECTORS)
    tokens = local.num_tokens(0)
    assert pool.layers_asked - local.layers_asked == 2 * len(set(VECTORS)) * 4 * tokens
    assert pool.layers_run < pool.layers_asked
    assert pool.measure([], 0) == []


def test_work_of_dead_and_silent_workers_is_done_again(local):
    def harm(number, call):
        if number in (1, 3):
            raise ray.exceptions.WorkerCrashedError
        return call()

    fake = FakeRay(harm, silent=(2,))
    pool = pool_of(local, fake, chunk_timeout=0.01)
    assert pool.measure(VECTORS, 0) == local.measure(VECTORS, 0)
    assert pool.deaths == fake.killed == 3


def test_a_chunk_that_kills_everybody_ends_the_search(local):
    def harm(number, call):
        raise ray.exceptions.WorkerCrashedError

    pool = pool_of(local, FakeRay(harm))
    with pytest.raises(SearchError, match=r"died 4 times, more than max_deaths=3"):
        pool.measure(VECTORS, 0)
    with pytest.raises(SearchError, match="closed"):
        pool.measure(VECTORS, 0)


def test_memory_that_runs_out_halves_the_batches_of_all_workers(local):
    def harm(number, call):
        reply = call()
        return replace(reply, values={}, batch_tokens=128) if number == 1 else reply

    found = pool_of(local, FakeRay(harm)).measure(VECTORS, 0)
    small = local.recipe()(local.model, batch_tokens=128)
    assert found == small.measure(VECTORS, 0)


def test_a_workers_own_error_is_raised_as_it_is(local):
    def harm(number, call):
        raise TaskError("out of memory even with --batch-tokens 1")

    with pytest.raises(TaskError, match="out of memory"):
        pool_of(local, FakeRay(harm)).measure(VECTORS, 0)

    def other(number, call):
        raise KeyError("layer")

    with pytest.raises(SearchError, match=r"Ray worker 0 \(process \d+ on .*failed: KeyError"):
        pool_of(local, FakeRay(other)).measure(VECTORS, 0)


# --- on a cluster of two nodes


@pytest.mark.slow
@pytest.mark.parametrize(("num_workers", "kind"), [(1, "folder"), (2, "function"), (3, "sent")])
def test_the_result_is_that_of_one_process(cluster, second_node, alone, tmp_path, num_workers, kind):
    build_model("llama").save_pretrained(tmp_path)

    def load():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(tmp_path)

    with RayWorkers(
        num_workers, model_source={"folder": str(tmp_path), "function": load, "sent": None}[kind]
    ) as workers:
        found = run(workers)
    assert found.to_dict() == alone.to_dict()
    assert ray.is_initialized()  # it was not ours to shut down


@pytest.mark.slow
def test_workers_load_the_model_that_a_source_describes(cluster, tmp_path):
    """With its fine-tune and in its dtype, as PEFT does by hand; a worker with another model would be refused."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    build_model("llama").save_pretrained(base)
    trained_lora(lora, build_model("llama"))

    def by_hand() -> torch.nn.Module:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), lora)
        return model.merge_and_unload(safe_merge=True).eval()

    source = ModelSource(str(base), dtype="bfloat16", peft=str(lora))
    with RayWorkers(2, model_source=source) as workers:
        found = search(by_hand(), token_task(), **SMALL, distribute=workers)
    assert found.to_dict() == search(by_hand(), token_task(), **SMALL).to_dict()
    for other in (replace(source, peft=None), replace(source, dtype="float32")):
        with (
            RayWorkers(1, model_source=other) as workers,
            pytest.raises(SearchError, match="differently from this process"),
        ):
            search(by_hand(), token_task(), **SMALL, distribute=workers)


@pytest.mark.slow
def test_too_many_deaths_end_the_search_with_a_way_on(cluster, monkeypatch, tmp_path, alone):
    Saboteur(monkeypatch, kill_process)
    with (
        RayWorkers(1, max_deaths=0) as workers,
        pytest.raises(SearchError, match=r"died 1 times, more than max_deaths=0.*worker 0 \(process.*resumed"),
    ):
        run(workers, folder=tmp_path)
    assert run(folder=tmp_path, resume=True).to_dict() == alone.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_hangs_is_replaced(cluster, second_node, alone, monkeypatch, num_workers):
    """With one worker for all there is nobody else: the search waits for the replacement."""
    pools, hung = [], []

    def stop(worker) -> None:
        stop_process(worker)
        hung.append(pid(worker.place))

    stopping = Saboteur(monkeypatch, stop)
    with RayWorkers(num_workers, chunk_timeout=5) as workers:

        def remembered(local):
            pools.append(workers(local))
            return pools[0]

        found = run(remembered)
    assert stopping.done
    assert pools[0].deaths == 1
    assert found.to_dict() == alone.to_dict()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{number}").exists() for number in hung):  # Ray ends it, and frees its memory
        assert time.monotonic() < deadline


@pytest.mark.slow
def test_workers_on_another_model_are_refused(cluster, tmp_path):
    other = build_model("llama")
    other.lm_head.weight.data += 1e-3
    other.save_pretrained(tmp_path)
    with (
        RayWorkers(1, model_source=str(tmp_path)) as workers,
        pytest.raises(SearchError, match="differently from this process"),
    ):
        run(workers)


@pytest.mark.slow
def test_without_room_for_a_worker_the_search_says_so(cluster):
    with (
        RayWorkers(1, cpus_per_worker=50, start_timeout=1) as workers,
        pytest.raises(SearchError, match=r"0 of 1 Ray workers started within 1 s"),
    ):
        run(workers)


@pytest.mark.slow
def test_a_killed_process_and_a_removed_node_change_nothing(cluster, second_node, alone, monkeypatch):
    """The last test: it takes the second node away."""

    first, second = (node.all_processes["raylet"][0].process.pid for node in (cluster.head_node, second_node))
    removal = Saboteur(
        monkeypatch,
        lambda worker: cluster.remove_node(second_node, allow_graceful=False),
        lambda worker: parent(pid(worker.place)) == second,
    )
    kill = Saboteur(monkeypatch, kill_process, lambda worker: removal.done and parent(pid(worker.place)) == first)
    pools = []
    with RayWorkers(2) as workers:

        def on_both_nodes(local):
            pools.append(workers(local))
            pools[0].wait_until_ready()
            return pools[0]

        found = run(on_both_nodes)
        assert removal.done
        assert kill.done
        assert pools[0].deaths >= 2  # one that was just starting on that node is one more
    assert found.to_dict() == alone.to_dict()
