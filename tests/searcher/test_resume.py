"""A search that is killed and resumed ends as if nothing had happened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import build_model
from fakes import TaskWithShortPrompts, journal_of
from transformers import PreTrainedModel

from peft_layerrope import InvalidConfigError, SearchError, SearchResult, UnsupportedModelError, search
from peft_layerrope.runs import JOURNAL_NAME
from peft_layerrope.searcher import FactorGrid
from peft_layerrope.searcher.evaluator import ModelEvaluator
from peft_layerrope.searcher.plan import SilentProgress

SMALL = {
    "algorithm": "genetic",
    "population": 6,
    "generations": 2,
    "gradient_steps": 2,
    "refine_evaluations": 6,
    "search_groups": 16,
    "validation_groups": 3,
    "short_groups": 2,
    "test_groups": 4,
    "grid": FactorGrid(1.0, 2.0, 0.25),
    "share_mib": 8,
    "seed": 3,
}
SEARCHES = {"genetic": {}, "greedy": {"algorithm": "greedy", "controls": False}}


class Killed(BaseException):
    """Not an `Exception`: nothing may catch it."""


class Bomb(SilentProgress):
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
    task = TaskWithShortPrompts(groups=40)
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
    fields, found, journal, _ = whole
    assert run(None, **fields).to_dict() == found
    measured = {tuple(factors) for kind, _, batch in journal[1:] if kind == "measured" for factors, *_ in batch}
    assert len(measured) == found["evaluations"]["all_methods"]
    if not fields:
        assert found["evaluations"]["given_up_early"] > 0  # or no race is resumed below


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_killed_and_resumed(whole, tmp_path, share):
    fields, _, _, calls = whole
    with pytest.raises(Killed):
        run(tmp_path, Bomb(max(1, round(share * calls))), **fields)
    assert_same(run(tmp_path, resume=True, **fields), tmp_path, whole)


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
    score = ModelEvaluator.score
    monkeypatch.setattr(
        ModelEvaluator, "score", lambda self, vectors, heat: asked.extend(vectors) or score(self, vectors, heat)
    )
    assert_same(run(tmp_path, resume=True, **fields), tmp_path, whole)
    assert set(asked) == {(1.0,) * 3}  # timed, for the plan


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
        ({"grid": FactorGrid(1.0, 2.0, 0.5)}, "settings.grid.step was 0.25 there and is 0.5 now"),
        ({"algorithm": "random"}, 'settings.algorithm was "genetic" there and is "random" now'),
        ({"model": small_model("mistral")}, "model was "),
        ({"task": TaskWithShortPrompts(groups=40, seed=1)}, "splits was "),
        ({"task": TaskWithShortPrompts(groups=45)}, "task.groups.search was 16 there and is 18 now"),
    ],
)
def test_another_search_is_refused_by_name(stopped, change, name):
    before = (stopped / JOURNAL_NAME).read_text()
    arguments = {"model": small_model(), "task": TaskWithShortPrompts(groups=40), **SMALL, **change}
    with pytest.raises(InvalidConfigError, match=f"is of another run: {name}"):
        search(**arguments, folder=stopped, resume=True, progress=False)
    assert (stopped / JOURNAL_NAME).read_text() == before


def test_another_number_of_threads_is_no_other_search(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, Bomb(60), controls=False)
    before, threads = journal_of(tmp_path), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        run(tmp_path, resume=True, controls=False)
    finally:
        torch.set_num_threads(threads)
    assert len(before) > 1
    assert journal_of(tmp_path)[: len(before)] == before
    plans = [json.loads(line) for line in (tmp_path / JOURNAL_NAME).read_text().splitlines() if '"plan"' in line]
    assert [plan["value"]["threads"] for plan in plans] == [threads, threads + 1]


def test_a_weight_and_the_attention_implementation_count(stopped):
    model = small_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[-1, -1] += 1
    eager = small_model()
    eager.set_attn_implementation("eager")
    for other in (model, eager):
        with pytest.raises(InvalidConfigError, match="model was "):
            search(other, TaskWithShortPrompts(groups=40), **SMALL, folder=stopped, resume=True, progress=False)


def test_overwriting_begins_anew_once_all_is_checked(whole, tmp_path):
    run(tmp_path, seed=4, controls=False)
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SearchError, match="layers"):
        run(tmp_path, overwrite=True, layers=(40, 41))
    with pytest.raises(Killed):
        run(tmp_path, Bomb(1), overwrite=True)
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
        search(model, TaskWithShortPrompts(groups=40), **SMALL, folder=tmp_path, progress=False)
    assert not any(tmp_path.iterdir())
