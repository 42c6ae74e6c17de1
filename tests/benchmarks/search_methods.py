"""Search methods at equal compute, over several seeds: held-out accuracy of written answers.

    python tests/benchmarks/search_methods.py --output methods.json                 # the demo, 5 seeds, 20 minutes
    python tests/benchmarks/search_methods.py --output qwen.json --seeds 3 -- MODEL --task kv_retrieval --num-keys 100

Each seed is one `layerrope search` with `--algorithm cma-es` and one with `--algorithm paper`, which looks at as many
contexts: so many generations as its population, times its contexts, goes into what the other's generations take. What
follows `--` goes to both. The seed is the searchers' and the task's: each seed has contexts of its own in all splits.
Prints a markdown table; the same command again goes on where it was interrupted. Intervals are Student's t over seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from peft_layerrope.files import write_atomically
from peft_layerrope.scoring.scores import Interval, mean_interval
from peft_layerrope.searcher.result import LABELS, PER_LAYER

CURVE = "paper's curve"
POPULATION, CONTEXTS = 16, 8  # of the paper's search


def searched(folder: Path, *options: str) -> dict[str, Any]:
    """Runs one search, and returns its report."""
    command = [str(Path(sys.executable).with_name("layerrope")), "search", "--output", str(folder), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "search.json").read_text())


def accuracies(report: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: 100 * row["test"]["average_accuracy"] for row in report["table"]}


def one_seed(seed: int, steps: int, options: list[str]) -> dict[str, float]:
    """Held-out accuracy of each method, in %."""
    seeds = ("--seed", str(seed), "--task-seed", str(seed))
    with tempfile.TemporaryDirectory() as folder:
        ours = searched(Path(folder, "ours"), *options, *seeds, "--steps", str(steps))
        looked_at = ours["evaluations"]["per_layer_search"]  # a context each
        generations = max(2, round(looked_at / (POPULATION * CONTEXTS)))
        sizes = ("--population", str(POPULATION), "--search-groups", str(CONTEXTS), "--steps", str(generations))
        paper = searched(Path(folder, "paper"), *options, *seeds, "--algorithm", "paper", *sizes)
    return {**accuracies(ours), CURVE: accuracies(paper)[PER_LAYER]}


def table(found: dict[str, dict[str, float]]) -> str:
    """One line for each method, the best first."""
    names = {**LABELS, CURVE: "paper's curve"}
    values = {name: np.array([seed[name] for seed in found.values()]) for name in names}

    def cell(interval: Interval) -> str:
        return f"{interval.value:.1f} [{interval.low:.1f}, {interval.high:.1f}]"

    lines = [
        f"| {names[name]} | {cell(mean_interval(some))} | "
        f"{'' if name == PER_LAYER else cell(mean_interval(values[PER_LAYER] - some))} |"
        for name, some in sorted(values.items(), key=lambda item: -item[1].mean())
    ]
    head = "| method | held-out accuracy, % | per layer minus it |\n| --- | ---: | ---: |"
    return "\n".join([head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=64, help="generations of cma-es")
    parser.add_argument("options", nargs="*", help="of both searches, after --")
    asked = parser.parse_args()
    identity = [asked.steps, asked.options]
    kept = json.loads(asked.output.read_text()) if asked.output.exists() else {"asked": identity, "found": {}}
    if kept["asked"] != identity:
        sys.exit(f"{asked.output} is of other options: {kept['asked']}")
    for seed in range(asked.seeds):
        if str(seed) not in kept["found"]:
            kept["found"][str(seed)] = one_seed(seed, asked.steps, asked.options)
            write_atomically(asked.output, json.dumps(kept, indent=1) + "\n")
            print(f"seed {seed}: {kept['found'][str(seed)]}", file=sys.stderr)
    print(table(kept["found"]))


if __name__ == "__main__":
    main()
