"""Intervals against SciPy, against the textbook's formulas for single answers, and by simulation."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
from benchmarks.interval_coverage import beta_binomial, differences, proportions, twins
from scipy import stats

from peft_layerrope import PositionScores
from peft_layerrope.files import to_json
from peft_layerrope.scoring.scores import (
    difference_interval,
    mean_interval,
    proportion_interval,
    rank_key,
    wilson_interval,
)

WANTED = 0.93
DRAWS = 200


@pytest.mark.parametrize("simulated", [proportions, differences, twins], ids=lambda f: f.__name__)
def test_intervals_of_accuracies_cover_and_have_a_width(simulated):
    cells = list(simulated(DRAWS))
    chance = 4 * math.sqrt(WANTED * (1 - WANTED) / DRAWS)
    assert min(cell.coverage for cell in cells) >= WANTED - chance
    assert min(cell.smallest for cell in cells) > 0
    for key in {cell.setting[:2] for cell in cells}:  # over correlations: thousands of draws
        assert np.mean([cell.coverage for cell in cells if cell.setting[:2] == key]) >= WANTED
    assert min(cell.t_coverage for cell in cells) < 0.5  # what is asked for is not easily had


@pytest.mark.parametrize(("accuracy", "correlation"), [*product((0.5, 0.7), (0.0, 0.3))])
def test_in_the_middle_they_are_hardly_wider_than_students_t(accuracy, correlation):
    values = beta_binomial(np.random.default_rng(3), 200, 100, 11, accuracy, correlation)
    found = proportion_interval(values)
    t_width = 2 * stats.t.ppf(0.975, 99) * stats.sem(values, axis=-1)
    assert (found.high - found.low).mean() < 1.05 * t_width.mean()


@pytest.mark.parametrize(("right", "contexts"), [(0, 4), (3, 10), (19, 20), (20, 20), (60, 200)])
def test_where_a_context_is_one_answer_it_is_agresti_and_coulls(right, contexts):
    z = stats.t.ppf(0.975, contexts - 1)
    center = (right + z**2 / 2) / (contexts + z**2)
    half = z * math.sqrt(center * (1 - center) / (contexts + z**2))
    found = proportion_interval([1.0] * right + [0.0] * (contexts - right))
    share = contexts / (contexts - 1)  # the sample variance of single answers is a little larger than p (1 - p)
    assert found.value == right / contexts
    assert found.low == pytest.approx(max(center - half, 0), rel=0.02 * share, abs=1e-12)
    assert found.high == pytest.approx(min(center + half, 1), rel=0.02 * share)


@pytest.mark.parametrize(("won", "lost", "contexts"), [(0, 0, 10), (3, 0, 20), (5, 2, 50), (30, 30, 100)])
def test_where_a_context_is_one_answer_the_difference_has_bonett_and_prices_variance(won, lost, contexts):
    gap = (won - lost) / contexts
    variance = (won + lost + 2) / contexts - gap**2
    half = stats.t.ppf(0.975, contexts - 1) * math.sqrt(variance / contexts)
    found = difference_interval([1.0] * won + [-1.0] * lost + [0.0] * (contexts - won - lost))
    assert (found.value, found.low, found.high) == pytest.approx((gap, gap - half, gap + half))


@pytest.mark.parametrize("contexts", [1, 2, 3, 10, 200])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_contexts_that_agree_leave_room(contexts, value):
    found = proportion_interval([value] * contexts)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0.9 / contexts
    gap = difference_interval([value] * contexts)
    assert -1 <= gap.low <= gap.value <= gap.high <= 1
    assert gap.high - gap.low > 0.9 / contexts
    if contexts < 3:
        assert not gap.excludes_zero()


def test_unbounded_means():
    values = [0.1, 0.4, 0.2, 0.5]
    found, reference = mean_interval(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    for equal in ([0.3], [0.1 + 0.2, 0.3, 0.3]):  # up to rounding
        assert (mean_interval(equal).low, mean_interval(equal).high) == (-math.inf, math.inf)
        assert not mean_interval(equal).excludes_zero()
    nothing = mean_interval([0.0, 0.0, 0.0])
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    assert not mean_interval([0.1, math.nan, 0.2]).excludes_zero()


def test_wilson():
    k, n, z = 37, 80, stats.norm.ppf(0.975)
    center = (k / n + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(k / n * (1 - k / n) / n + z**2 / (4 * n**2))
    found = wilson_interval(k, n)
    assert (found.low, found.high) == pytest.approx((center - half, center + half))


@pytest.mark.parametrize("measure", ["accuracy", "loss"])
@pytest.mark.parametrize("groups", [1, 2])
def test_scores_of_few_contexts_are_strict_json_and_prove_nothing(measure, groups):
    right = PositionScores((0, 1, 2), np.ones((groups, 3), dtype=bool), np.full((groups, 3), -0.5), measure)
    wrong = PositionScores((0, 1, 2), np.zeros((groups, 3), dtype=bool), np.full((groups, 3), -2.5), measure)
    assert right.average().high > right.average().low
    assert not right.paired_difference(wrong).excludes_zero()
    values = json.loads(to_json(right.to_dict()), parse_constant=pytest.fail)
    ends = values["average_loss_interval" if measure == "loss" else "average_accuracy_interval"]
    assert ends == [None, None] if measure == "loss" else ends[0] < ends[1] == 1


@pytest.mark.parametrize("worst", [math.nan, -math.inf, math.inf])
def test_what_is_not_finite_ranks_last_wherever_it_stands(worst):
    for scores in ([worst, -3.0, -2.0], [-3.0, -2.0, worst]):
        assert max(scores, key=rank_key) == -2.0
        assert sorted(scores, key=rank_key)[1:] == [-3.0, -2.0]
