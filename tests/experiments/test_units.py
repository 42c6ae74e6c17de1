"""Numbers in words: signs, units, and no claim where the interval holds 0."""

from __future__ import annotations

import numpy as np
import pytest
from experiment_helpers import scores_of
from scipy import stats

from peft_layerrope import PositionScores
from peft_layerrope.experiments import by_place, json_data, score_header, utilization_difference, verdict
from peft_layerrope.report import ACCURACY, LOSS, score_cells
from peft_layerrope.scoring.scores import Interval


@pytest.mark.parametrize(
    ("interval", "unit", "text"),
    [
        (Interval(0.1, 0.05, 0.15), ACCURACY, "a beats b: +10.0 points [+5.0, +15.0]."),
        (Interval(-0.1, -0.15, -0.05), ACCURACY, "a falls behind b: -10.0 points [-15.0, -5.0]."),
        (
            Interval(0.1, -0.05, 0.25),
            ACCURACY,
            "a against b: no difference beyond noise (+10.0 points [-5.0, +25.0]).",
        ),
        (Interval(0.0, 0.0, 0.0), ACCURACY, "a against b: no difference beyond noise (+0.0 points [+0.0, +0.0])."),
        # a score is minus the loss: a higher one is a lower loss
        (Interval(0.2, 0.1, 0.3), LOSS, "a beats b: -0.200 nats [-0.300, -0.100]."),
    ],
)
def test_verdict(interval, unit, text):
    assert verdict("a", "b", interval, unit) == text


def test_an_interval_that_is_not_finite_is_none_in_json():
    assert json_data(gap=Interval(0.5, -np.inf, np.inf)) == {"gap": {"value": 0.5, "low": None, "high": None}}


def test_the_middle_is_the_average_of_all_inner_positions():
    found = by_place(scores_of([[1, 0, 1, 0], [1, 1, 1, 1]]))
    assert {place: values.tolist() for place, values in found.items()} == {
        "first": [1, 1],
        "middle": [0.5, 1],
        "last": [0, 1],
    }


def test_cells_match_their_header_for_both_measures():
    accuracy = scores_of([[1, 0, 0], [1, 1, 0]])
    cells = score_cells(accuracy, score_header("accuracy"))
    assert tuple(cells) == score_header("accuracy")
    assert list(cells.values())[:3] == ["100.0", "50.0", "0.0"]
    loss = PositionScores((0, 9), np.zeros((2, 2), dtype=bool), np.array([[-1.0, -2.0], [-1.2, -2.2]]), "loss")
    low, high = stats.ttest_1samp([1.5, 1.7], 0).confidence_interval(0.95)
    cells = score_cells(loss, score_header("loss"))
    assert cells == {"loss": f"1.600 [{low:.3f}, {high:.3f}]", "perplexity": f"{np.exp(1.6):.2f}"}


def test_utilisation_difference_is_paired():
    one, other = scores_of([[1, 1, 1], [0, 0, 0]]), scores_of([[1, 0, 1], [0, 0, 0]])
    difference = utilization_difference(one, other)
    assert difference.value == pytest.approx(one.utilization() - other.utilization())
    assert difference.value == pytest.approx(0.5 * 1 / 3)  # the middle weighs 1 of 3
