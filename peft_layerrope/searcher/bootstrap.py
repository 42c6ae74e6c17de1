"""How much a search's choice depends on its examples: the search split drawn again, with replacement.

Costs no model work: every vector's utilisation is known by context.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from .grid import Factors


def bootstrap_choice(
    measurements: Mapping[Factors, np.ndarray], chosen: Factors, num_groups: int, draws: int, seed: int
) -> dict[str, Any]:
    """Draws the search split's contexts again and again, and sees which of the evaluated vectors would have won.

    Args:
        measurements: each vector's utilisation by context; those with fewer than `num_groups`, given up early by
            racing, and those with values that are not finite take no part.
        chosen: the vector that was chosen.
        num_groups: contexts of the search split.
        draws: how many times to draw.
        seed: of the drawing.

    Returns:
        `draws`; `winners`, the number of distinct winners; `chosen_wins`, the share of draws won by `chosen`;
        `chosen_behind_winner`, mean and 95th percentile of the winner's utilisation minus that of `chosen`;
        `factors_5_50_95`, for each layer the percentiles of the winner's factor.
    """
    vectors = [
        vector for vector, values in measurements.items() if len(values) == num_groups and np.isfinite(values).all()
    ]
    values = np.array([measurements[vector] for vector in vectors])
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=draws)
    means = counts @ values.T / num_groups  # (draws, vectors)
    winners = means.argmax(axis=1)
    behind = means.max(axis=1) - means[:, vectors.index(chosen)]
    factors = np.array([vectors[winner] for winner in winners])
    return {
        "draws": draws,
        "winners": len(Counter(winners.tolist())),
        "chosen_wins": round(float((winners == vectors.index(chosen)).mean()), 4),
        "chosen_behind_winner": [round(float(behind.mean()), 4), round(float(np.percentile(behind, 95)), 4)],
        "factors_5_50_95": np.percentile(factors, (5, 50, 95), axis=0, method="nearest").T.tolist(),
    }
