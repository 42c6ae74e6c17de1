"""The evaluator against plain scoring of a fresh model, bit for bit, whatever it shares."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from conftest import IS_OLDER, NUM_LAYERS, build_model
from fakes import token_task
from families import build_tiny
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from peft_layerrope import LayerRopeConfig, Split, TaskError
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.searcher.evaluator import ModelEvaluator
from peft_layerrope.searcher.space import Factors
from peft_layerrope.tuner.sites import find_stack

LARGE = 2**26
WEIGHTS = (1.0, 2.0, 3.0)
ROPE = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 1.7},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16},
}


def random_vectors(count: int, seed: int = 0, num_layers: int = NUM_LAYERS) -> list[Factors]:
    """Few values, so that many begin alike."""
    rng = random.Random(seed)
    return [tuple(rng.choice((1.0, 1.5, 2.0)) for _ in range(num_layers)) for _ in range(count)]


def split(name: str = "search", groups: int = 2) -> Split:
    return token_task().split(name, groups)


def with_adapter(base: PreTrainedModel, **fields: object) -> PeftModel:
    return get_peft_model(base, LayerRopeConfig(task_type="CAUSAL_LM", inference_mode=True, **fields))


def evaluator(
    model: PeftModel, share_bytes: int, heats: Sequence[Split] | None = None, batch_tokens: int = 100
) -> ModelEvaluator:
    return ModelEvaluator(
        model,
        heats or [split()],
        objective="log_prob",
        weights=WEIGHTS,
        batch_tokens=batch_tokens,
        share_bytes=share_bytes,
    )


def assert_same(found: dict, expected: dict) -> None:
    for vector, scores in expected.items():
        np.testing.assert_array_equal(found[vector].log_prob, scores.log_prob)
        np.testing.assert_array_equal(found[vector].correct, scores.correct)


def watched(runner: ModelEvaluator) -> ModelEvaluator:
    """Checks the store's budget after every output that is offered to it."""
    outputs = runner._prefixes.outputs
    keep, runner.offered, runner.dropped = outputs.keep, 0, 0

    def checked(*args: object) -> bool:
        runner.offered += 1
        kept, before = None, len(outputs._outputs)
        kept = keep(*args)
        runner.dropped += before + kept - len(outputs._outputs)
        held = [output[0] if isinstance(output, tuple) else output for output, _ in outputs._outputs.values()]
        assert outputs.num_bytes == sum(tensor.untyped_storage().nbytes() for tensor in held) <= outputs.max_bytes
        return kept

    outputs.keep = checked
    return runner


def check_sharing(model: PeftModel) -> None:
    vectors = random_vectors(50)
    expected = evaluator(model, 0).score(vectors, 0)
    large = watched(evaluator(model, LARGE))
    assert_same(large.score(vectors, 0), expected)
    assert large.sharing
    assert large.layers_run < 0.7 * large.layers_asked
    assert large.dropped == 0
    largest = max(size for _, size in large._prefixes.outputs._outputs.values())
    small = watched(evaluator(model, 4 * largest))
    for vector in vectors:  # one by one, in no order
        assert_same(small.score([vector], 0), {vector: expected[vector]})
    assert small.sharing
    assert small.dropped > 0
    assert small.layers_run < small.layers_asked
    assert all("forward" not in layer.__dict__ for layer in find_stack(model.get_base_model()).layers)


def test_sharing_changes_no_bit(family):
    check_sharing(with_adapter(build_model(family)))


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
def test_sharing_changes_no_bit_of_other_rope_types(model_type, rope_type):
    check_sharing(with_adapter(build_model(model_type), **ROPE[rope_type]))


@pytest.mark.parametrize("share_bytes", [0, LARGE])
@pytest.mark.parametrize("rope_type", ROPE)
def test_scores_are_those_of_a_fresh_model(rope_type, share_bytes):
    found = evaluator(with_adapter(build_model("llama"), **ROPE[rope_type]), share_bytes).score(random_vectors(6), 0)
    for vector, scores in found.items():
        fresh = with_adapter(build_model("llama"), **ROPE[rope_type], layer_factors=list(vector))
        # batches of other shapes are not the same to the last bit where there is one thread
        np.testing.assert_allclose(scores.log_prob, Scorer(fresh, batch_tokens=100).score(split()).log_prob, rtol=1e-5)


def test_neither_order_nor_what_was_run_before_matters():
    heats = [split(), split("validation"), split("test", 3)]
    vectors = random_vectors(12)
    model = with_adapter(build_model("llama"))
    plain = evaluator(model, 0, heats)
    expected = [plain.score(vectors, heat) for heat in range(3)]
    for seed in range(4):
        rng = random.Random(seed)
        shared = evaluator(model, rng.choice((30_000, LARGE)), heats)
        work = [(vector, heat) for vector in vectors for heat in range(3)] * 2
        rng.shuffle(work)
        for vector, heat in work:
            assert_same(shared.score([vector], heat), {vector: expected[heat][vector]})


@pytest.mark.parametrize("objective", ["log_prob", "accuracy"])
def test_a_measurement_is_each_groups_utilisation_and_tail(objective):
    model = with_adapter(build_model("llama"))
    runner = ModelEvaluator(
        model, [split(groups=4)], objective=objective, weights=WEIGHTS, batch_tokens=100, share_bytes=LARGE
    )
    vectors = random_vectors(3)
    for vector, measured in zip(vectors, runner.measure(vectors, 0), strict=True):
        scores = runner.score([vector], 0)[vector]
        values = scores.log_prob if objective == "log_prob" else scores.correct
        expected = (values[:, 0] + 2 * values[:, 1] + 3 * values[:, 2]) / 6  # by the weights
        np.testing.assert_allclose(measured.values, expected, rtol=1e-12)
        assert measured.tail == tuple(scores.correct[:, 2].astype(float))


def hand_over(model: PreTrainedModel, take: Callable, forgets: bool) -> PreTrainedModel:
    """Has each layer leave its input for later ones, which `take` it beside what they are given.

    Args:
        model: changed in place.
        take: what a layer makes of its input and of what others left.
        forgets: whether every forward pass starts with nothing; else what a skipped layer left before is still there.
    """
    left: dict[int, torch.Tensor] = {}
    if forgets:
        model.model.register_forward_pre_hook(lambda *_: left.clear())
    for index, layer in enumerate(model.model.layers):

        def patched(hidden: torch.Tensor, *args: object, own=layer.forward, index=index, **kwargs: object) -> object:
            left[index] = hidden
            return own(take(left, index, hidden), *args, **kwargs)

        layer.forward = patched
    return model


def from_all(left: dict, index: int, hidden: torch.Tensor) -> torch.Tensor:
    return hidden + 0.5 * sum(left.values()) if index == NUM_LAYERS - 1 else hidden


def from_first(left: dict, index: int, hidden: torch.Tensor) -> torch.Tensor:
    return hidden + 0.5 * left[0] if index == NUM_LAYERS - 1 else hidden


def from_neighbour(left: dict, index: int, hidden: torch.Tensor) -> torch.Tensor:
    """The third layer takes from the second; the last one takes nothing."""
    return hidden + 0.5 * left.get(1, torch.zeros_like(hidden)) if index == 2 else hidden


def neighbour_or_error(left: dict, index: int, hidden: torch.Tensor) -> torch.Tensor:
    return hidden + 0.5 * left[1] if index == 2 else hidden


@pytest.mark.parametrize(
    ("take", "forgets"),
    [
        (from_all, True),
        (from_first, True),
        (from_neighbour, True),
        (neighbour_or_error, True),
        (neighbour_or_error, False),
    ],
)
def test_layers_that_pass_more_than_their_output_are_not_shared(take, forgets):
    model = with_adapter(hand_over(build_model("llama"), take, forgets))
    vectors = random_vectors(20)
    expected = evaluator(model, 0).score(vectors, 0)
    runner = evaluator(model, LARGE)
    runner.score([(1.0,) * NUM_LAYERS], 0)  # as a search does first
    assert_same(runner.score(vectors, 0), expected)
    assert runner.sharing is False
    assert runner.layers_run == runner.layers_asked


def test_a_family_with_a_shared_kv_cache_is_scored_without_sharing():
    model = with_adapter(build_tiny("gemma3n_text"), layer_factors=[1.0] * NUM_LAYERS)
    sources = find_stack(model.get_base_model()).key_sources
    vectors = [tuple(vector[source] for source in sources) for vector in random_vectors(5)]
    runner = evaluator(model, LARGE)
    assert_same(runner.score(vectors, 0), evaluator(model, 0).score(vectors, 0))
    assert runner.sharing is IS_OLDER  # transformers 5.0 shares keys through a cache only, and here is none


class LimitedMemory:
    """A forward pass that runs out of memory above `tokens` tokens."""

    def __init__(self, model: PeftModel, tokens: int) -> None:
        self.seen: list[int] = []
        base = model.get_base_model()
        forward = base.forward

        def limited(input_ids: torch.Tensor, **kwargs: object) -> object:
            self.seen.append(input_ids.numel())
            if input_ids.numel() > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(input_ids=input_ids, **kwargs)

        base.forward = limited


@pytest.mark.parametrize("share_bytes", [0, LARGE])
def test_running_out_of_memory_halves_the_batches_for_good(share_bytes):
    vectors, examples = random_vectors(10), split(groups=8)
    expected = evaluator(with_adapter(build_model("llama")), 0, [examples], 1000).score(vectors, 0)
    model = with_adapter(build_model("llama"))
    memory = LimitedMemory(model, 120)
    runner = evaluator(model, share_bytes, [examples], 1000)
    found = runner.score(vectors, 0)
    for vector in vectors:
        np.testing.assert_allclose(found[vector].log_prob, expected[vector].log_prob, atol=1e-5)
    assert runner.batch_tokens == 125
    assert bool(runner.sharing) is (share_bytes > 0)
    memory.seen.clear()
    runner.score(vectors, 0)
    assert max(memory.seen, default=0) <= 120
    assert runner.num_tokens(0) == sum(b.num_tokens for b in runner._batches_of(0))


def test_too_little_memory_for_a_row_is_said():
    model = with_adapter(build_model("llama"))
    LimitedMemory(model, 10)
    with pytest.raises(TaskError, match="out of memory even with --batch-tokens 64"):
        evaluator(model, LARGE).score(random_vectors(2), 0)
