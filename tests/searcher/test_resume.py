"""A search that is killed and resumed ends as if nothing had happened."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import build_model
from fakes import journal_of, token_task
from transformers import PreTrainedModel

from peft_layerrope import InvalidConfigError, SearchError, SearchResult, UnsupportedModelError, search
from peft_layerrope.runs import JOURNAL_NAME
from peft_layerrope.searcher import run as run_module
from peft_layerrope.searcher.evaluator import ModelEvaluator
from peft_layerrope.searcher.plan import SearchProgress
from peft_layerrope.searcher.settings import MIN_STEPS
from peft_layerrope.searcher.space import FactorGrid

SMALL = {"steps": 4, "test_groups": 4, "seed": 3}
SEARCHES = {"cma-es": {}, "paper": {"algorithm": "paper", "population": 4, "search_groups": 4}}


class Killed(BaseException):
    """Not an `Exception`: nothing may catch it."""


class Bomb(SearchProgress):
    """Counts everything it is told, and goes off at call number `at`."""

    def __init__(self, at: int | None = None) -> None:
        self.calls, self.at = 0, at

    def _tick(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise Killed

    def stage(self, name: str, total: int) -> None:
        self._tick()

    def advance(self) -> None:
        self._tick()

    def note(self, text: str) -> None:
        self._tick()


def small_model(family: str = "llama") -> PreTrainedModel:
    return build_model(family, num_hidden_layers=3)


def run(folder: Path | None, bomb: Bomb | None = None, resume: bool = False, **fields: object) -> SearchResult:
    task = token_task(groups=40)
    return search(small_model(), task, **{**SMALL, **fields}, folder=folder, resume=resume, progress=bomb or Bomb())


@pytest.fixture(scope="module", params=SEARCHES)
def whole(request, tmp_path_factory):
    """The search, what it found, its journal, and how often it tells its audience something."""
    folder, bomb, fields = tmp_path_factory.mktemp("whole"), Bomb(), SEARCHES[request.param]
    result = run(folder, bomb, **fields)
    return fields, result.to_dict(), journal_of(folder), bomb.calls


def assert_same(result: SearchResult, folder: Path, whole: tuple) -> None:
    _, found, journal, _ = whole
    assert result.to_dict() == found
    assert journal_of(folder) == journal


def test_a_folder_changes_nothing(whole):
    fields, found, _, _ = whole
    assert run(None, **fields).to_dict() == found


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_killed_and_resumed(whole, tmp_path, share):
    fields, _, _, calls = whole
    with pytest.raises(Killed):
        run(tmp_path, Bomb(max(1, round(share * calls))), **fields)
    was_begun = (tmp_path / "journal.jsonl").exists()
    result = run(tmp_path, resume=True, **fields)
    assert_same(result, tmp_path, whole)
    assert result.timing["resumed"] == was_begun  # its seconds are those since then


def test_killed_again_and_again(whole, tmp_path):
    fields, _, _, calls = whole
    for n, share in enumerate((0.25, 0.2, 0.15)):  # of what a run of its own has to tell
        with pytest.raises(Killed):
            run(tmp_path, Bomb(round(share * calls)), resume=n > 0, **fields)
    assert_same(run(tmp_path, resume=True, **fields), tmp_path, whole)


@pytest.mark.parametrize("save", [1, 30])
@pytest.mark.parametrize("torn", [0, 20])
def test_killed_while_an_entry_is_written(whole, tmp_path, monkeypatch, save, torn):
    fields, fsync, saves = whole[0], os.fsync, []

    def crash(descriptor: int) -> None:
        saves.append(descriptor)
        if len(saves) == save:
            os.truncate(descriptor, os.fstat(descriptor).st_size - torn)
            raise Killed
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", crash)
        with pytest.raises(Killed):
            run(tmp_path, **fields)
    assert_same(run(tmp_path, resume=True, **fields), tmp_path, whole)


def test_a_finished_search_is_not_run_again(whole, tmp_path, monkeypatch):
    fields = whole[0]
    run(tmp_path, **fields)
    asked: list = []
    scores = ModelEvaluator.scores
    monkeypatch.setattr(
        ModelEvaluator,
        "scores",
        lambda self, vectors, *more: asked.extend(vectors) or scores(self, vectors, *more),
    )
    assert_same(run(tmp_path, resume=True, **fields), tmp_path, whole)
    assert not asked


def test_a_search_by_the_clock_goes_on_with_the_plan_that_it_had(tmp_path, monkeypatch):
    """However long the passes take that are timed anew."""
    budget = {"steps": None, "minutes": 1e-6, "test_minutes": 1e-6}
    with pytest.raises(Killed):
        run(tmp_path, Bomb(20), **budget)
    monkeypatch.setattr(run_module, "schedule_for", lambda *given: pytest.fail("planned anew"))
    found = run(tmp_path, resume=True, **budget)
    assert found.settings.steps == MIN_STEPS
    assert found.timing["resumed"]
    monkeypatch.undo()
    assert found.to_dict() == run(None, **budget).to_dict()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Killed):
        run(folder, Bomb(30))
    return folder


def test_a_journal_must_be_resumed(stopped):
    with pytest.raises(InvalidConfigError, match="resume it"):
        run(stopped)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 4}, "settings.seed was 3 there and is 4 now"),
        ({"grid": FactorGrid(step=0.5)}, "settings.grid.step was 0.1 there and is 0.5 now"),
        ({"algorithm": "paper"}, 'settings.algorithm was "cma-es" there and is "paper" now'),
        ({"max_harm": 0.5}, "settings.max_harm was 0.01 there and is 0.5 now"),
        ({"model": small_model("mistral")}, "model was "),
        ({"task": token_task(groups=40, seed=1)}, "splits was "),
        ({"task": token_task(groups=45)}, "task.groups.search was 16 there and is 18 now"),
    ],
)
def test_another_search_is_refused_by_name(stopped, change, name):
    before = (stopped / JOURNAL_NAME).read_text()
    arguments = {"model": small_model(), "task": token_task(groups=40), **SMALL, **change}
    with pytest.raises(InvalidConfigError, match=f"is of another run: {name}"):
        search(**arguments, folder=stopped, resume=True, progress=False)
    assert (stopped / JOURNAL_NAME).read_text() == before


def test_another_number_of_threads_is_no_other_search(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, Bomb(60))
    before, threads = journal_of(tmp_path), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        run(tmp_path, resume=True)
    finally:
        torch.set_num_threads(threads)
    assert len(before) > 1
    assert journal_of(tmp_path)[: len(before)] == before


def test_a_weight_and_the_attention_implementation_count(stopped):
    model = small_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[-1, -1] += 1
    eager = small_model()
    eager.set_attn_implementation("eager")
    for other in (model, eager):
        with pytest.raises(InvalidConfigError, match="model was "):
            search(other, token_task(groups=40), **SMALL, folder=stopped, resume=True, progress=False)


@pytest.mark.parametrize("changed", [False, True])
def test_a_buffer_counts(changed, tmp_path):
    model, task = small_model(), token_task(groups=40)
    model.register_buffer("more", torch.zeros(40))
    with pytest.raises(Killed):
        search(model, task, **SMALL, folder=tmp_path, progress=Bomb(30))
    model.more[33] += changed
    with pytest.raises(InvalidConfigError, match="model was ") if changed else nullcontext():
        search(model, task, **SMALL, folder=tmp_path, resume=True, progress=False)


def test_overwriting_begins_anew_once_all_is_checked(whole, tmp_path):
    run(tmp_path, seed=4)
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SearchError, match="layers_to_transform"):
        run(tmp_path, overwrite=True, layers_to_transform=(40, 41))

    def kill(plan: object) -> None:
        raise Killed

    with pytest.raises(Killed):
        run(tmp_path, overwrite=True, on_plan=kill)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_same(run(tmp_path, overwrite=True, **whole[0]), tmp_path, whole)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resuming_needs_a_folder():
    with pytest.raises(InvalidConfigError, match="folder"):
        run(None, resume=True)


def test_a_refused_model_leaves_no_state(tmp_path, monkeypatch):
    """The folder must be good for the next try."""
    model = small_model()
    monkeypatch.setattr(type(model.model.rotary_emb), "forward", lambda self, x, position_ids: (x, x))
    with pytest.raises(UnsupportedModelError):
        search(model, token_task(groups=40), **SMALL, folder=tmp_path, progress=False)
    assert not any(tmp_path.iterdir())
