"""What a search keeps in its journal is read back to the bit, and refused where it is not what it should be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from peft_layerrope import InvalidConfigError, PositionScores, SearchError
from peft_layerrope.runs import JOURNAL_NAME
from peft_layerrope.searcher.common import SearchJournal
from peft_layerrope.searcher.evaluator import HeatScores, Measurement

ONE, TWO = (1.0, 1.1), (1.0, 1 / 3)
FIRST = Measurement((HeatScores((0.1, 1 / 3), (1.0, 0.0)),))
MEASUREMENTS = {ONE: FIRST.plus(HeatScores((-math.pi,), (0.0,))), TWO: FIRST}
SCORES = PositionScores((0, 5, 9), np.array([[True, False, True]]), np.array([[-0.1, -1 / 3, -math.e]]))
GENERATION = "genetic", [[1 / 3, 0.1], [1.0, 2.0]], [3, (2**31, 7), None]


@pytest.fixture
def folder(tmp_path) -> Path:
    with SearchJournal(tmp_path, {}) as journal:
        assert journal.gradient_path is None
        journal.add_measurements({ONE: FIRST, TWO: FIRST})
        journal.add_measurements({ONE: MEASUREMENTS[ONE]})
        journal.add_scores("test", {TWO: SCORES})
        journal.add_generation(*GENERATION)
        journal.add_gradient_path([ONE, TWO])
        assert_holds_everything(journal)
    return tmp_path


def assert_holds_everything(journal: SearchJournal) -> None:
    assert journal.measurements == MEASUREMENTS
    assert list(journal.measurements) == [ONE, TWO]
    ((key, scores),) = journal.scores.items()
    assert (key, scores.positions, scores.correct.dtype) == (("test", TWO), SCORES.positions, bool)
    np.testing.assert_array_equal(scores.correct, SCORES.correct)
    np.testing.assert_array_equal(scores.log_prob, SCORES.log_prob)
    assert journal.gradient_path == [ONE, TWO]


def test_everything_is_read_back_to_the_bit_and_goes_on(folder):
    with SearchJournal(folder, {}, resume=True) as journal:
        assert_holds_everything(journal)
        journal.add_measurements({TWO: FIRST.plus(HeatScores((0.5,), (1.0,)))})
        journal.add_scores("validation", {ONE: SCORES})
    with SearchJournal(folder, {}, resume=True) as journal:
        assert [len(measured.heats) for measured in journal.measurements.values()] == [2, 2]
        assert list(journal.scores) == [("test", TWO), ("validation", ONE)]


def test_generations_are_compared_on_the_way(folder):
    with SearchJournal(folder, {}, resume=True) as journal:
        journal.add_generation(*GENERATION)
        journal.add_generation("genetic", [[0.5]], [])
    with SearchJournal(folder, {}, resume=True) as journal:
        journal.add_generation(*GENERATION)
        with pytest.raises(SearchError, match="generation 1"):
            journal.add_generation("genetic", [[0.5001]], [])


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("measured", lambda batch: [[*batch[0][:1], 1, *batch[0][2:]]]),  # a heat before the one that comes first
        ("measured", lambda batch: [batch[0][:3]]),
        ("measured", lambda batch: [[*batch[0][:2], ["x"], batch[0][3]]]),
        ("scored", lambda batch: [[*batch[0][:2], [[0], [[1, 1]], [[0.5]], "accuracy"]]]),
        ("gradient path", lambda path: [5]),
    ],
)
def test_a_value_that_is_not_what_it_should_be_is_damage(folder, kind, damage):
    path = folder / JOURNAL_NAME
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    entry = next(entry for entry in entries if entry.get("kind") == kind)
    entry["value"] = damage(entry["value"])
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with SearchJournal(folder, {}, resume=True) as journal, pytest.raises(InvalidConfigError, match=JOURNAL_NAME):
        assert all((journal.measurements, journal.scores, journal.gradient_path))
