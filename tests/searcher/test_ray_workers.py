"""Searches on Ray workers: the single process's result, whoever does the work and whoever dies."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, VOCAB, build_model
from fakes import SMALL_SEARCH, token_task
from peft import PeftModel, get_peft_model
from test_candidates import trained_lora
from test_evaluator import random_vectors
from transformers import AutoModelForCausalLM

from peft_layerrope import Example, SearchError, SearchSettings, TaskError, TokenTask, search
from peft_layerrope.base_model import ModelSource
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.searcher.evaluator import Evaluator, ModelEvaluator
from peft_layerrope.searcher.plan import SearchProgress
from peft_layerrope.searcher.ray_workers import RayWorkers
from peft_layerrope.searcher.space import Factors

ray = pytest.importorskip("ray")

VECTORS = random_vectors(8)
MANY_TOKENS = 128
"""Of a batch: several of them for each vector, so that a worker can die in the middle of one."""


@pytest.fixture(scope="module")
def cluster():
    """One node of two processors; this process is on it."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 2**27}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patched.setenv("RAY_worker_niceness", "0")  # Ray's 15 makes them wait for whatever else the machine does
        patched.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # workers load their models by functions of the tests
        cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def mixed_task() -> TokenTask:
    """Contexts of many lengths, which are padded otherwise in smaller batches."""
    rng = np.random.default_rng(0)
    examples = []
    for group in range(30):
        context = tuple(rng.integers(1, VOCAB, 20 + group).tolist())
        for number, at in enumerate((2, 10, 17)):
            examples.append(Example(context, context[at : at + 1], context[at + 1 : at + 3], number, group))
    return TokenTask(examples)


SPLIT = mixed_task().split("search", 8)


def evaluator(base: torch.nn.Module, batch_tokens: int = MANY_TOKENS) -> ModelEvaluator:
    model = get_peft_model(base, SearchSettings().adapter_config([1.0] * NUM_LAYERS)).eval()
    return ModelEvaluator(Scorer(model, batch_tokens=batch_tokens))


def plain(evaluator: Evaluator, vectors: Sequence[Factors] = VECTORS) -> list:
    """Scores, as JSON values: equal if every bit is."""
    return [scores.to_plain() for scores in evaluator.scores(vectors, SPLIT)]


@pytest.fixture
def local() -> ModelEvaluator:
    return evaluator(build_model("llama"))


def before_each_pass(model: torch.nn.Module, do: Callable[[int, int], None]) -> torch.nn.Module:
    """Has `do` called with the number of a forward pass and its tokens."""
    numbers = itertools.count(1)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: do(next(numbers), kwargs["input_ids"].numel()), with_kwargs=True
    )
    return model


@pytest.fixture(scope="module")
def checking() -> int:
    """Forward passes of a worker's check."""
    passes = []
    model = before_each_pass(build_model("llama"), lambda number, tokens: passes.append(number))
    plain(evaluator(model), [(1.0,) * NUM_LAYERS])
    return len(passes)


def harmed(at: int, harm: Callable[[int], None], once: Path | None = None) -> Callable[[], torch.nn.Module]:
    """What a worker loads its model by: from pass `at` on, `harm` is called before each; or once by all workers."""

    def do(number: int, tokens: int) -> None:
        if number < at:
            return
        try:
            if once is not None:
                once.touch(exist_ok=False)
        except FileExistsError:
            return
        harm(tokens)

    return lambda: before_each_pass(build_model("llama"), do)


def raising(error: Exception) -> Callable[[int], None]:
    def harm(tokens: int) -> None:
        raise error

    return harm


# --- without Ray running


def test_without_ray_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SearchError, match=r"peft-layerrope\[ray\]"):
        RayWorkers(2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_workers": 0},
        {"num_workers": 1.5},
        {"max_restarts": -1},
        {"threads_per_worker": 0},
        {"cpus_per_worker": -1},
        {"cpus_per_worker": "2"},
        {"start_timeout": 0},
    ],
)
def test_numbers_out_of_range_are_named(wrong):
    with pytest.raises(SearchError, match=next(iter(wrong))):
        RayWorkers(**{"num_workers": 1, **wrong})


def test_a_ray_that_cannot_start_is_an_error_of_ours(local, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: raising(ConnectionError("nobody is there"))(0))
    with pytest.raises(SearchError, match="nobody is there"):
        RayWorkers(1, address="127.0.0.1:1")(local, SPLIT)


# --- on a cluster


class Heard(SearchProgress):
    """Remembers the stages, and the steps of each."""

    def __init__(self) -> None:
        self.stages: list[list] = []

    def stage(self, name: str, total: int) -> None:
        self.stages.append([name, total, 0])

    def advance(self) -> None:
        self.stages[-1][-1] += 1


@pytest.mark.slow
@pytest.mark.parametrize(("num_workers", "is_sent"), [(1, False), (2, True)])
def test_a_search_has_the_result_and_the_progress_of_one_process(cluster, tmp_path, num_workers, is_sent):
    build_model("llama").save_pretrained(tmp_path)
    found, heard = [], [Heard(), Heard()]
    with RayWorkers(num_workers, model_source=None if is_sent else str(tmp_path)) as workers:
        for distribute, progress in zip((None, workers), heard, strict=True):
            settings = {**SMALL_SEARCH, "progress": progress}
            found.append(search(build_model("llama"), token_task(groups=40), **settings, distribute=distribute))
    assert found[0].to_dict() == found[1].to_dict()
    assert heard[0].stages == heard[1].stages
    assert ray.is_initialized()  # it was not ours to shut down


@pytest.mark.slow
def test_scores_come_in_the_order_of_the_request(cluster, local):
    with RayWorkers(2) as workers:
        pool = workers(local, SPLIT)
        assert pool.at_once == 2
        assert plain(pool, VECTORS + VECTORS[:2]) == plain(local, VECTORS + VECTORS[:2])
        assert pool.scores([], SPLIT) == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "node"])
def test_work_of_a_worker_that_dies_is_done_again(cluster, local, checking, tmp_path, victim):
    """Once in the middle of a vector; of a node that is gone for good, the other worker does the work."""
    head = cluster.head_node.all_processes["raylet"][0].process.pid
    done = tmp_path / "done"
    if victim == "worker":
        load = harmed(checking + 2, lambda tokens: os.kill(os.getpid(), signal.SIGKILL), done)
        options = {"num_workers": 1}
    else:
        cluster.add_node(num_cpus=2, object_store_memory=2**27)
        on_second = harmed(checking + 2, lambda tokens: os.kill(os.getppid(), signal.SIGKILL), done)

        def load() -> torch.nn.Module:
            return build_model("llama") if os.getppid() == head else on_second()

        options = {"num_workers": 2, "cpus_per_worker": 2}  # one on each node
    with RayWorkers(model_source=load, **options) as workers:
        pool = workers(local, SPLIT)
        pool.wait_for(options["num_workers"])
        assert plain(pool) == plain(local)
    assert done.exists()


@pytest.mark.slow
def test_a_worker_that_dies_too_often_ends_the_search(cluster, local, checking):
    load = harmed(checking + 2, lambda tokens: os.kill(os.getpid(), signal.SIGKILL))
    with (
        RayWorkers(1, model_source=load, max_restarts=1) as workers,
        pytest.raises(SearchError, match="max_restarts=1"),
    ):
        plain(workers(local, SPLIT))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "expected"), [(TaskError("too long"), TaskError), (KeyError("a layer"), SearchError)]
)
def test_an_error_in_a_worker_is_told(cluster, local, checking, error, expected):
    with (
        RayWorkers(1, model_source=harmed(checking + 2, raising(error))) as workers,
        pytest.raises(expected, match=error.args[0]),
    ):
        plain(workers(local, SPLIT))


@pytest.mark.slow
@pytest.mark.parametrize("from_the_start", [True, False])
def test_memory_that_runs_out_halves_the_batches_of_all_workers(cluster, local, checking, tmp_path, from_the_start):
    """On one of two workers; scores of other batches are not the same bits."""
    poor = tmp_path / "poor"

    def full(tokens: int) -> None:
        if tokens > MANY_TOKENS // 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def load() -> torch.nn.Module:
        try:
            poor.touch(exist_ok=False)
        except FileExistsError:
            return build_model("llama")
        return harmed(1 if from_the_start else checking + 2, full)()

    with RayWorkers(2, model_source=load, cpus_per_worker=1) as workers:
        pool = workers(local, SPLIT)
        pool.wait_for(2)
        found = plain(pool)
    assert found == plain(evaluator(build_model("llama"), MANY_TOKENS // 2))
    assert found != plain(local)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "error"),
    [({}, None), ({"peft": None}, "differently"), ({"dtype": "float32"}, "differently"), ({"model": "./gone"}, "gone")],
)
def test_workers_load_the_model_that_a_source_describes_or_are_refused(cluster, tmp_path, changed, error):
    """With its fine-tune and in its dtype, as PEFT does by hand."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    build_model("llama").save_pretrained(base)
    trained_lora(lora, build_model("llama"))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    local = evaluator(PeftModel.from_pretrained(plain, lora).merge_and_unload(safe_merge=True).eval())
    source = ModelSource(**{"model": str(base), "dtype": "bfloat16", "peft": str(lora), **changed})
    with RayWorkers(1, model_source=source) as workers:
        if error is None:
            assert plain(workers(local, SPLIT)) == plain(local)
        else:
            with pytest.raises(SearchError, match=error):
                workers(local, SPLIT)


@pytest.mark.slow
def test_without_room_for_a_worker_the_search_says_so(cluster, local):
    with RayWorkers(1, cpus_per_worker=50, start_timeout=1) as workers, pytest.raises(SearchError, match="50"):
        workers(local, SPLIT)
