"""Spreads a search over Ray workers: processes of this machine, or nodes of a cluster.

    pip install "peft-layerrope[ray]"
    python examples/cluster.py --workers 2
    python examples/cluster.py --workers 16 --address auto       # on a node of a running cluster

Each worker loads the model once; after that only factors and scores travel. Workers that die are replaced, and the
result is bit for bit the one of a single process. On the command line: `layerrope search --workers 2`.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_layerrope import KeyValueWords, RayWorkers, SearchSettings, demo_model_path, search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--address", help="of a running cluster, such as auto; default: a Ray of this machine's own")
    parser.add_argument("--output", default="cluster-adapter", help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=24, help="generations for the factors of all layers")
    parser.add_argument("--contexts", type=int, default=32, help="of the held-out test")
    args = parser.parse_args()

    path = demo_model_path()  # every node must be able to read it; a Hub id is one that they all can
    model = AutoModelForCausalLM.from_pretrained(path)
    task = KeyValueWords(AutoTokenizer.from_pretrained(path), length=512, num_positions=5)
    settings = SearchSettings(steps=args.steps, test_groups=args.contexts, max_harm=None)
    with RayWorkers(args.workers, address=args.address, model_source=path) as workers:
        result = search(model, task, settings, distribute=workers)

    gain = result.table.difference(result.chosen, "uniform")
    print(f"factors: {result.config.layer_factors}")
    low, value, high = (100 * number for number in (gain.low, gain.value, gain.high))
    print(f"over the best uniform factor: {value:+.1f} points [{low:+.1f}, {high:+.1f}]")
    result.save_pretrained(args.output)
    print(f"saved: {args.output}")


if __name__ == "__main__":
    main()
