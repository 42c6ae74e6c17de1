"""A search that is killed and resumed ends as if nothing had happened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import build_model
from fakes import TaskWithShortPrompts
from transformers import PreTrainedModel

from peft_layerrope import SearchError, SearchResult, UnsupportedModelError, search
from peft_layerrope.searcher import FactorGrid
from peft_layerrope.searcher.evaluator import ModelEvaluator
from peft_layerrope.searcher.progress import SilentProgress
from peft_layerrope.searcher.state import LOG_NAME, STATE_NAME

SMALL = {
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
SEARCHES = {"genetic": {}, "cma-es": {"algorithm": "cma-es", "controls": False}}


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
    """The search, what it found, its state, and how often it tells its audience something."""
    folder, bomb, fields = tmp_path_factory.mktemp("whole"), Bomb(), SEARCHES[request.param]
    result = run(folder, bomb, **fields)
    return fields, result.to_dict(), json.loads((folder / STATE_NAME).read_text()), bomb.calls


def assert_same(result: SearchResult, folder: Path, whole: tuple) -> None:
    _, found, state, _ = whole
    assert result.to_dict() == found
    assert json.loads((folder / STATE_NAME).read_text()) == state
    for line in (folder / LOG_NAME).read_text().splitlines():
        assert "event" in json.loads(line)


def test_a_folder_changes_nothing(whole):
    fields, found, state, _ = whole
    assert run(None, **fields).to_dict() == found
    assert len(state["measurements"]) == found["evaluations"]["all_methods"]
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


@pytest.mark.parametrize("save", [2, 30])
def test_killed_before_a_state_was_in_place(whole, tmp_path, monkeypatch, save):
    """Between writing the new state and putting it in the old one's place."""
    fields, replace, saves = whole[0], os.replace, []

    def crash(*paths: object) -> None:
        saves.append(paths)
        if len(saves) == save:
            raise Killed
        replace(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", crash)
        with pytest.raises(Killed):
            run(tmp_path, **fields)
    assert (tmp_path / f"{STATE_NAME}.partial").exists()
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


def test_a_state_must_be_resumed(stopped):
    with pytest.raises(SearchError, match="resume it, or use another folder"):
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
    before = (stopped / STATE_NAME).read_text()
    arguments = {"model": small_model(), "task": TaskWithShortPrompts(groups=40), **SMALL, **change}
    with pytest.raises(SearchError, match=f"is from another search: {name}"):
        search(**arguments, folder=stopped, resume=True, progress=False)
    assert (stopped / STATE_NAME).read_text() == before


def test_another_number_of_threads_is_refused(stopped):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(SearchError, match=f"threads was {threads} there and is {threads + 1} now"):
            run(stopped, resume=True)
    finally:
        torch.set_num_threads(threads)


def test_resuming_needs_a_folder():
    with pytest.raises(SearchError, match="folder"):
        run(None, resume=True)


def test_a_refused_model_leaves_no_state(tmp_path, monkeypatch):
    """The folder must be good for the next try."""
    model = small_model()
    monkeypatch.setattr(type(model.model.rotary_emb), "forward", lambda self, x, position_ids: (x, x))
    with pytest.raises(UnsupportedModelError):
        search(model, TaskWithShortPrompts(groups=40), **SMALL, folder=tmp_path, progress=False)
    assert not (tmp_path / STATE_NAME).exists()


def test_a_line_of_the_log_that_was_cut_off_is_dropped(tmp_path):
    run(tmp_path)
    log = tmp_path / LOG_NAME
    before = log.read_text()
    log.write_text(before + '{"time": 17, "ev')
    run(tmp_path, resume=True)
    assert log.read_text().startswith(before)
    assert all("event" in json.loads(line) for line in log.read_text().splitlines())
