"""Search methods at equal evaluations on the demo model: held-out utilisation U, several seeds, paired by context.

    python tests/benchmarks/search_methods.py --output methods.json             # 5 seeds, about 15 minutes
    python tests/benchmarks/search_methods.py --output small.json --small --seeds 2

Prints a markdown table; the same command again goes on where it was interrupted, and only prints what is done.

Seed s is the seed of the searchers and of the task that the search, validation and short prompts come from. Every
vector found is scored on one common test split, of the task with seed 1000, which shares no context with any of them.

The budget of a seed is what the default search (genetic algorithm over Bézier curves, then gradient and coordinate
steps) took: `per_layer_search`, distinct vectors and three for each gradient step. Its choice on the validation split
is not in it. The shared-factor controls and random search come from the same run, at that budget (and no fewer than
150, which is every member of the two-factor family). The other methods run on the same search split and prompts, from
the same two uniform vectors, under the same guards and racing, until they have asked for as many distinct vectors: a
generation that passes the budget is finished, in their favour. A method shows fewer evaluations if it converged (a
population drew four times the budget and too few of its vectors were new) or found no better neighbour.

U is in percent (of exact matches) or in nats (of gold log-probabilities, what is searched for). Intervals of the means
are Student's t over seeds. The paired ones are over test contexts, each context's difference averaged over seeds
first: they hold for these seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from peft_layerrope import KeyValueWords, SearchSettings, Split, demo_model_path, search
from peft_layerrope.files import write_atomically
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.scoring.scores import Interval, mean_interval
from peft_layerrope.searcher import Factors
from peft_layerrope.searcher.algorithms import Generation, best_of, run_strategy, uniform_vectors
from peft_layerrope.searcher.evaluator import Measurement, ModelEvaluator, plan_heats
from peft_layerrope.searcher.memo import BudgetView, Memo
from peft_layerrope.searcher.result import CURVE, LABELS, UNIFORM
from peft_layerrope.tasks import check_disjoint
from peft_layerrope.tuner.sites import find_stack

LENGTH, TEST_SEED = 512, 1000
MAX_BUDGETS = 4  # a population method may draw so many times its budget, to find that many distinct vectors
DEFAULT = "refined"
SMALL = {
    "search_groups": 8,
    "validation_groups": 8,
    "test_groups": 2,
    "population": 6,
    "generations": 2,
    "refine_evaluations": 8,
    "gradient_steps": 2,
}
STRATEGIES: dict[str, dict[str, str]] = {
    "bezier": {"algorithm": "genetic", "curve": "bezier"},
    "direct": {"algorithm": "genetic", "curve": "direct"},
    "linear": {"algorithm": "genetic", "curve": "linear"},
    "greedy": {"algorithm": "greedy"},
}
NAMES = {
    DEFAULT: "GA over Bézier, refined (default)",
    "bezier": "GA over Bézier, whole budget",
    "direct": "GA over factors",
    "greedy": "greedy coordinate steps",
    "linear": "GA over straight lines",
    "random": "random factors",
    "first_layers_alone": "shared: first k at 1, rest b",
    "first_and_rest": "shared: first a, rest b",
    "line": "all straight lines",
    "curve": "the default before refinement",
    "uniform": "best uniform factor",
    "none": "no scaling",
}
UNITS = {"u_accuracy": (100, "U, %"), "accuracy": (100, "accuracy, %"), "u_log_prob": (1, "U, nats")}
errors = Console(stderr=True)


class _SpentError(Exception):
    """The budget is used up."""


class Bench:
    """The search split of one seed, and methods on it.

    Args:
        model: taken over, an adapter is injected.
        tokenizer: of the model.
        settings: of the default search.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: SearchSettings) -> None:
        self._settings = settings
        task, short_length = task_of(tokenizer, settings.seed), model.config.max_position_embeddings // 2
        search_split = task.split("search", settings.search_groups)
        short = task.shortened(short_length).split("search", settings.short_groups)
        self.splits = [search_split, task.split("validation", settings.validation_groups), short]
        self._space = settings.space(tuple(find_stack(model).key_sources))
        self._heats = plan_heats(settings.search_groups, settings.race, has_short=True)
        self._evaluator = ModelEvaluator(
            get_peft_model(model, settings.adapter_config([1.0] * self._space.num_layers)),
            [*(search_split.part(*bounds) for bounds in self._heats.bounds), short],
            objective=settings.objective,
            weights=settings.weights,
            batch_tokens=settings.batch_tokens,
            share_bytes=settings.share_mib * 2**20,
        )
        self._known: dict[Factors, Measurement] = {}  # of all methods: saves time, and changes no result
        self._uniform: Factors | None = None

    def _remember(self, new: dict[Factors, Measurement]) -> None:
        for vector, measured in new.items():
            if len(measured.heats) > len(self._known.get(vector, Measurement()).heats):
                self._known[vector] = measured

    def _view(self) -> BudgetView:
        memo = Memo(self._evaluator, self._heats, self._settings.guards, self._known, self._remember)
        return BudgetView(memo, self._settings.race)

    def run(self, budget: int, **strategy: str) -> tuple[Factors, int]:
        """Returns what a method finds, and the number of distinct vectors that it asked for."""
        settings = self._with_budget(budget, strategy)
        if self._uniform is None:
            family = uniform_vectors(self._space)
            self._uniform = best_of(UNIFORM, family, self._view(), len(family), random.Random(0)).factors
        view = self._view()

        def stop(generation: Generation, random_state: list[Any]) -> None:
            if view.evaluations >= budget:
                raise _SpentError

        rng = random.Random(f"{settings.seed}/{CURVE}")
        try:
            found = run_strategy(settings, self._space, view, rng, [1.0, self._uniform[0]], stop).factors
        except _SpentError:
            found = view.best()[0]
        return found, view.evaluations

    def _with_budget(self, budget: int, strategy: dict[str, str]) -> SearchSettings:
        values = {name: getattr(self._settings, name) for name in self._settings.__dataclass_fields__}
        if strategy["algorithm"] == "greedy":  # without generations: exactly population × (generations + 1) vectors
            return SearchSettings(**{**values, **strategy, "population": budget, "generations": 0})
        generations = -(-MAX_BUDGETS * budget // self._settings.population) - 1
        return SearchSettings(**{**values, **strategy, "generations": generations})


def task_of(tokenizer: PreTrainedTokenizerBase, seed: int) -> KeyValueWords:
    return KeyValueWords(tokenizer, LENGTH, seed=seed)


def load_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(demo_model_path()).eval()


class Results:
    """What is done, in one JSON file.

    Args:
        path: read if it exists.
        identity: what the results depend on; a file of other settings is refused.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        self.content: dict[str, Any] = {"identity": json.loads(json.dumps(identity)), "runs": {}, "tested": {}}
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["identity"] != self.content["identity"]:
                raise SystemExit(f"{path} holds results of other settings: use another --output.")
            self.content = before

    def of_seed(self, seed: int) -> dict[str, Any]:
        """The methods done for a seed: each with `factors` and `evaluations`."""
        return self.content["runs"].setdefault(str(seed), {})

    def add(self, seed: int, found: dict[str, dict[str, Any]]) -> None:
        """Keeps what methods found."""
        self.of_seed(seed).update(found)
        self._save()

    def scores(self, factors: Sequence[float], make: Callable[[], dict[str, list[float]]]) -> dict[str, list[float]]:
        """A vector's scores by test context, made once."""
        tested, name = self.content["tested"], json.dumps(list(factors))
        if name not in tested:
            tested[name] = make()
            self._save()
        return tested[name]

    def _save(self) -> None:
        write_atomically(self._path, json.dumps(self.content) + "\n")


def default_search(tokenizer: PreTrainedTokenizerBase, settings: SearchSettings) -> dict[str, dict[str, Any]]:
    """The product itself, with its controls; also its table's other rows."""
    result = search(load_model(), task_of(tokenizer, settings.seed), settings, progress=False)
    found = {
        row.name: {"factors": list(row.factors), "evaluations": row.evaluations, "exhaustive": row.exhaustive}
        for row in result.table
    }
    if found[DEFAULT]["evaluations"] != result.evaluations["per_layer_search"]:
        raise RuntimeError("the default's row does not say what it cost.")
    return found


def search_seed(results: Results, tokenizer: PreTrainedTokenizerBase, settings: SearchSettings, test: Split) -> None:
    """Runs what is missing of one seed."""
    bench = Bench(load_model(), tokenizer, settings)
    check_disjoint([*bench.splits, test])
    done = results.of_seed(settings.seed)
    if DEFAULT not in done:
        started = time.perf_counter()
        results.add(settings.seed, default_search(tokenizer, settings))
        report(settings.seed, DEFAULT, done[DEFAULT], started)
    for name, strategy in STRATEGIES.items():
        if name not in done:
            started = time.perf_counter()
            factors, evaluations = bench.run(done[DEFAULT]["evaluations"], **strategy)
            results.add(settings.seed, {name: {"factors": list(factors), "evaluations": evaluations}})
            report(settings.seed, name, done[name], started)


def report(seed: int, name: str, found: dict[str, Any], started: float) -> None:
    seconds = time.perf_counter() - started
    errors.print(f"seed {seed}, {NAMES[name]}: {found['evaluations']} evaluations, {seconds:.0f} s", highlight=False)


def test_scores(model: PeftModel, test: Split, factors: Sequence[float]) -> dict[str, list[float]]:
    """Scores a vector on the common test split: each context's share in U and in accuracy."""
    model.base_model.set_layer_factors(factors)
    scores = Scorer(model).score(test)
    values = {
        "u_accuracy": scores.utilisation_by_group("accuracy"),
        "accuracy": scores.average_by_group,
        "u_log_prob": scores.utilisation_by_group("log_prob"),
    }
    return {name: [round(float(v), 6) for v in by_group] for name, by_group in values.items()}


def shown(interval: Interval, unit: str, signed: bool = False) -> str:
    scale, digits, sign = UNITS[unit][0], 1 if UNITS[unit][0] == 100 else 3, "+" if signed else ""
    value, low, high = (f"{scale * v:{sign}.{digits}f}" for v in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def show(results: Results, seeds: range, values: dict[str, dict[str, np.ndarray]]) -> None:
    """Prints both tables. `values` holds an array `(seeds, contexts)` for each method and measure."""
    print("| method | evaluations | " + " | ".join(f"{label} [95 % over seeds]" for _, label in UNITS.values()) + " |")
    print("|---|---|" + "---|" * len(UNITS))
    ranked = sorted(values, key=lambda name: -values[name]["u_log_prob"].mean())
    for name in ranked:
        runs = [results.of_seed(seed)[name] for seed in seeds]
        counts = [run["evaluations"] for run in runs]
        cost = f"{np.mean(counts):.0f} ({min(counts)} to {max(counts)})" if len(set(counts)) > 1 else str(counts[0])
        cost += ", its whole family" if all(run.get("exhaustive") for run in runs) and name != "random" else ""
        cells = [shown(mean_interval(values[name][unit].mean(axis=1)), unit) for unit in UNITS]
        print(f"| {NAMES[name]} | {cost} | {' | '.join(cells)} |")
    print("\nThe default minus each, paired by test context, seeds averaged:\n")
    print("| method | " + " | ".join(f"{label} [95 %]" for _, label in UNITS.values()) + " | seeds with higher U |")
    print("|---|" + "---|" * len(UNITS) + "---|")
    for name in ranked:
        if name == DEFAULT:
            continue
        gaps = {unit: values[DEFAULT][unit] - values[name][unit] for unit in UNITS}
        cells = [shown(mean_interval(gaps[unit].mean(axis=0)), unit, signed=True) for unit in UNITS]
        by_seed = gaps["u_log_prob"].mean(axis=1)
        wins, ties = int((by_seed > 0).sum()), int((by_seed == 0).sum())
        cells.append(f"{wins} of {len(by_seed)}" + (f", {ties} equal" if ties else ""))
        print(f"| {NAMES[name]} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file with all results; goes on with it")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--test-groups", type=int, default=200, help="contexts of the common test split")
    parser.add_argument("--small", action="store_true", help="tiny searches, to see that this works")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    if not set(LABELS) <= set(NAMES):
        raise RuntimeError(f"no name for {set(LABELS) - set(NAMES)}.")
    overrides = dict(SMALL) if options.small else {"test_groups": 2}  # the search's own test split is not used
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    test = task_of(tokenizer, TEST_SEED).split("test", options.test_groups)
    settings = asdict(SearchSettings(algorithm="genetic", **overrides))
    results = Results(options.output, {"settings": settings, "test": test.describe(), "length": LENGTH})
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for seed in seeds:
        search_seed(results, tokenizer, SearchSettings(algorithm="genetic", seed=seed, **overrides), test)
    base = load_model()
    adapted = get_peft_model(
        base, SearchSettings(algorithm="genetic").adapter_config([1.0] * len(find_stack(base).layers))
    )
    values: dict[str, dict[str, np.ndarray]] = {}
    for name in (name for name in NAMES if all(name in results.of_seed(seed) for seed in seeds)):
        vectors = [results.of_seed(seed)[name]["factors"] for seed in seeds]
        rows = [results.scores(factors, lambda f=factors: test_scores(adapted, test, f)) for factors in vectors]
        values[name] = {unit: np.array([row[unit] for row in rows]) for unit in UNITS}
        errors.print(f"scored {NAMES[name]}", highlight=False)
    show(results, seeds, values)
    print(
        f"\n{options.seeds} seeds (of the searchers and of their examples); common test split: {options.test_groups} "
        f"contexts of {LENGTH} tokens × {len(test.positions)} positions, task seed {TEST_SEED}, fingerprint "
        f"{test.fingerprint()}, disjoint from every search, validation and short split."
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
