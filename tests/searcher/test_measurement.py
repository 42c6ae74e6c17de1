"""Heats, and the test by which racing gives up."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from peft_layerrope.searcher.evaluator import (
    MIN_RACE_GROUPS,
    RACE_LEVEL,
    Heats,
    HeatScores,
    Measurement,
    clearly_worse,
    plan_heats,
)


@pytest.mark.parametrize("groups", [4, 5, 8, 16, 40])
@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.5])
def test_racing_is_scipys_paired_test(groups, shift):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rival = rng.normal(size=2 * groups)
        values = rival[:groups] + shift + rng.normal(scale=0.3, size=groups)
        expected = stats.ttest_rel(values, rival[:groups], alternative="less").pvalue < RACE_LEVEL
        assert clearly_worse(values, rival) == expected


def test_a_few_groups_prove_nothing():
    few = MIN_RACE_GROUPS - 1
    assert not clearly_worse([-9.0, -9.1, -9.2][:few], [0.0] * few)


@pytest.mark.parametrize(("gap", "worse"), [(-0.25, True), (0.0, False), (0.25, False)])
def test_equal_gaps_need_no_variance(gap, worse):
    assert clearly_worse([1.0 + gap] * 5, [1.0] * 8) is worse


@pytest.mark.parametrize("has_short", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 15, 16, 17, 31, 100])
def test_heats_cover_every_group_once(groups, has_short):
    for race in (True, False):
        plan = plan_heats(groups, race, has_short)
        assert [g for start, stop in plan.bounds for g in range(start, stop)] == list(range(groups))
        assert len(plan) == len(plan.sizes) + has_short
        assert min(plan.sizes) >= 1
    assert plan_heats(groups, False, has_short).sizes == (groups,)
    # one heat, unless a quarter of the groups is enough for a test
    assert (len(plan_heats(groups, True, has_short).sizes) == 1) == (groups // 4 < MIN_RACE_GROUPS)


def test_the_published_cut():
    assert plan_heats(16, True, False).sizes == (4, 2, 2, 4, 4)


def test_a_measurement_grows_by_heats():
    plan = Heats((2, 1), has_short=True)
    measured = Measurement().plus(HeatScores((1.0, 2.0), (1.0, 0.0)))
    assert measured.values(plan).tolist() == [1.0, 2.0]
    assert not measured.is_complete(plan)
    measured = measured.plus(HeatScores((6.0,), (1.0,))).plus(HeatScores((-0.25, -0.75), (0.0, 0.0)))
    assert measured.is_complete(plan)
    assert measured.values(plan).tolist() == [1.0, 2.0, 6.0]
    assert measured.fitness(plan) == 3.0
    assert measured.tail_accuracy(plan) == pytest.approx(2 / 3)
    assert measured.short_loss(plan) == 0.5
    assert Measurement(measured.heats[:2]).short_loss(Heats((2, 1))) is None
