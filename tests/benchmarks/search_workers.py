"""Throughput of two Ray workers against one; the goal is a ratio of 1.7 on two free cores.

    python tests/benchmarks/search_workers.py

On the demo model, with one thread for each worker. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ray
import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from peft_layerrope import KeyValueWords, RayWorkers, SearchSettings, demo_model_path
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.searcher.evaluator import ModelEvaluator
from peft_layerrope.searcher.space import Factors

LENGTH = 512
POPULATION = 16  # vectors of one request, as in a generation


def task() -> KeyValueWords:
    return KeyValueWords(AutoTokenizer.from_pretrained(demo_model_path()), LENGTH)


def demo_model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(demo_model_path()).eval()


def vectors(num_layers: int, rng: random.Random) -> list[Factors]:
    """New vectors in every round."""
    return [tuple(rng.uniform(1, 2) for _ in range(num_layers)) for _ in range(POPULATION)]


def throughput(rounds: int) -> None:
    """Each round has one worker and two evaluate the same vectors, taking turns at going first."""
    num_layers = demo_model().config.num_hidden_layers
    model = get_peft_model(demo_model(), SearchSettings().adapter_config([1.0] * num_layers)).eval()
    local, split = ModelEvaluator(Scorer(model)), task().split("search", 4)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    pools = {number: RayWorkers(number, threads_per_worker=1)(local, split.part([0])) for number in (1, 2)}
    for number, pool in pools.items():
        pool.wait_for(number)
    rng = random.Random(0)
    ratios, rates = [], {1: [], 2: []}
    for number in range(rounds + 2):
        members = vectors(num_layers, rng)
        seconds, values = {}, {}
        for workers in (1, 2) if number % 2 else (2, 1):
            started = time.perf_counter()
            values[workers] = [scores.to_plain() for scores in pools[workers].scores(members, split)]
            seconds[workers] = time.perf_counter() - started
        assert values[1] == values[2]
        if number >= 2:  # the first two warm up
            ratios.append(seconds[1] / seconds[2])
            for workers, spent in seconds.items():
                rates[workers].append(len(members) / spent)
    low, median, high = statistics.quantiles(ratios, n=4)
    table = Table("what", "median", "quartiles")
    table.add_row("throughput: two workers / one", f"{median:.3f}", f"{low:.3f} to {high:.3f}")
    for workers, name in ((1, "one worker"), (2, "two workers")):
        low, median, high = statistics.quantiles(rates[workers], n=4)
        table.add_row(f"vectors a second, {name}", f"{median:.2f}", f"{low:.2f} to {high:.2f}")
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    throughput(arguments.rounds)


if __name__ == "__main__":
    main()
