"""The state on disk: read back exactly, written in one step, and refused where it is another search's."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_model

from peft_layerrope import PositionScores, SearchError
from peft_layerrope.files.atomic import write_atomically
from peft_layerrope.fingerprint import model_fingerprint
from peft_layerrope.searcher.measurement import HeatScores, Measurement
from peft_layerrope.searcher.state import LOG_NAME, STATE_NAME, RunState

IDENTITY = {"settings": {"seed": 1, "weights": (0.8, 1.0)}, "model": "abc", "splits": [{"name": "search"}]}
ONE, TWO = (1.0, 1.1), (1.0, 2.0)


def filled(folder: Path) -> RunState:
    state = RunState(folder, IDENTITY)
    first = Measurement((HeatScores((0.1, 1 / 3), (1.0, 0.0)),))
    state.add_measurements({ONE: first, TWO: first})
    state.add_measurements({ONE: first.plus(HeatScores((-math.pi,), (0.0,)))})
    scores = PositionScores((0, 5, 9), np.array([[True, False, True]]), np.array([[-0.1, -1 / 3, -math.e]]))
    state.add_scores("test", {TWO: scores})
    state.add_generation("genetic", [[1 / 3, 0.1], [1.0, 2.0]], [3, [2**31, 7], None])
    return state


def test_everything_is_read_back_to_the_bit(tmp_path):
    before = filled(tmp_path)
    text = (tmp_path / STATE_NAME).read_text()
    after = RunState(tmp_path, IDENTITY, resume=True)
    assert after.measurements == before.measurements
    assert list(after.measurements) == [ONE, TWO]
    assert after.num_measurements == 2
    (key, scores), expected = *after.scores.items(), before.scores["test", TWO]
    assert key == ("test", TWO)
    assert scores.positions == expected.positions
    assert scores.correct.dtype == bool
    np.testing.assert_array_equal(scores.correct, expected.correct)
    np.testing.assert_array_equal(scores.log_prob, expected.log_prob)
    assert (tmp_path / STATE_NAME).read_text() == text


def test_log_lines_are_json_in_order(tmp_path):
    filled(tmp_path)
    RunState(tmp_path, IDENTITY, resume=True)
    events = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert [event["event"] for event in events] == ["measured", "measured", "measured", "scored", "resumed"]
    assert events[2]["factors"] == list(ONE)
    assert events[2]["heats"] == 2
    assert all(a["time"] <= b["time"] for a, b in pairwise(events))


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = RunState(None, IDENTITY)
    state.add_measurements({ONE: Measurement((HeatScores((0.0,), (1.0,)),))})
    state.add_generation("x", [[1.0]], [])
    assert state.measurements
    assert not list(tmp_path.iterdir())


def test_a_state_is_not_overwritten(tmp_path):
    filled(tmp_path)
    text = (tmp_path / STATE_NAME).read_text()
    with pytest.raises(SearchError, match="holds an unfinished or finished search: resume it, or use another folder"):
        RunState(tmp_path, IDENTITY)
    assert (tmp_path / STATE_NAME).read_text() == text


def test_nothing_to_resume(tmp_path):
    with pytest.raises(SearchError, match=r"nothing to resume: .*state\.json does not exist"):
        RunState(tmp_path, IDENTITY, resume=True)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"settings": {"seed": 2, "weights": [0.8, 1.0]}}, "settings.seed was 1 there and is 2 now"),
        ({"settings": {"seed": 1, "weights": [0.8, 1.5]}}, r"settings.weights was \[0.8, 1.0\] there"),
        ({"settings": {"seed": 1}}, r"settings.weights was \[0.8, 1.0\] there and is null now"),
        ({"model": "abd"}, 'model was "abc" there and is "abd" now'),
        ({"splits": []}, r'splits was \[{"name": "search"}\] there and is \[\] now'),
        ({"device": "cuda"}, 'device was null there and is "cuda" now'),
    ],
)
def test_the_first_difference_is_named(tmp_path, change, difference):
    filled(tmp_path)
    with pytest.raises(SearchError, match=f"is from another search: {difference}"):
        RunState(tmp_path, {**IDENTITY, **change}, resume=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"measurements"', '"measurement"'),
        lambda text: text.replace('"scores": [[', '"scores": [7, ['),
        lambda text: text.replace('"format": 1', '"format": 99'),
        lambda text: text.replace('"generations": [', '"generations": 7, "x": ['),
        lambda text: b"\xff\xfe\x00",
    ],
)
def test_a_damaged_state_is_an_error_that_says_where(tmp_path, damage):
    filled(tmp_path)
    path = tmp_path / STATE_NAME
    damaged = damage(path.read_text())
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises(SearchError, match=r"state\.json (is damaged|cannot be read|has format)"):
        RunState(tmp_path, IDENTITY, resume=True)


def test_a_torn_partial_file_is_ignored(tmp_path):
    before = filled(tmp_path)
    partial = tmp_path / f"{STATE_NAME}.partial"
    partial.write_text('{"format": 1, "ident')
    assert RunState(tmp_path, IDENTITY, resume=True).measurements == before.measurements
    assert not partial.exists()  # the next save replaced it
    partial.write_text("torn")
    (tmp_path / STATE_NAME).unlink()
    assert RunState(tmp_path, IDENTITY).measurements == {}


def test_a_write_that_fails_keeps_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomically(path, "old")

    def crash(*args: object) -> None:
        raise OSError("crashed before the file was replaced")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="crashed"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_generations_are_compared_on_the_way(tmp_path):
    filled(tmp_path)
    state = RunState(tmp_path, IDENTITY, resume=True)
    state.add_generation("genetic", [[1 / 3, 0.1], [1.0, 2.0]], [3, [2**31, 7], None])
    state.add_generation("genetic", [[0.5]], [])
    state = RunState(tmp_path, IDENTITY, resume=True)
    with pytest.raises(SearchError, match="differs from the interrupted one in generation 0 of 'genetic'"):
        state.add_generation("genetic", [[1 / 3, 0.2], [1.0, 2.0]], [3, [2**31, 7], None])


def test_a_fingerprint_knows_weights_and_configuration():
    same = model_fingerprint(build_model("llama"))
    assert model_fingerprint(build_model("llama")) == same
    changed = build_model("llama")
    with torch.no_grad():
        changed.model.layers[2].mlp.up_proj.weight[0, 3] += 1e-3
    others = [changed, build_model("mistral"), build_model("llama", rms_norm_eps=1e-3), build_model("llama").half()]
    assert same not in map(model_fingerprint, others)
