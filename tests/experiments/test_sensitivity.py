"""One layer scaled at a time: against factors set by hand, with shared KV caches, and what it advises."""

from __future__ import annotations

import io
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, VOCAB, WINDOW, build_model, logits
from families import build_tiny
from peft import get_peft_model
from rich.console import Console
from scipy import stats

from peft_layerrope import Example, KeyValueWords, LayerRopeConfig, LayerRopeError, SearchError
from peft_layerrope.experiments import Measuring
from peft_layerrope.experiments.layer_sensitivity import (
    LayerEffect,
    Sensitivity,
    plot_sensitivity,
    sensitivity,
    sensitivity_table,
)
from peft_layerrope.scoring.scorer import Scorer
from peft_layerrope.scoring.scores import Interval, difference_interval, utilization
from peft_layerrope.searcher.space import format_layers, parse_layers
from peft_layerrope.tasks.base import Split

GROUPS = 5


class RandomTokens:
    """Random contexts; the answer is what follows a token of the context."""

    name = "random tokens"
    positions = (2, 12, 21)

    def __init__(self, vocab: int = VOCAB) -> None:
        self.vocab = vocab

    def split(self, name: str, num_groups: int) -> Split:
        rng = np.random.default_rng(["search", "validation", "test"].index(name))
        examples = []
        for group in range(num_groups):
            context = tuple(rng.integers(1, self.vocab, 24).tolist())
            for i, at in enumerate(self.positions):
                examples.append(Example(context, context[at : at + 1], context[at + 1 : at + 3], i, group))
        return Split(name, 0, self.positions, tuple(examples))

    def describe(self) -> dict:
        return {"name": self.name}


def measure(model, task=None, factors=(2.0, 0.5), layers_to_transform=None, config=None, **how) -> Sensitivity:
    measuring = Measuring(model, **{"num_groups": GROUPS} | how)
    return sensitivity(measuring, task or RandomTokens(), config or LayerRopeConfig(), factors, layers_to_transform)


def by_hand(model, factors, **config):
    """Utilisation of each group, of accuracy and log-prob, of an ordinary PeftModel."""
    peft_model = get_peft_model(model, LayerRopeConfig(layer_factors=list(factors), **config))
    scores = Scorer(peft_model).score(RandomTokens().split("search", GROUPS))
    peft_model.unload()
    return [np.array([utilization(row) for row in part]) for part in (scores.correct, scores.log_prob)]


def check_against_hand(result, model, tied, **config):
    """`tied`: the layers that get the factor, by the layer that is named."""
    base = by_hand(model, [1.0] * NUM_LAYERS, **config)
    assert result.accuracy == pytest.approx(base[0].mean(), abs=1e-6)
    assert result.log_prob == pytest.approx(base[1].mean(), abs=1e-5)
    assert [(e.layer, e.factor) for e in result.effects] == [(i, f) for i in result.layers for f in result.factors]
    for effect in result.effects:
        factors = [effect.factor if i in tied[effect.layer] else 1.0 for i in range(NUM_LAYERS)]
        accuracy, log_prob = by_hand(model, factors, **config)
        assert effect.accuracy_utilization == pytest.approx(accuracy.mean(), abs=1e-6)
        assert effect.log_prob_utilization == pytest.approx(log_prob.mean(), abs=1e-5)
        paired = stats.ttest_rel(log_prob, base[1]) if not np.array_equal(log_prob, base[1]) else None
        low, high = paired.confidence_interval(0.95) if paired else (0.0, 0.0)
        change, expected = effect.log_prob_change, ((log_prob - base[1]).mean(), low, high)
        assert (change.value, change.low, change.high) == pytest.approx(expected, abs=1e-4)
        assert effect.accuracy_change == difference_interval(accuracy - base[0])


@pytest.mark.parametrize(
    "arguments", [{}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 4.0}]
)
def test_equals_factors_set_by_hand(arguments):
    model = build_model("llama", max_position_embeddings=16)  # shorter than the prompts, for the dynamic type
    result = measure(model, config=LayerRopeConfig(**arguments))
    assert result.factors == (0.5, 2.0)
    check_against_hand(result, model, {i: [i] for i in range(NUM_LAYERS)}, **arguments)
    assert (
        len({round(e.log_prob_utilization, 6) for e in result.effects}) > NUM_LAYERS
    )  # the factors did reach the layers


@pytest.mark.parametrize("layers", [(3, 1), "3,1"])
def test_layers_and_small_batches(layers):
    model = build_model("llama")
    result = measure(model, layers_to_transform=layers, batch_tokens=64)
    assert result.layers == (1, 3)
    check_against_hand(result, model, {1: [1], 3: [3]})
    assert result.split["name"] == "search"


def test_layers_with_a_shared_kv_cache_move_with_their_source():
    model = build_tiny("gemma3n_text").eval()
    result = measure(model, RandomTokens())
    sources = result.key_sources
    own = tuple(i for i, source in enumerate(sources) if source == i)
    assert len(own) < len(sources) == NUM_LAYERS
    assert result.layers == own
    tied = {layer: [i for i, source in enumerate(sources) if source == layer] for layer in own}
    assert [result.followers(i) for i in own] == [tuple(j for j in tied[i] if j != i) for i in own]
    check_against_hand(result, model, tied)
    bound = next(i for i, source in enumerate(sources) if source != i)
    with pytest.raises(SearchError, match=rf"layers \[{bound}\] attend to keys of layers \[{sources[bound]}\]"):
        measure(model, layers_to_transform=[bound])


class Audience:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def __enter__(self) -> Audience:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def stage(self, name: str, total: int) -> None:
        self.total += total

    def advance(self) -> None:
        self.done += 1

    def note(self, text: str) -> None:
        return None


def test_the_progress_is_told_every_step():
    audience = Audience()
    measure(build_model("llama"), audience=audience)
    assert audience.done == audience.total == 1 + 2 * NUM_LAYERS  # the unscaled model, and factors × layers


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(ids, fails, monkeypatch):
    model = build_model("llama").train()
    model.model.layers[1].eval()
    before, structure, config = logits(model, ids), repr(model), model.config.to_dict()
    modes = [module.training for module in model.modules()]
    if fails:
        monkeypatch.setattr("peft_layerrope.scoring.scorer.ScoreSheet.scores", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            measure(model)
    else:
        measure(model)
    assert torch.equal(logits(model, ids), before)
    assert repr(model) == structure
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factors": ()}, "layer_factors"),
        ({"factors": (1.5, 0)}, "=0 must be at least 0.01"),
        ({"factors": (math.inf,)}, "=inf must be a finite"),
        ({"factors": (math.nan,)}, "=nan must be a finite"),
        ({"factors": (1.0,)}, "other than 1"),
        ({"layers_to_transform": (0, 4)}, "must be distinct layer indices from 0 to 3"),
        ({"layers_to_transform": (-1,)}, "must be distinct layer indices from 0 to 3"),
        ({"layers_to_transform": (1, 1)}, "must be distinct layer indices from 0 to 3"),
        ({"layers_to_transform": ()}, "must be distinct layer indices from 0 to 3"),
        ({"layers_to_transform": "0-x"}, "'0-x' is no layer or range"),
        ({"task": RandomTokens(10 * VOCAB)}, "outside the model's vocabulary"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(monkeypatch, arguments, message):
    monkeypatch.setattr("peft_layerrope.base_model.get_peft_model", lambda *args: pytest.fail("work"))
    with pytest.raises(LayerRopeError, match=message):
        measure(build_model("llama"), **arguments)


def test_factors_are_tried_once_and_beside_one():
    assert measure(build_model("llama"), factors=(2, 1.0, 1.5, 2.0), layers_to_transform=[1]).factors == (1.5, 2.0)


# What it advises, on made-up effects.


def made_up(changes: dict[int, list[float]], factors=(1.5, 2.0), groups=16, key_sources=None) -> Sensitivity:
    """`changes`: per layer one change of log-prob per factor, each ± 0.1."""
    effects = tuple(
        LayerEffect(layer, f, 0.5, Interval(0, -0.1, 0.1), -2 + c, Interval(c, c - 0.1, c + 0.1))
        for layer, row in changes.items()
        for f, c in zip(factors, row, strict=True)
    )
    sources = key_sources or tuple(range(max(changes) + 1))
    split = {"name": "search", "groups": groups, "max_tokens": 2 * WINDOW}
    return Sensitivity(
        tuple(changes), factors, 0.5, -2.0, effects, sources, {}, "tiny", WINDOW, {"name": "made up"}, split
    )


def test_advice_names_layers_and_options():
    result = made_up({0: [0.5, 0.3], 1: [0.5, 0.8], 2: [0.05, 0.09], 3: [-0.5, -0.05], 4: [-0.01, -0.02]})
    assert result.layers_worth_searching() == (0, 1, 3)
    assert result.layers_that_gain() == (0, 1)
    assert result.rises_at_edge() == (1,)
    assert [result.best_factor(layer) for layer in result.layers] == [1.5, 2.0, 2.0, 1.0, 1.0]
    assert result.advice() == [
        "search layers 0-1,3: the others change nothing measurable by themselves.",
        "of these only layers 0-1 gain by a factor of their own.",
        "layer 1 still rises at 2, the largest tried: try larger ones.",
        "layer 3 loses with every factor above 1; none below 1 was tried.",
    ]
    assert result.subtitle() == "made up, 128 tokens = 2.0× the trained window, 16 contexts of the search split"


def test_advice_where_all_or_no_layers_matter():
    assert made_up({0: [0.5, 0.3], 1: [0.5, 0.4]}).advice() == [
        "search layers 0-1: each one that was tried changes the result."
    ]
    assert made_up({0: [0.05, 0.0], 1: [0.0, -0.05]}).advice() == [
        "no layer changes the gold log-probability measurably with a factor of 1.5, 2 in 16 contexts: try other "
        "factors, more contexts or longer prompts."
    ]


def test_factors_below_one_have_an_edge_as_well():
    result = made_up({0: [0.5, 0.3], 1: [0.3, 0.5], 2: [-0.3, -0.2]}, factors=(0.6, 0.8))
    assert result.rises_at_edge() == ()  # 0.8 is the largest tried, but 1.0 lies beyond it and is known
    assert result.rises_at_low_edge() == (0,)
    assert result.advice()[-1] == "layer 0 scores best at 0.6, the smallest tried: try smaller ones."


def test_a_rise_at_the_edge_must_be_significant():
    assert made_up({0: [0.01, 0.05]}).rises_at_edge() == ()


def test_report_is_plain_json():
    result = measure(build_model("llama"))
    report = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert report["advice"] == result.advice()
    assert len(report["effects"]) == 2 * NUM_LAYERS
    effect = report["effects"][0]
    assert effect["log_prob_change"]["low"] <= effect["log_prob_change"]["value"] <= effect["log_prob_change"]["high"]
    difference = effect["log_prob_utilization"] - report["unscaled"]["log_prob_utilization"]
    assert difference == pytest.approx(effect["log_prob_change"]["value"], abs=2e-6)


# Table and plot.


@pytest.mark.parametrize("num_factors", [1, 3, 4, 5])
def test_table_fits_80_columns(num_factors):
    factors = tuple(1.25 + i for i in range(num_factors))
    rows = {layer: [-12.5] * (num_factors - 1) + [0.01 * layer] for layer in range(30)}
    result = made_up(rows, factors, key_sources=(*range(30), 29, 29))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(sensitivity_table(result, "tiny").to_rich())
    text = console.export_text()
    lines = [line.rstrip() for line in text.splitlines() if " 50.0 " in line and line.split()[0].isdigit()]
    assert len(lines) == (30 if num_factors < 5 else 30 * num_factors)
    assert lines[-1].split()[0] == "29"
    assert "(+30-31)" in text
    assert lines[-1].split()[-2:] == ["50.0", "+0.290*"]
    assert lines[num_factors - 1 if num_factors > 4 else 0].split()[-2:] == ["50.0", "+0.000"]
    assert len(re.findall(r" 50\.0 +-12\.500\*", text)) == 30 * (num_factors - 1)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


@pytest.mark.parametrize("num_layers", [1, 4, 60])
def test_plot_needs_no_pyplot(num_layers):
    result = made_up({layer: [0.1, -0.2] for layer in range(num_layers)})
    assert plot_sensitivity(result).startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


# Layers as text.


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0-3,7", (0, 1, 2, 3, 7)), ("5", (5,)), ("0-1", (0, 1)), ("2,4,6", (2, 4, 6)), ("4095", (4095,))],
)
def test_layers_as_text_and_back(text, layers):
    assert parse_layers(text) == layers
    assert format_layers(layers) == text


def test_layers_in_any_order_with_spaces():
    assert parse_layers(" 7, 0 - 2") == (0, 1, 2, 7)
    assert format_layers([7, 1, 0]) == "0-1,7"
    assert format_layers([]) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "layers_to_transform='': '' is no layer or range, expected e.g. '0-3,7'."),
        ("1,,2", "layers_to_transform='1,,2': '' is no layer or range, expected e.g. '0-3,7'."),
        ("-1", "layers_to_transform='-1': '-1' is no layer or range, expected e.g. '0-3,7'."),
        ("1-2-3", "layers_to_transform='1-2-3': '1-2-3' is no layer or range, expected e.g. '0-3,7'."),
        ("1 2", "layers_to_transform='1 2': '1 2' is no layer or range, expected e.g. '0-3,7'."),
        ("²", "layers_to_transform='²': '²' is no layer or range, expected e.g. '0-3,7'."),
        ("3-1", "layers_to_transform='3-1': the range '3-1' ends before it begins."),
        ("0-3,2", "layers_to_transform='0-3,2': 2 must be named only once."),
        ("0-999999999", "layers_to_transform='0-999999999': layer 999999999 is out of range, expected at most 4095."),
    ],
)
def test_bad_texts(text, message):
    with pytest.raises(SearchError) as caught:
        parse_layers(text)
    assert str(caught.value) == message


def test_the_demo_model_is_repaired_by_its_first_two_layers(demo_model, demo_tokenizer):
    task = KeyValueWords(demo_tokenizer, 512, seed=777)
    result = sensitivity(Measuring(demo_model, 16), task, LayerRopeConfig(), (1.6,), (0, 1, 4))
    assert result.layers_that_gain() == (0, 1)
    assert result.layers_worth_searching() == (0, 1)
