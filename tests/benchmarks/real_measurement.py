"""How a real model is measured: which likelihood ranks factors as written answers do, and what a measurement costs.

    python tests/benchmarks/real_measurement.py MODEL --task kv_retrieval --num-keys 100
    python tests/benchmarks/real_measurement.py MODEL --task multi_doc_qa --data nq-open-oracle.jsonl.gz --chat-template

Ten varied factor vectors are scored on contexts of the search split, each in three ways: by the answers that the model
writes, by the log-probability of the targets, and by that of the targets with their openings. Printed are the rank
correlations (Spearman) of both likelihoods with the written answers, and with bootstrap intervals over contexts; then
tokens and seconds of one likelihood evaluation, each context once against each prompt whole, and of the preflight that
learns the targets.

On Qwen2.5-Coder 0.5B in bfloat16 and two CPU cores: half an hour.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_layerrope import Example, KeyValueRetrieval, LayerRopeConfig, MultiDocumentQA, Split
from peft_layerrope.scoring.preflight import preflight, prepared, with_targets
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.tasks.targets import Target

RESAMPLES = 2000


def varied_vectors(num_layers: int) -> dict[str, tuple[float, ...]]:
    """Ten vectors: uniform ones on both sides of 1, slopes over depth, and jagged ones."""
    depth = np.linspace(0, 1, num_layers)
    vectors = {f"uniform {value}": np.full(num_layers, value) for value in (0.6, 0.8, 1.0, 1.1, 1.3, 1.5)}
    vectors["falling 1.3 to 0.7"] = 1.3 - 0.6 * depth
    vectors["rising 0.7 to 1.3"] = 0.7 + 0.6 * depth
    for seed, spread in ((0, 0.15), (1, 0.3)):
        draw = random.Random(seed)
        vectors[f"jagged ±{spread}"] = np.exp([draw.gauss(0, spread) for _ in range(num_layers)])
    return {name: tuple(round(float(value), 2) for value in vector) for name, vector in vectors.items()}


def with_openings(split: Split, own: Mapping[str, Target], scored: bool) -> Split:
    """The same examples with their openings scored, or given."""

    def target(example: Example) -> Target:
        opening, answer = own.get(example.question, Target(example.opening_ids, example.answer_ids))
        return Target((), opening + answer) if scored else Target(opening, answer)

    return replace(split, examples=tuple(replace(e, **target(e)._asdict()) for e in split.examples))


def rank_correlation(one: np.ndarray, other: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Spearman's, and its 95 % bootstrap interval over contexts; both of shape `(vectors, contexts)`."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, one.shape[1], (RESAMPLES, one.shape[1]))
    values = [spearmanr(one[:, index].mean(1), other[:, index].mean(1)).statistic for index in drawn]
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(spearmanr(one.mean(1), other.mean(1)).statistic), float(low), float(high)


def timed(scorer: Scorer, split: Split, **options: bool) -> tuple[float, int]:
    """Seconds and tokens of one likelihood evaluation."""
    with counted(scorer.model) as passes:
        start = time.perf_counter()
        scorer.score(split, **options)
        return time.perf_counter() - start, sum(passes)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Lists the tokens of every forward pass of its block, padding included."""
    passes: list[int] = []

    def count(module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        passes.append((args[0] if args else kwargs["input_ids"]).numel())

    with model.register_forward_pre_hook(count, with_kwargs=True):
        yield passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--task", choices=["kv_retrieval", "multi_doc_qa"], default="kv_retrieval")
    parser.add_argument("--data")
    parser.add_argument("--num-keys", type=int, default=100)
    parser.add_argument("--num-documents", type=int, default=10)
    parser.add_argument("--chat-template", action="store_true")
    parser.add_argument("--groups", type=int, default=20, help="contexts of the search split")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, help="write all figures to this JSON file")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    shape = {"chat_template": arguments.chat_template, "num_positions": 5}
    if arguments.task == "kv_retrieval":
        task = KeyValueRetrieval(tokenizer, keys="syllables", num_keys=arguments.num_keys, **shape)
    else:
        task = MultiDocumentQA(tokenizer, data=arguments.data, num_documents=arguments.num_documents, **shape)

    scorer, console = Scorer(base), Console()
    with counted(base) as passes:
        start = time.perf_counter()
        found = preflight(scorer, task, wanted={"search": arguments.groups})
        learnt = time.perf_counter() - start, sum(passes)
    for line in found.remarks():
        console.print(line)
    split = with_targets(prepared(task, found).split("search", arguments.groups), found, task)
    console.print(f"split: {split.num_groups} contexts, up to {split.max_tokens} tokens, {split.protocol}")

    own = found.targets.own
    whole = Scorer(base, cache_contexts=False)
    costs = {"each context once": timed(scorer, split), "each prompt whole": timed(whole, split, packed=False)}
    costs["targets and preflight, once"] = learnt

    vectors = varied_vectors(base.config.num_hidden_layers)
    written, gold, opened = [], [], []
    table = Table("factors", "written %", "gold", "opening and gold", "forced %", "forced, opening too %")
    for name, vector in vectors.items():
        model = get_peft_model(base, LayerRopeConfig(layer_factors=list(vector)))
        scorer.model = model
        scores = scorer.generate(with_openings(split, own, scored=False))
        whole_target = scorer.score(with_openings(split, own, scored=True))
        base = model.unload()
        written.append(scores.correct.mean(1))
        gold.append(scores.log_prob.mean(1))
        opened.append(whole_target.log_prob.mean(1))
        forced = scores.written.forced.mean()
        values = (100 * written[-1].mean(), gold[-1].mean(), opened[-1].mean(), 100 * forced)
        cells = [f"{value:.3f}" if abs(value) < 20 and value < 0 else f"{value:.1f}" for value in values]
        table.add_row(name, *cells, f"{100 * whole_target.correct.mean():.1f}")
        print(name, *cells, flush=True)
    console.print(table)
    answers = np.array(written)
    ranks = {
        "gold": rank_correlation(answers, np.array(gold)),
        "opening and gold": rank_correlation(answers, np.array(opened)),
    }
    for name, (value, low, high) in ranks.items():
        console.print(f"rank correlation with written answers, {name}: {value:.2f} [{low:.2f}, {high:.2f}]")
    for name, (seconds, tokens) in costs.items():
        console.print(f"{name}: {tokens:,} tokens, {seconds:.1f} s")
    if arguments.output is not None:
        plain = {"ranks": ranks, "costs": costs, "vectors": vectors}
        plain |= {
            name: np.array(values).tolist()
            for name, values in (("written", written), ("gold", gold), ("opened", opened))
        }
        arguments.output.write_text(json.dumps(plain))


if __name__ == "__main__":
    main()
