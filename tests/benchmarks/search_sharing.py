"""Shared leading layers against plain evaluation, on the demo model: the same bits, fewer layers, less time.

    python tests/benchmarks/search_sharing.py                           # 50 vectors, about two minutes on two CPU cores
    python tests/benchmarks/search_sharing.py --vectors 8 --groups 2 --rounds 1

Three sets of vectors: independent random factors, which share least; curves with Gaussian genes, as a first generation
has; and one vector with one layer moved, as coordinate steps try them. Every vector's gold log-probabilities (float64,
from float32 logits) and hits have to be equal bit for bit. Both ways run in every round, taking turns at going first;
the store is empty at the beginning of each.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from peft_layerrope import KeyValueWords, PositionScores, SearchSettings, Split, demo_model_path
from peft_layerrope.searcher import Factors
from peft_layerrope.searcher.algorithms import random_vectors
from peft_layerrope.searcher.evaluator import ModelEvaluator
from peft_layerrope.searcher.space import FactorSpace, make_genome
from peft_layerrope.tuner.sites import find_stack

SHARE_BYTES = 2**30
Scores = dict[Factors, PositionScores]


def identical(first: PositionScores, second: PositionScores) -> bool:
    """Whether two vectors' scores are equal bit for bit."""
    same_log_prob = np.array_equal(first.log_prob.view(np.int64), second.log_prob.view(np.int64))
    return same_log_prob and np.array_equal(first.correct, second.correct)


def neighbours(space: FactorSpace, count: int, rng: random.Random) -> list[Factors]:
    """A random vector, and others that differ from it in one layer."""
    values = space.grid.values
    centre = [rng.choice(values) for _ in space.scaled_layers]
    vectors = {space.spread(centre): None}
    count = min(count, 1 + len(centre) * (len(values) - 1))
    while len(vectors) < count:
        moved = list(centre)
        moved[rng.randrange(len(moved))] = rng.choice(values)
        vectors[space.spread(moved)] = None
    return list(vectors)


def curves(space: FactorSpace, count: int, rng: random.Random) -> list[Factors]:
    """Distinct vectors of random Bézier curves."""
    genome = make_genome("bezier", space)
    vectors: dict[Factors, None] = {}
    while len(vectors) < count:
        vectors[genome.decode(genome.random(rng))] = None
    return list(vectors)


def evaluate(
    model: PeftModel, split: Split, vectors: Sequence[Factors], share_bytes: int
) -> tuple[Scores, float, float]:
    """Returns the scores, the seconds, and the share of layers that ran."""
    settings = SearchSettings(algorithm="genetic")
    evaluator = ModelEvaluator(
        model,
        [split],
        objective=settings.objective,
        weights=settings.weights,
        batch_tokens=settings.batch_tokens,
        share_bytes=share_bytes,
    )
    evaluator.score(vectors[:1], 0)  # what a search does once: makes the batches, and tries whether sharing is exact
    evaluator.forget()
    started = time.perf_counter()
    scores = evaluator.score(vectors, 0)
    seconds = time.perf_counter() - started
    if bool(evaluator.sharing) != bool(share_bytes):
        raise RuntimeError("sharing was not found to be exact on this model.")
    return scores, seconds, evaluator.layers_run / evaluator.layers_asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=50)
    parser.add_argument("--groups", type=int, default=8, help="contexts of 512 tokens, each asked at 11 positions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    settings = SearchSettings(algorithm="genetic")
    base = AutoModelForCausalLM.from_pretrained(demo_model_path()).eval()
    space = settings.space(tuple(find_stack(base).key_sources))
    split = KeyValueWords(AutoTokenizer.from_pretrained(demo_model_path()), 512).split("search", options.groups)
    model = get_peft_model(base, settings.adapter_config([1.0] * space.num_layers))
    rng = random.Random(options.seed)
    families = {
        "random factors": random_vectors(space, options.vectors, rng),
        "random curves": curves(space, options.vectors, rng),
        "one layer moved": neighbours(space, options.vectors, rng),
    }
    evaluate(model, split, families["random factors"][:2], SHARE_BYTES)  # warm up
    table = Table("vectors", "bit-identical", "layers run", "time / plain", "of the rounds")
    for name, vectors in families.items():
        ratios: list[float] = []
        layers_run = 1.0
        same = dict.fromkeys(vectors, True)
        for number in range(options.rounds):
            ways = (SHARE_BYTES, 0) if number % 2 else (0, SHARE_BYTES)
            outcomes = {share_bytes: evaluate(model, split, vectors, share_bytes) for share_bytes in ways}
            (shared, seconds, layers_run), (plain, plain_seconds, _) = outcomes[SHARE_BYTES], outcomes[0]
            ratios.append(seconds / plain_seconds)
            for vector in vectors:
                same[vector] &= identical(shared[vector], plain[vector])
        table.add_row(
            name,
            f"{sum(same.values())} of {len(vectors)}",
            f"{layers_run:.3f}",
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f} to {max(ratios):.3f}",
        )
    console = Console(width=110)
    console.print(table)
    console.print(
        f"{options.groups} contexts × {len(split.positions)} positions, {options.rounds} rounds, store of "
        f"{SHARE_BYTES // 2**20} MiB, {torch.get_num_threads()} threads",
        highlight=False,
    )


if __name__ == "__main__":
    main()
