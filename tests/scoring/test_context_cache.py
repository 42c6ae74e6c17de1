"""A context run once for all of its questions: the same numbers and the same words as every prompt run by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import VOCAB, build_model
from fakes import LimitedMemory
from families import build_tiny, model_types
from peft import get_peft_model
from test_scorer import one_by_one

from peft_layerrope import Example, LayerRopeConfig, Split
from peft_layerrope.scoring import scorer as scorer_module
from peft_layerrope.scoring.batching import attends_fully, can_pack
from peft_layerrope.scoring.context_cache import can_cache_contexts, context_batches, shares_contexts
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.tasks.metrics import Judge

NEW_TOKENS = 6
KINDS = {
    "llama": ("llama", {}),
    "gemma2, window": ("gemma2", {"sliding_window": 7}),
    "mistral, window": ("mistral", {"sliding_window": 8}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "gpt_neox": ("gpt_neox", {}),
    "qwen3": ("qwen3", {}),
}


class Numbers:
    """Token ids as text, which no accepted answer is found in."""

    eos_token_id = None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def split_of(*, openings: bool = True) -> Split:
    """Contexts of several lengths, the longest beyond every window; questions of one to three tokens."""
    rng = np.random.default_rng(0)
    examples = []
    for group, length in enumerate((20, 31, 26, 26)):
        context = tuple(rng.integers(1, VOCAB, length).tolist())
        for i in range(3):
            query, answer, opening = (
                tuple(rng.integers(1, VOCAB, n).tolist()) for n in (1 + (group + i) % 3, 3, i if openings else 0)
            )
            examples.append(Example(context, query, answer, i, group, ("no answer",), None, opening))
    return Split("test", 0, (0, 1, 2), tuple(examples))


def adapted(kind: str, **config: object) -> torch.nn.Module:
    family, overrides = KINDS[kind]
    model = get_peft_model(
        build_model(family, **overrides), LayerRopeConfig(layer_factors=[1.0, 1.5, 2.0, 1.2], **config)
    )
    model.get_base_model().generation_config.eos_token_id = None
    return model


def reference(model: torch.nn.Module, example: Example) -> tuple[bool, float]:
    """A plain forward pass of one unpadded sequence."""
    return one_by_one(model, replace(example, query_ids=example.query_ids + example.opening_ids, opening_ids=()))


def generated(model: torch.nn.Module, example: Example) -> tuple[int, ...]:
    """What transformers writes after one prompt."""
    ids = torch.tensor([example.context_ids + example.query_ids])
    output = model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return tuple(output[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
@pytest.mark.parametrize("way", ["cache", "packed", "whole prompts", "as it chooses"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_scores_like_one_by_one(kind, way, batch_tokens):
    model, split = adapted(kind), split_of()
    assert can_pack(model)
    scorer = Scorer(
        model, batch_tokens=batch_tokens, cache_contexts={"cache": True, "as it chooses": None}.get(way, False)
    )
    scores = scorer.score(split, packed={"packed": True, "whole prompts": False}.get(way))
    expected = [reference(model, example) for example in split.examples]
    assert scores.correct.flatten().tolist() == [hit for hit, _ in expected]
    np.testing.assert_allclose(scores.log_prob.flatten(), [value for _, value in expected], atol=5e-5)


@pytest.mark.parametrize("batch_tokens", [1, 150, 10_000])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_writes_what_transformers_writes(kind, cached, batch_tokens):
    model, split = adapted(kind), replace(split_of(), judge=Judge("contains_value", Numbers(), NEW_TOKENS))
    written = Scorer(model, batch_tokens=batch_tokens, cache_contexts=cached).write(split)
    expected = [generated(model, example) for example in split.examples]
    assert len(set(expected)) > len(expected) // 2  # or they would agree whatever was read
    assert [w.ids for w in written] == expected
    assert [w.text for w in written] == [" ".join(map(str, ids)) for ids in expected]
    assert all(w.cut_off for w in written)


def test_a_window_is_seen_here():
    """The windows of these models are narrow enough to matter to what is compared above."""
    split = split_of()
    for kind in ("gemma2, window", "mistral, window", "qwen2, window"):
        family, overrides = KINDS[kind]
        wide = get_peft_model(
            build_model(family, **{**overrides, "sliding_window": 64}),
            LayerRopeConfig(layer_factors=[1.0, 1.5, 2.0, 1.2]),
        )
        narrow, other = (Scorer(model).score(split).log_prob for model in (adapted(kind), wide))
        assert np.abs(narrow - other).max() > 0.1
        assert not attends_fully(adapted(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_context_runs_fewer_tokens(kind):
    model, split = adapted(kind), split_of()
    whole, shared = Scorer(model, cache_contexts=False), Scorer(model)
    shared.score(split)  # the first time, both ways are tried on a few tokens
    passes = LimitedMemory(model.get_base_model(), tokens=10**9).seen

    def run(call: Callable[[], object]) -> int:
        passes.clear()
        call()
        return sum(passes)

    contexts = sum(len(context) for context in {example.context_ids for example in split.examples})
    each = run(lambda: whole.score(split, packed=False))
    assert each >= 3 * contexts
    assert run(lambda: shared.score(split)) < 0.6 * each
    asked = replace(split, judge=Judge("contains_value", Numbers(), NEW_TOKENS))
    assert run(lambda: shared.write(asked)) < 0.8 * run(lambda: whole.write(asked))


@pytest.mark.parametrize("write", [False, True])
def test_a_rotation_that_depends_on_the_length_is_never_cached(write, monkeypatch):
    """The cached keys would be rotated for another length."""
    model = adapted("llama", rope_type="dynamic", factor=4.0, original_max_position_embeddings=16)
    monkeypatch.setattr(scorer_module, "run_contexts", lambda *_: pytest.fail("a context was run by itself"))
    split = replace(split_of(), judge=Judge("contains_value", Numbers(), NEW_TOKENS))
    assert not can_cache_contexts(model)
    if write:
        assert [w.ids for w in Scorer(model).write(split)] == [generated(model, e) for e in split.examples]
    else:
        expected = [reference(model, example)[1] for example in split.examples]
        np.testing.assert_allclose(Scorer(model).score(split).log_prob.flatten(), expected, atol=5e-5)


def test_a_model_whose_state_cannot_be_copied_is_not_cached():
    model = adapted("llama")
    assert can_cache_contexts(model)
    forward = model.get_base_model().forward

    def stateless(*args: object, **kwargs: object) -> object:
        """Takes a cache, by whichever name, and does not read it."""
        kept = {name: value for name, value in kwargs.items() if name not in ("cache", "past_key_values")}
        if kept["attention_mask"].shape[1] > kept["input_ids"].shape[1]:
            kept["attention_mask"] = kept["attention_mask"][:, -kept["input_ids"].shape[1] :]
        return forward(*args, **kept)

    model.get_base_model().forward = stateless
    assert not can_cache_contexts(model)


@pytest.mark.skipif("falcon_h1" not in model_types(), reason="this transformers has no Falcon-H1")
def test_states_that_do_not_follow_their_rows_are_not_cached():
    """Of its Mamba layers, whose states stay in the order of the contexts."""
    model, split = build_tiny("falcon_h1").eval(), split_of()
    assert not can_cache_contexts(model)
    expected = Scorer(model, cache_contexts=False).score(split).log_prob
    np.testing.assert_allclose(Scorer(model).score(split).log_prob, expected, atol=5e-5)


def test_only_a_context_that_is_asked_twice_is_shared():
    split = split_of()
    assert shares_contexts(split)
    own = tuple(replace(e, context_ids=(*e.context_ids, e.position + 1)) for e in split.examples)
    assert not shares_contexts(replace(split, examples=own))
    empty = tuple(replace(e, context_ids=()) for e in split.examples)
    assert not shares_contexts(replace(split, examples=empty))


@pytest.mark.parametrize("batch_tokens", [1, 120, 10_000])
def test_batches_of_contexts_hold_every_example_once(batch_tokens):
    examples = split_of().examples
    batches = list(context_batches(examples, NEW_TOKENS, batch_tokens))
    members = [(context, index) for batch in batches for context, indices in batch for index in indices]
    assert sorted(index for _, index in members) == list(range(len(examples)))
    assert all(examples[index].context_ids == context for context, index in members)
    longest = max(len(e.asked_ids) + len(e.answer_ids) for e in examples) + NEW_TOKENS
    for batch in batches:
        rows = sum(len(indices) for _, indices in batch)
        width = max(len(context) for context, _ in batch) + longest
        assert len(batch) == 1 or rows * width <= batch_tokens
