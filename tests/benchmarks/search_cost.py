"""What a whole demo search costs, as a share of the same search done plainly: in decoder layers and in seconds.

    python tests/benchmarks/search_cost.py           # both searches, about four minutes on two CPU cores
    python tests/benchmarks/search_cost.py --small   # a tiny search, to see that this works

(a) Layer evaluations, in decoder layers × tokens. Counted by a hook inside every decoder layer, which sees only
layers that really run: the searched vectors, the held-out splits, the timed evaluation and the proof that sharing is
exact. Those of the plain search:

    L · (requested · T + validated · V + tested · X)

where L is the number of layers; T, V and X are the tokens of one vector on all heats (the search split and the short
prompts), on the validation and on the test split, each with a context's questions packed into one row, as ours;
`requested` is every individual that a searcher asked for, repeats included, which is
`evaluations["all_methods"] + evaluations["saved_by_memo"]` (an unchanged elite of the genetic algorithm keeps its
fitness in DEAP's way and is not asked for again); `validated` and `tested` are distinct vectors. Gradient steps are
shown apart, then added to both sides: nothing is saved on them. Each is a forward and a backward pass of twice its
work over the search split. "search split only" leaves the validation and test splits out on both sides: their few
vectors are scored whole, once each, whatever the search does.

(b) Seconds of `search()`, against the plain search: each requested individual scored by greedy `generate()`, one
example after the other, on the same heats, and each held-out candidate on the same splits. It would take hours, so a
sample is timed and multiplied by the number of examples. The sample is taken while ours runs, at the beginning of each
of its stages, and its time is taken off ours. Gradient steps are added to the plain search as they are. `generate()`
gives hits only; the log-probabilities that the default objective needs would cost the plain search more.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
import warnings
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from peft_layerrope import KeyValueWords, SearchResult, SearchSettings, Split, demo_model_path, search
from peft_layerrope.scoring.batching import make_batches
from peft_layerrope.scoring.scores import mean_interval
from peft_layerrope.searcher.gradient import STEP_COST
from peft_layerrope.tuner.sites import find_stack

LENGTH = 512
LAYER_GOAL, TIME_GOAL = 0.35, 0.1
SMALL = {
    "search_groups": 8,
    "validation_groups": 8,
    "test_groups": 20,
    "population": 6,
    "generations": 2,
    "refine_evaluations": 8,
    "gradient_steps": 2,
}
VALIDATION_STAGE, TEST_STAGE, GRADIENT_STAGE = "choice on the validation split", "held-out test", "gradient steps"
console = Console(width=120)


class LayerCount:
    """Counts layers × tokens that really run, apart for passes with a gradient."""

    def __init__(self, model: nn.Module) -> None:
        self.without_gradient = self.with_gradient = 0
        for layer in find_stack(model).layers:
            layer.mlp.register_forward_pre_hook(self._count)  # a layer answered from the store never gets here

    def _count(self, module: nn.Module, args: tuple[torch.Tensor]) -> None:
        tokens = args[0].shape[:-1].numel()
        if torch.is_grad_enabled():
            self.with_gradient += tokens
        else:
            self.without_gradient += tokens


class PlainScorer:
    """Scores a vector the plain way, on a copy of the model of its own, and remembers how long an example took."""

    def __init__(self, model: nn.Module, settings: SearchSettings, long: Split, short: Split) -> None:
        layers = len(find_stack(model).layers)
        self._model = get_peft_model(copy.deepcopy(model), settings.adapter_config([1.0] * layers)).eval()
        self._layers, self._grid = layers, settings.grid.values
        self._splits = {"long": long, "short": short}
        self._rng = random.Random(0)
        self.seconds: dict[str, list[float]] = {"long": [], "short": []}  # of one example, a mean for each sample

    @torch.inference_mode()
    def sample(self) -> None:
        """Times a new vector on one context, asked at every position, of each length."""
        self._model.base_model.set_layer_factors([self._rng.choice(self._grid) for _ in range(self._layers)])
        for name, split in self._splits.items():
            number = len(self.seconds[name]) % split.num_groups
            examples = split.part(number, number + 1).examples
            started = time.perf_counter()
            for example in examples:
                prompt = torch.tensor([example.context_ids + example.query_ids])
                self._model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=len(example.answer_ids),
                    do_sample=False,
                )
            self.seconds[name].append((time.perf_counter() - started) / len(examples))


@dataclass
class Interleaved:
    """A search's progress that takes a sample of the plain way at the beginning of each stage, on its own clock."""

    plain: PlainScorer
    stages: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    away: float = 0.0  # seconds in samples
    _name: str | None = None
    _since: float = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def stage(self, name: str, total: int) -> None:
        self._finish()
        started = time.perf_counter()
        self.plain.sample()
        self._name, self._since, self.steps[name] = name, time.perf_counter(), 0
        self.away += self._since - started

    def advance(self) -> None:
        self.steps[self._name] += 1

    def note(self, text: str) -> None:
        pass

    def _finish(self) -> None:
        if self._name is not None:
            self.stages[self._name] = time.perf_counter() - self._since


@dataclass(frozen=True)
class Cost:
    """One search, ours and plain."""

    requested: int
    validated: int
    tested: int
    layers_run: int
    layers_claimed: int
    layers_plain: int
    search_share: float
    gradient_layers: int
    seconds: float
    plain_seconds: tuple[float, float, float]  # mean and its 95 % interval, from the samples
    examples: dict[str, int]
    samples: int

    @property
    def layer_share(self) -> float:
        return self.layers_run / self.layers_plain

    @property
    def layer_share_with_gradient(self) -> float:
        return (self.layers_run + self.gradient_layers) / (self.layers_plain + self.gradient_layers)


def measure(settings: SearchSettings) -> Cost:
    """Runs the demo search once."""
    model = AutoModelForCausalLM.from_pretrained(demo_model_path()).eval()
    task = KeyValueWords(AutoTokenizer.from_pretrained(demo_model_path()), LENGTH)
    splits = {
        "search": task.split("search", settings.search_groups),
        "short": task.shortened(model.config.max_position_embeddings // 2).split("search", settings.short_groups),
        "validation": task.split("validation", settings.validation_groups),
        "test": task.split("test", settings.test_groups),
    }
    plain = PlainScorer(model, settings, splits["search"], splits["short"])
    plain.sample()  # the first calls are slow
    plain.seconds = {name: [] for name in plain.seconds}
    audience = Interleaved(plain)
    count = LayerCount(model)
    started = time.perf_counter()
    result = search(model, task, settings, progress=audience)
    seconds = time.perf_counter() - started - audience.away
    _check_short_prompts(result, splits["short"])
    return _cost(result, model, splits, audience, count, seconds)


def _check_short_prompts(result: SearchResult, short: Split) -> None:
    used = result.splits[-1]["fingerprint"]
    if used != short.fingerprint():
        raise RuntimeError(f"the search scored other short prompts ({used}) than counted here.")


def _cost(
    result: SearchResult,
    model: nn.Module,
    splits: dict[str, Split],
    audience: Interleaved,
    count: LayerCount,
    seconds: float,
) -> Cost:
    layers = len(find_stack(model).layers)
    tokens = {
        name: sum(batch.num_tokens for batch in make_batches(model, split.examples, result.settings.batch_tokens))
        for name, split in splits.items()
    }
    requested = result.evaluations["all_methods"] + result.evaluations["saved_by_memo"]
    validated = audience.steps.get(VALIDATION_STAGE, 0)
    tested = len({row.factors for row in result.table})
    if audience.steps[TEST_STAGE] != tested:
        raise RuntimeError(f"{audience.steps[TEST_STAGE]} vectors were tested, the table has {tested}.")
    searched_tokens = requested * (tokens["search"] + tokens["short"])
    plain_tokens = searched_tokens + validated * tokens["validation"] + tested * tokens["test"]
    timing = result.timing
    examples = {
        "long": requested * len(splits["search"].examples)
        + validated * len(splits["validation"].examples)
        + tested * len(splits["test"].examples),
        "short": requested * len(splits["short"].examples),
    }
    gradient_seconds = audience.stages.get(GRADIENT_STAGE, 0.0)  # holds a few evaluations as well: a little too much
    intervals = {name: mean_interval(samples) for name, samples in audience.plain.seconds.items()}
    plain_seconds = tuple(
        sum(examples[name] * getattr(interval, part) for name, interval in intervals.items()) + gradient_seconds
        for part in ("value", "low", "high")
    )
    return Cost(
        requested,
        validated,
        tested,
        count.without_gradient,
        timing["layer_tokens_run"],
        layers * plain_tokens,
        (timing["layer_tokens_run"] - timing["held_out_layer_tokens_run"]) / (layers * searched_tokens),
        STEP_COST * count.with_gradient,
        seconds,
        plain_seconds,
        examples,
        len(audience.plain.seconds["long"]),
    )


def show(costs: dict[str, Cost], settings: SearchSettings) -> None:
    """Prints both tables."""
    layers = Table(
        "search",
        "ran",
        "plain",
        "share",
        "search split only",
        "with gradient steps",
        "goal",
        title="(a) layer evaluations, layers × tokens",
    )
    times = Table("search", "ours", "plain (extrapolated)", "share", "goal", title="(b) wall time in seconds")
    for name, cost in costs.items():
        layers.add_row(
            name,
            f"{cost.layers_run:,}",
            f"{cost.layers_plain:,}",
            f"{cost.layer_share:.3f}",
            f"{cost.search_share:.3f}",
            f"{cost.layer_share_with_gradient:.3f}",
            f"{LAYER_GOAL}",
        )
        value, low, high = cost.plain_seconds
        times.add_row(
            name,
            f"{cost.seconds:.1f}",
            f"{value:.0f} ({low:.0f} to {high:.0f})",
            f"{cost.seconds / value:.4f} ({cost.seconds / high:.4f} to {cost.seconds / low:.4f})",
            f"{TIME_GOAL}",
        )
    console.print(layers)
    console.print(times)
    for name, cost in costs.items():
        console.print(
            f"{name}: {cost.requested} individuals requested, {cost.validated} vectors on the validation split, "
            f"{cost.tested} on the test split. `timing` says {cost.layers_claimed:,} layers × tokens; the hooks also "
            f"saw the proof of sharing and the timed evaluation. Gradient steps: {cost.gradient_layers:,} "
            f"(a backward pass counts twice). Plain: {cost.examples['long']:,} calls of generate() with {LENGTH} "
            f"tokens and {cost.examples['short']:,} with short prompts, extrapolated from {cost.samples} samples of "
            "11 + 11 calls, each with another vector, between the stages of ours.",
            highlight=False,
        )
    console.print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; {settings}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny search, to see that this works")
    parser.add_argument("--seed", type=int, default=0, help="seed of the searchers")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    overrides: dict[str, Any] = {"seed": options.seed, **(SMALL if options.small else {})}
    costs = {
        "per layer only": measure(SearchSettings(algorithm="genetic", controls=False, **overrides)),
        "with all controls": measure(SearchSettings(algorithm="genetic", **overrides)),
    }
    show(costs, SearchSettings(algorithm="genetic", **overrides))


if __name__ == "__main__":
    main()
