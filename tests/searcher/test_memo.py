"""The memo: nothing measured twice, races, resuming; and what each view pays."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from fakes import NO_GUARDS, Formula, minus_distance, view_of

from peft_layerrope.searcher.evaluator import Heats, Measurement, plan_heats
from peft_layerrope.searcher.memo import BudgetView, Memo

PLAN = plan_heats(16, race=True, has_short=True)
ONE, GOOD, BAD, CLOSE = (1.0, 1.0), (1.5, 1.5), (2.0, 2.0), (1.5, 1.4)
LEVEL = {ONE: 0.0, GOOD: 1.0, BAD: -5.0, CLOSE: 0.99}


def noisy(vector: tuple[float, ...], group: int) -> float:
    """A level for each vector, an effect of the group that pairing removes, and noise."""
    rng = np.random.default_rng([int(10 * f) for f in vector] + [group])
    level = LEVEL.get(vector, -sum((f - 1.5) ** 2 for f in vector))
    return level + 3.0 * np.sin(group) + 0.2 * rng.standard_normal()


def raced(known: dict | None = None, on_measured=None) -> tuple[Memo, Formula]:
    evaluator = Formula(noisy, PLAN)
    return Memo(evaluator, PLAN, NO_GUARDS, known, on_measured), evaluator


def search_at_random(memo: Memo, count: int = 60, seed: int = 0) -> list[float]:
    """Three searchers one after the other, on overlapping vectors."""
    rng, found = random.Random(seed), []
    for race in (True, False, True):
        view = BudgetView(memo, race)
        for _ in range(count // 12):
            found += view.evaluate([(rng.randrange(10, 21) / 10, rng.randrange(10, 14) / 10) for _ in range(4)])
        found += [view.best()[1], view.evaluations]
    return found


def test_views_count_their_own():
    first = view_of(minus_distance([1.0, 1.0]))
    memo = first._memo
    second = BudgetView(memo)
    assert first.evaluate([(1.0, 2.0), (1.0, 2.0)]) == [-1.0, -1.0]
    second.evaluate([(1.0, 2.0), (2.0, 2.0)])
    asked = [vector for vector, _ in memo.evaluator.asked]
    assert Counter(asked) == {(1.0, 1.0): 1, (1.0, 2.0): 1, (2.0, 2.0): 1}  # the unscaled one for the guards
    assert memo.requested == 4
    assert (first.evaluations, second.evaluations) == (1, 2)
    assert second.best() == ((1.0, 2.0), -1.0)
    second.charge(5)
    assert (first.evaluations, second.evaluations) == (1, 7)


def test_no_heat_of_a_vector_is_run_twice():
    told = Counter()
    memo, evaluator = raced(on_measured=lambda new: told.update((v, len(m.heats) - 1) for v, m in new.items()))
    search_at_random(memo)
    assert set(Counter(evaluator.asked).values()) == {1}
    assert told == Counter(evaluator.asked)


def test_a_race_gives_up_losers_and_measures_the_others_in_full():
    memo, evaluator = raced()
    view = BudgetView(memo)
    view.evaluate([ONE, GOOD])
    values = dict(zip([BAD, CLOSE], view.evaluate([BAD, CLOSE]), strict=True))
    heats = Counter(vector for vector, _ in evaluator.asked)
    assert heats[BAD] == 1
    assert heats[GOOD] == heats[CLOSE] == heats[ONE] == len(PLAN)
    assert not memo.is_complete(BAD)
    assert memo.is_complete(CLOSE)
    assert values[CLOSE] == pytest.approx(np.mean([noisy(CLOSE, g) for g in range(16)]))
    # the rival's fitness, plus how far the loser was behind on the groups that both saw
    gap = np.mean([noisy(BAD, g) - noisy(GOOD, g) for g in range(4)])
    assert values[BAD] == pytest.approx(view.fitness[GOOD] + gap)
    assert view.best() == (GOOD, view.fitness[GOOD])


def test_the_first_vectors_race_too():
    """The first call has no rival yet: the second and third vector meet the first, the others the best of three."""
    memo, evaluator = raced()
    values = BudgetView(memo).evaluate([ONE, GOOD, BAD, (1.6, 2.0), CLOSE])
    heats = Counter(vector for vector, _ in evaluator.asked)
    assert heats == {ONE: len(PLAN), GOOD: len(PLAN), CLOSE: len(PLAN), BAD: 1, (1.6, 2.0): 1}
    assert values.index(max(values)) == 1


def test_without_a_race_everything_is_measured_in_full():
    memo, _ = raced()
    BudgetView(memo, race=False).evaluate([ONE, GOOD, BAD, CLOSE])
    assert all(map(memo.is_complete, (ONE, GOOD, BAD, CLOSE)))


@pytest.mark.parametrize("seed", range(5))
def test_estimates_rank_below_the_rival(seed):
    memo, _ = raced()
    rng = random.Random(seed)
    for _ in range(3):
        view = BudgetView(memo)
        view.evaluate([ONE])
        for _ in range(10):
            vectors = [(rng.randrange(10, 21) / 10, rng.randrange(10, 14) / 10) for _ in range(4)]
            rival = max(filter(memo.is_feasible, view.fitness), key=view.fitness.get, default=None)
            fresh = [v for v in vectors if v not in view.fitness]
            view.evaluate(vectors)
            for vector in fresh:
                assert memo.is_complete(vector) or view.fitness[vector] < view.fitness[rival]
        best, fitness = view.best()
        assert memo.is_complete(best)
        assert fitness == max(view.fitness.values())


def test_an_estimate_ranks_below_the_rival_where_another_race_went_further():
    """A vector behind on the first heat and ahead on the second, which another searcher's rival beat by more."""
    plan = Heats((4, 12, 4))
    slow, rival, fast = (1.1,), (1.2,), (1.3,)
    levels = {(1.0,): (0, 0, 0), slow: (-1, 5, 0), rival: (0, 0, 0), fast: (-1, 9, 9)}

    def value(vector: tuple[float, ...], group: int) -> float:
        heat = next(h for h, (start, stop) in enumerate(plan.bounds) if start <= group < stop)
        return levels[vector][heat] + (vector == slow) * 0.01 * (-1) ** group

    memo = Memo(Formula(value, plan), plan, NO_GUARDS)
    memo.measure([rival, fast])
    memo.measure([slow], rival=fast)
    assert len(memo.known[slow].heats) == 2
    view = BudgetView(memo)
    view.evaluate([rival])
    estimate = view.evaluate([slow])[0]
    assert memo.is_complete(slow) or estimate < view.fitness[rival]


def test_stored_measurements_replace_the_evaluator():
    memo, _ = raced()
    expected = search_at_random(memo)
    again, unused = raced(known=memo.known)
    assert search_at_random(again) == expected
    assert unused.asked == []
    assert again.known == memo.known
    assert list(again.known) == list(memo.known)


@pytest.mark.parametrize("kept", [1, 17, 60])
def test_a_part_of_the_measurements_is_gone_on_from(kept):
    log: list[tuple] = []
    memo, evaluator = raced(on_measured=lambda new: log.extend((v, m) for v, m in new.items()))
    expected = search_at_random(memo)
    stored: dict[tuple[float, ...], Measurement] = dict(log[:kept])
    again, rest = raced(known=stored)
    assert search_at_random(again) == expected
    assert again.known == memo.known
    assert rest.asked == evaluator.asked[kept:]
    assert again.requested == memo.requested
