"""How often do the 95 % intervals of accuracies and of their differences cover, and how wide are they?

Simulates contexts whose positions are right or wrong with a known probability and correlation, and prints Markdown: the
interval of `peft_layerrope.scoring.scores` beside Student's t over contexts, by accuracy and number of contexts.

    python tests/benchmarks/interval_coverage.py [--draws 4000]

`tests/scoring/test_statistics.py` asks for the same coverage, of fewer draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import stats

from peft_layerrope.scoring.scores import Interval, difference_interval, proportion_interval

ACCURACIES = (0.5, 0.7, 0.9, 0.95, 0.97, 0.985, 0.99, 0.995, 0.999)
PAIRS = (
    *((p, p) for p in (0.5, 0.9, 0.99, 0.999)),
    *((0.7, 0.5), (0.95, 0.9), (0.98, 0.9), (0.99, 0.95), (0.999, 0.98), (0.999, 0.9), (0.999, 0.5)),
)
CONTEXTS = (10, 20, 50, 100, 200)
POSITIONS = (3, 11)
CORRELATIONS = (0.0, 0.3, 0.7)  # between the positions of a context
BETWEEN = (0.0, 0.5, 0.95)  # between the candidates
TURNED = (0.5, 2.0, 5.0)  # contexts that turn from right to wrong, where candidates are nearly the same


@dataclass(frozen=True)
class Cell:
    """What was simulated, and what came out: coverage, mean width and smallest width of ours and of Student's t."""

    setting: tuple
    coverage: float
    width: float
    smallest: float
    t_coverage: float
    t_width: float


def student_t(values: np.ndarray) -> Interval:
    """Along the last axis, as `mean_interval` has it."""
    mean, count = values.mean(axis=-1), values.shape[-1]
    half = stats.t.ppf(0.975, count - 1) * values.std(axis=-1, ddof=1) / np.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def cell(setting: tuple, values: np.ndarray, truth: float, interval) -> Cell:
    found = []
    for one in (interval(values), student_t(values)):
        low, high = one.low, one.high
        covers = (low <= truth + 1e-12) & (truth - 1e-12 <= high)
        found.append((float(covers.mean()), float((high - low).mean()), float((high - low).min())))
    return Cell(setting, *found[0], *found[1][:2])


def beta_binomial(rng, draws, contexts, positions, accuracy, correlation) -> np.ndarray:
    """Accuracy of each context, `(draws, contexts)`: each has a difficulty of its own."""
    shape = (draws, contexts, 1)
    if correlation == 0:
        difficulty = np.full(shape, accuracy)
    else:
        weight = (1 - correlation) / correlation
        difficulty = rng.beta(accuracy * weight, (1 - accuracy) * weight, size=shape)
    return (rng.random((draws, contexts, positions)) < difficulty).mean(axis=-1)


def candidates(rng, draws, contexts, positions, pair, correlation, between) -> np.ndarray:
    """Difference of two candidates' accuracies by context, `(draws, contexts)`: normal latent scores that share the
    context's difficulty, and are correlated between the candidates.
    """

    def both(shape):
        one, own = rng.standard_normal((2, *shape))
        return one, between * one + np.sqrt(1 - between**2) * own

    contexts_of, answers_of = both((draws, contexts, 1)), both((draws, contexts, positions))
    accuracies = [
        (np.sqrt(correlation) * c + np.sqrt(1 - correlation) * a < stats.norm.ppf(p)).mean(axis=-1)
        for c, a, p in zip(contexts_of, answers_of, pair, strict=True)
    ]
    return accuracies[0] - accuracies[1]


def near_twins(rng, draws, contexts, accuracy, turned) -> tuple[np.ndarray, float]:
    """Candidates that answer alike, but for so many contexts (on average) of which one gets all wrong; and the true
    difference.
    """
    share = turned / contexts
    right = rng.random((draws, contexts)) < accuracy
    return (right & (rng.random((draws, contexts)) < share)).astype(float), accuracy * share


def proportions(draws: int, seed: int = 0) -> Iterator[Cell]:
    rng = np.random.default_rng(seed)
    for setting in product(ACCURACIES, CONTEXTS, POSITIONS, CORRELATIONS):
        accuracy, contexts, positions, correlation = setting
        values = beta_binomial(rng, draws, contexts, positions, accuracy, correlation)
        yield cell(setting, values, accuracy, proportion_interval)


def differences(draws: int, seed: int = 1) -> Iterator[Cell]:
    rng = np.random.default_rng(seed)
    for setting in product(PAIRS, CONTEXTS, POSITIONS, CORRELATIONS, BETWEEN):
        pair, contexts, positions, correlation, between = setting
        values = candidates(rng, draws, contexts, positions, pair, correlation, between)
        yield cell(setting, values, pair[0] - pair[1], difference_interval)


def twins(draws: int, seed: int = 2) -> Iterator[Cell]:
    rng = np.random.default_rng(seed)
    for setting in product((0.5, 0.9), CONTEXTS, TURNED):
        accuracy, contexts, turned = setting
        yield cell(setting, *near_twins(rng, draws, contexts, accuracy, turned), difference_interval)


def table(title: str, cells: list[Cell]) -> str:
    """Markdown: a line for each of the first two parts of the setting, over all of the others."""
    lines = [
        f"**{title}** ({len(cells)} settings)\n",
        "| | contexts | coverage: least | mean | most | of t: least | mean | width | of t | smallest width |",
        "| --- |" + " ---: |" * 9,
    ]
    for key in dict.fromkeys(c.setting[:2] for c in cells):
        own = [c for c in cells if c.setting[:2] == key]
        coverage, of_t = ([getattr(c, name) for c in own] for name in ("coverage", "t_coverage"))
        percents = [min(coverage), np.mean(coverage), max(coverage), min(of_t), np.mean(of_t)]
        widths = [np.mean([c.width for c in own]), np.mean([c.t_width for c in own]), min(c.smallest for c in own)]
        name = " − ".join(map(str, key[0])) if isinstance(key[0], tuple) else str(key[0])
        numbers = [f"{100 * v:.1f}" for v in percents] + [f"{100 * v:.2f}" for v in widths]
        lines.append(f"| {name} | {key[1]} | {' | '.join(numbers)} |")
    under, over = (sum(test(c) for c in cells) for test in (lambda c: c.coverage < 0.93, lambda c: c.coverage > 0.98))
    worst = min(cells, key=lambda c: c.coverage)
    lines.append(
        f"\nLeast coverage {100 * worst.coverage:.1f} % at {worst.setting}; below 93 % in {under} settings, above 98 % "
        f"in {over}. Student's t: least {100 * min(c.t_coverage for c in cells):.1f} %, below 93 % in "
        f"{sum(c.t_coverage < 0.93 for c in cells)}. Widths in points."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=4000, help="of each setting")
    draws = parser.parse_args().draws
    print(f"95 % intervals, {draws} draws of each setting.\n")
    print(table("Accuracies, beta-binomial", list(proportions(draws))), end="\n\n")
    print(table("Paired differences, latent normal", list(differences(draws))), end="\n\n")
    print(table("Paired differences of near twins: accuracy, contexts", list(twins(draws))))


if __name__ == "__main__":
    main()
