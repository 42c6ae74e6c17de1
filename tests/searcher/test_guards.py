"""Guards: whoever breaks one ranks below the unscaled model and is never chosen."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fakes import Formula, space_of

from peft_layerrope.searcher import Guards
from peft_layerrope.searcher.algorithms import best_of, coordinate_ascent, uniform_vectors
from peft_layerrope.searcher.evaluator import Heats, HeatScores, Measurement
from peft_layerrope.searcher.memo import BudgetView, Memo

PLAN = Heats((10,), has_short=True)


def measured(tail_hits: int, short_loss: float, plan: Heats = PLAN) -> Measurement:
    groups = plan.sizes[0]
    heats = [HeatScores((0.0,) * groups, (1.0,) * tail_hits + (0.0,) * (groups - tail_hits))]
    return Measurement((*heats, HeatScores((-short_loss,), (0.0,))) if plan.has_short else tuple(heats))


TAIL = 0.3 - np.std([1] * 3 + [0] * 7, ddof=1) / np.sqrt(10)  # 3 of 10 contexts lost, less the standard error
SHORT = 1.5  # one group of short prompts has none


@pytest.mark.parametrize(
    ("guards", "violation"),
    [
        (Guards(0.1, 0.5), TAIL - 0.1 + SHORT - 0.5),
        (Guards(None, 0.5), SHORT - 0.5),
        (Guards(0.1, None), TAIL - 0.1),
        (Guards(0.4, 2.0), 0.0),
        (Guards(None, None), 0.0),
        (Guards(0.0, 0.0), TAIL + SHORT),
    ],
)
def test_a_violation_is_what_exceeds_the_limits(guards, violation):
    assert guards.violation(measured(6, 2.0), measured(9, 0.5), PLAN) == pytest.approx(violation)


def test_one_context_that_turns_out_otherwise_violates_nothing():
    assert Guards(0.0, None).violation(measured(8, 0), measured(9, 0), PLAN) == 0
    assert Guards(0.0, None).violation(measured(7, 0), measured(9, 0), PLAN) > 0


def test_being_better_than_the_unscaled_model_violates_nothing():
    assert Guards(0.0, 0.0).violation(measured(9, 0.5), measured(6, 2.0), PLAN) == 0
    assert Guards(0.0, 0.0).violation(measured(6, 2.0), measured(6, 2.0), PLAN) == 0


def test_without_short_prompts_their_guard_is_off():
    plan = Heats((10,))
    assert Guards(None, 0.0).violation(measured(5, 0, plan), measured(5, 0, plan), plan) == 0


@pytest.mark.parametrize(("groups", "limit"), [(20, 0.05), (10, 0.1), (100, 0.07), (16, 0.125)])
def test_a_drop_of_just_the_limit_is_allowed(groups, limit):
    plan = Heats((groups,))
    for hits in range(round(groups * limit), groups + 1):
        after = measured(hits - round(groups * limit), 0, plan)
        assert Guards(limit, None).violation(after, measured(hits, 0, plan), plan) == 0


def guarded(guards: Guards) -> BudgetView:
    """The higher the factor the fitter; from 1.5 on the tail is lost, from 1.3 on the short prompts."""
    evaluator = Formula(
        lambda vector, group: sum(vector),
        PLAN,
        tail=lambda vector, group: max(vector) < 1.5,
        short=lambda vector: -1.0 if max(vector) >= 1.3 else -0.1,
    )
    return BudgetView(Memo(evaluator, PLAN, guards))


@pytest.mark.parametrize(
    ("guards", "highest"),
    [(Guards(), 1.2), (Guards(0.05, None), 1.4), (Guards(None, 0.5), 1.2), (Guards(None, None), 2.0)],
)
def test_violators_rank_below_the_unscaled_model(guards, highest):
    space, view = space_of(2), guarded(guards)
    best = best_of("uniform", uniform_vectors(space), view, 100, random.Random(0))
    assert best.factors == (highest,) * 2
    assert best.fitness == pytest.approx(2 * highest)
    unscaled = view.fitness[1.0, 1.0]
    for vector, fitness in view.fitness.items():
        assert (fitness < unscaled) == (max(vector) > highest)
    assert coordinate_ascent((1.0, 1.0), guarded(guards), space, 100).factors == (highest,) * 2


def test_a_worse_violation_ranks_lower():
    view = guarded(Guards())
    only_short, both = view.evaluate([(1.3, 1.3), (1.8, 1.8)])
    assert both < only_short < 2.0  # the unscaled model's
    assert view.best() == ((1.0, 1.0), 2.0)  # although nobody asked for it
