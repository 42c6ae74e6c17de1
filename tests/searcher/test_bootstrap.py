"""The bootstrap against a plain loop over the same draws."""

from __future__ import annotations

import numpy as np

from peft_layerrope.searcher.run import bootstrap_choice

GROUPS, DRAWS = 12, 300


def measurements(rng):
    vectors = [(1.0, 1.0), (1.0, 2.0), (1.5, 1.5), (2.0, 1.0)]
    known = {vector: rng.normal(0.02 * i, 0.1, GROUPS) for i, vector in enumerate(vectors)}
    known[9.0, 9.0] = np.full(GROUPS // 2, 5.0)  # given up early: takes no part
    return known


def test_against_a_loop():
    known = measurements(np.random.default_rng(0))
    chosen = (1.5, 1.5)
    found = bootstrap_choice(known, chosen, GROUPS, DRAWS, seed=5)
    complete = {vector: values for vector, values in known.items() if len(values) == GROUPS}
    counts = np.random.default_rng(5).multinomial(GROUPS, np.full(GROUPS, 1 / GROUPS), size=DRAWS)
    winners, behind = [], []
    for count in counts:
        again = np.repeat(np.arange(GROUPS), count)
        means = {vector: values[again].mean() for vector, values in complete.items()}
        winners.append(max(means, key=means.get))
        behind.append(means[winners[-1]] - means[chosen])
    assert found["draws"] == DRAWS
    assert found["winners"] == len(set(winners))
    assert found["chosen_wins"] == round(winners.count(chosen) / DRAWS, 4)
    assert found["chosen_behind_winner"][0] == round(np.mean(behind), 4)
    layer = sorted(vector[1] for vector in winners)
    assert found["factors_5_50_95"][1][1] == layer[round(0.5 * (DRAWS - 1))]


def test_a_clear_winner_always_wins():
    known = {(1.0,): np.zeros(GROUPS), (2.0,): np.ones(GROUPS)}
    found = bootstrap_choice(known, (2.0,), GROUPS, DRAWS, seed=0)
    assert (found["winners"], found["chosen_wins"], found["chosen_behind_winner"]) == (1, 1.0, [0.0, 0.0])
    assert found["factors_5_50_95"] == [[2.0, 2.0, 2.0]]
